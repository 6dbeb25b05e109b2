"""config.json of Llama-3.2-Vision and MOSS-Video-Preview, as sizes of our model and back.

MOSS-Video-Preview is Llama-3.2-Vision's config with another class under `architectures` and, beside the vision sizes,
`merge_mode` and `merge_size`: how patches are pooled. Its training code keeps model_type `mllama` and takes the pooling
from its command line, so a config without the two keys has what all its recipes have, averages of 4 × 4.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moss_train.checkpoint.files import read_json
from moss_train.errors import CheckpointError, ConfigError
from moss_train.model.config import ModelConfig, RopeScaling, TextConfig, VisionConfig
from moss_train.streams.tokenizer import SpecialTokens

CONFIG = "config.json"
EXTRA_ROWS = 8  #: of the embedding beyond the head, in every model of the family
VIDEO_CLASS, PLAIN_CLASS = "VideoMllamaForConditionalGeneration", "MllamaForConditionalGeneration"
OWN_KEY = "moss_train"  #: in config.json: which video additions a model has, where they are not those of the reference

_POOLS = {"average": "average", "max": "max", None: "none"}
_MAX_POSITIONS = 131072
_MAX_TILES = 64  #: of a picture; Llama's are 4


class _Section:
    """Fields of one JSON object, with the file and the field in every error."""

    def __init__(self, file: Path, content: Mapping[str, Any], prefix: str = ""):
        self._file, self.content, self._prefix = file, content, prefix

    def part(self, name: str) -> "_Section":
        found = self.content.get(name)
        if not isinstance(found, dict):
            raise self.error(name, "should be an object")
        return _Section(self._file, found, f"{self._prefix}{name}.")

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        found = self.content.get(name, default)
        if not isinstance(found, int) or isinstance(found, bool) or found < least:
            raise self.error(name, f"should be a whole number of at least {least}")
        return found

    def number(self, name: str, default: float | None = None) -> float:
        found = self.content.get(name, default)
        if not isinstance(found, (int, float)) or isinstance(found, bool):
            raise self.error(name, "should be a number")
        return float(found)

    def integers(self, name: str, default: list[int]) -> list[int]:
        found = self.content.get(name, default)
        if not isinstance(found, list) or not all(isinstance(value, int) for value in found):
            raise self.error(name, "should be a list of whole numbers")
        return list(found)

    def items(self, name: str) -> list[Any]:
        found = self.content.get(name) or []
        if not isinstance(found, list):
            raise self.error(name, "should be a list")
        return found

    def require(self, name: str, legal: object, default: object) -> None:
        if self.content.get(name, default) != legal:
            raise self.error(name, f"must be {legal!r}: the model has no other")

    def error(self, name: str, problem: str) -> CheckpointError:
        shown = repr(self.content.get(name))[:60]
        return CheckpointError(f"{self._file}: {self._prefix}{name} is {shown}, {problem}")


def is_plain(sizes: ModelConfig) -> bool:
    """Whether transformers' own Mllama computes the same: none of the video additions is on."""
    return sizes.pool == "none" and not sizes.cross_rope and not sizes.vision.full_attention


