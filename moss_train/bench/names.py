"""What names in the options of measuring verbs stand for: a file of sizes, a layout.

Layouts are named by what differs from one process, joined by `+`: `tp2+sp`, `pp2+vpp2`, `cp2`, `dp2+zero1`,
`pp2+frames_tp`, `recompute_layers+recompute_tower`. `one` is the single process that all are compared with.
"""

import re
from typing import Any

import yaml
from omegaconf import OmegaConf

from moss_train.errors import ConfigError
from moss_train.locations import shipped_directory
from moss_train.model.config import ModelConfig, RecomputeConfig
from moss_train.parallel.config import LayoutConfig
from moss_train.streams.config import TokenizerConfig
from moss_train.streams.tokenizer import load_tokenizer

ONE = "one"
_RANKS = 8

_DEGREE = re.compile(r"(tp|pp|vpp|cp|dp|zero)(\d+)")
_LAYOUT_WORDS: dict[str, dict[str, Any]] = {
    "sp": {"sp": True},
    "frames_tp": {"frame_shard": "tp"},
    "frames_all": {"frame_shard": "model_parallel"},
}
_RECOMPUTE_WORDS: dict[str, dict[str, Any]] = {
    "recompute_selective": {"self_layers": "selective", "cross_layers": "selective"},
    "recompute_layers": {"self_layers": "full", "cross_layers": "full"},
    "recompute_tower": {"tower": True},
}


def named_layout(name: str) -> tuple[LayoutConfig, RecomputeConfig]:
    """The layout and the recomputation that a name stands for. ConfigError when it has no meaning."""
    layout: dict[str, Any] = {"dp": 1}
    recompute: dict[str, Any] = {}
    for word in name.split("+"):
        if degree := _DEGREE.fullmatch(word):
            layout[degree[1]] = int(degree[2])
        elif word in _LAYOUT_WORDS:
            layout |= _LAYOUT_WORDS[word]
        elif word in _RECOMPUTE_WORDS:
            recompute |= _RECOMPUTE_WORDS[word]
        elif word != ONE:
            legal = ", ".join(["tp2", "pp2", "vpp2", "cp2", "dp2", "zero1", *_LAYOUT_WORDS, *_RECOMPUTE_WORDS])
            raise ConfigError(f"layouts={name}: {word!r} is no word of a layout; words are {legal}, joined by +")
    config = LayoutConfig(**layout)
    ranks = config.tp * config.pp * config.cp * (config.dp or 1)
    if ranks > _RANKS:
        raise ConfigError(f"layouts={name}: needs {ranks} processes; at most {_RANKS} are started")
    config.validate(ranks)
    return config, RecomputeConfig(**recompute)


def model_of(name: str) -> ModelConfig:
    """Sizes of `recipes/model/<name>.yaml`, with the tokenizer's vocabulary. ConfigError when there is no such file."""
    path = shipped_directory("recipes") / "model" / f"{name}.yaml"
    if not path.is_file():
        legal = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise ConfigError(f"model={name}: no such file of recipes/model; there are {legal}")
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), yaml.safe_load(path.read_text(encoding="utf-8")))
    model: ModelConfig = OmegaConf.to_object(merged)  # type: ignore[assignment]
    if model.text.vocabulary_size is None:
        model.text.vocabulary_size = load_tokenizer(TokenizerConfig()).vocabulary_size
    model.validate()
    return model