def read_sizes(folder: Path) -> ModelConfig:
    """Sizes of the model in a folder, from its config.json.

    Keys that are absent have transformers' defaults. CheckpointError, which names file and field, for a model of
    another family and for what ours cannot be.
    """
    file = folder / CONFIG
    content = read_json(file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: should be a JSON object")
    whole = _Section(file, content)
    kind, classes = content.get("model_type"), whole.items("architectures")
    if kind not in ("mllama", "video_mllama"):
        raise CheckpointError(
            f"{file}: model_type is {kind!r}; what can be read is Llama-3.2-Vision (mllama) and MOSS-Video-Preview "
            f"(video_mllama, or mllama with the class {VIDEO_CLASS})"
        )
    vision, text = whole.part("vision_config"), whole.part("text_config")
    is_video = kind == "video_mllama" or VIDEO_CLASS in classes or "merge_mode" in vision.content
    own = content.get(OWN_KEY) if isinstance(content.get(OWN_KEY), dict) else {}
    sizes = ModelConfig(
        name=folder.resolve().name,
        vision=_vision(vision),
        text=_text(text),
        pool=_pool(vision) if is_video else "none",
        cross_rope=bool(own.get("cross_rope", True)) if is_video else False,
    )
    if is_video and sizes.pool != "none":
        sizes.pool_stride = vision.integer("merge_size", 4)
    sizes.vision.full_attention = bool(own.get("full_attention", True)) if is_video else False
    try:
        sizes.validate()
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if vision.integer("vision_output_dim", sizes.vision.feature_size) != sizes.vision.feature_size:
        raise vision.error("vision_output_dim", f"but the maps have {sizes.vision.feature_size} channels together")
    return sizes


def _vision(vision: _Section) -> VisionConfig:
    vision.require("hidden_act", "gelu", "gelu")
    vision.require("num_channels", 3, 3)
    tiles = vision.integer("max_num_tiles", 4)
    if tiles > _MAX_TILES:
        raise vision.error("max_num_tiles", f"should be at most {_MAX_TILES}")
    heads = "attention_heads" if "attention_heads" in vision.content else "num_attention_heads"
    return VisionConfig(
        hidden_size=vision.integer("hidden_size", 1280),
        local_layers=vision.integer("num_hidden_layers", 32),
        global_layers=vision.integer("num_global_layers", 8, least=0),
        attention_heads=vision.integer(heads, 16),
        mlp_size=vision.integer("intermediate_size", 5120),
        patch_size=vision.integer("patch_size", 14),
        image_size=vision.integer("image_size", 448),
        max_tiles=tiles,
        aspect_ratios=len(vision.items("supported_aspect_ratios") or _tilings(tiles)),
        intermediate_layers=vision.integers("intermediate_layers_indices", [3, 7, 15, 23, 30]),
        norm_eps=vision.number("norm_eps", 1e-5),
    )


def _text(text: _Section) -> TextConfig:
    text.require("hidden_act", "silu", "silu")
    text.require("tie_word_embeddings", False, False)
    theta, scaling = _rope(text)
    return TextConfig(
        vocabulary_size=text.integer("vocab_size", 128256),
        extra_embedding_rows=EXTRA_ROWS,
        hidden_size=text.integer("hidden_size", 4096),
        layers=text.integer("num_hidden_layers", 40),
        cross_layers=text.integers("cross_attention_layers", [3, 8, 13, 18, 23, 28, 33, 38]),
        attention_heads=text.integer("num_attention_heads", 32),
        key_value_heads=text.integer("num_key_value_heads", 8),
        mlp_size=text.integer("intermediate_size", 14336),
        norm_eps=text.number("rms_norm_eps", 1e-5),
        rope_theta=theta,
        rope_scaling=scaling,
    )


def _rope(text: _Section) -> tuple[float, RopeScaling | None]:
    """Base and scaling: up to transformers 4 as rope_theta and rope_scaling, from 5 on together as rope_parameters."""
    name = "rope_parameters" if text.content.get("rope_parameters") else "rope_scaling"
    if not text.content.get(name):
        return text.number("rope_theta", 500000.0), None
    rope = text.part(name)
    theta = rope.number("rope_theta", text.number("rope_theta", 500000.0))
    kind = rope.content.get("rope_type", rope.content.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise text.error(name, "but only the rope types default and llama3 exist here")
    scaling = RopeScaling(
        rope.number("factor"),
        rope.number("low_freq_factor"),
        rope.number("high_freq_factor"),
        rope.integer("original_max_position_embeddings"),
    )
    return theta, scaling


def _tilings(tiles: int) -> list[list[int]]:
    """Every [width, height] of at most `tiles` tiles, in the order of their aspect-ratio ids from 1 on."""
    sides = range(1, tiles + 1)
    return [[width, height] for width in sides for height in sides if width * height <= tiles]


def _pool(vision: _Section) -> str:
    mode = vision.content.get("merge_mode", "average")
    if mode is not None and (not isinstance(mode, str) or mode not in _POOLS):
        raise vision.error("merge_mode", "but patches can be pooled by average or max, or not at all (null)")
    return _POOLS[mode]


def config_json(sizes: ModelConfig, special: SpecialTokens, dtype: torch.dtype) -> dict[str, Any]:
    """config.json for a model of these sizes, read alike by transformers 4.46 and 5.

    With a video addition on, the class is the reference's and its keys are added; what transformers' own Mllama would
    ignore of them is all that tells the two apart.
    """
    vision, text = sizes.vision, sizes.text
    scaling = text.rope_scaling
    tilings = _tilings(vision.max_tiles)
    # Their number is what the tables have rows for; what an id beyond the usual ones stands for is not known here.
    tilings = (tilings + [[1, 1]] * vision.aspect_ratios)[: vision.aspect_ratios]
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    content: dict[str, Any] = {
        "architectures": [PLAIN_CLASS if is_plain(sizes) else VIDEO_CLASS],
        "model_type": "mllama",
        "image_token_index": special.anchor,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "text_config": {
            "model_type": "mllama_text_model",
            "vocab_size": text.vocabulary_size,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.layers,
            "cross_attention_layers": list(text.cross_layers),
            "num_attention_heads": text.attention_heads,
            "num_key_value_heads": text.key_value_heads,
            "intermediate_size": text.mlp_size,
            "hidden_act": "silu",
            "rms_norm_eps": text.norm_eps,
            "rope_theta": text.rope_theta,
            "rope_scaling": rope,
            "max_position_embeddings": _MAX_POSITIONS,
            "tie_word_embeddings": False,
            "bos_token_id": special.begin_of_text,
            "eos_token_id": [special.end_of_text, special.end_of_turn],
            "pad_token_id": special.padding,
        },
        "vision_config": {
            "model_type": "mllama_vision_model",
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.local_layers,
            "num_global_layers": vision.global_layers,
            "attention_heads": vision.attention_heads,
            "intermediate_size": vision.mlp_size,
            "hidden_act": "gelu",
            "num_channels": 3,
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
            "max_num_tiles": vision.max_tiles,
            "supported_aspect_ratios": tilings,
            "intermediate_layers_indices": list(vision.intermediate_layers),
            "vision_output_dim": vision.feature_size,
            "norm_eps": vision.norm_eps,
        },
    }
    if not is_plain(sizes):
        pool = {ours: theirs for theirs, ours in _POOLS.items()}[sizes.pool]
        content["vision_config"] |= {"merge_mode": pool, "merge_size": sizes.pool_stride if pool else None}
        content[OWN_KEY] = {"cross_rope": sizes.cross_rope, "full_attention": vision.full_attention}
    return content


def size_differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """Every size of tower and decoder in which `ours` differs from `theirs`, which a config.json gave. The video
    additions are not sizes."""
    differences = []
    for part in ("vision", "text"):
        own, other = asdict(getattr(ours, part)), asdict(getattr(theirs, part))
        differences += [
            f"model.{part}.{name} is {value!r}, {CONFIG} says {other[name]!r}"
            for name, value in own.items()
            if value != other[name] and name != "full_attention"
        ]
    return differences
