"""`moss-train bench parallel`: what each layout costs on a CPU, on the `bench` model: time, bytes sent, memory.

Layouts are named by what differs from one process, joined by `+`: `tp2+sp`, `pp2+vpp2`, `cp2`, `dp2+zero1`,
`pp2+frames_tp`, `recompute_layers+recompute_tower`. `one` is the single process that all are compared with.
"""

import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from moss_train.bench.equivalence.ranks import Ranks
from moss_train.bench.one_layout import RankFigures, Shape, Work, measure, time_only
from moss_train.errors import ConfigError
from moss_train.locations import shipped_directory
from moss_train.model.config import ModelConfig, RecomputeConfig
from moss_train.model.layout_rules import check_layout
from moss_train.parallel.config import LayoutConfig
from moss_train.streams.config import TokenizerConfig
from moss_train.streams.tokenizer import load_tokenizer

ONE = "one"
LAYOUTS = [
    "dp2", "dp2+zero1", "tp2", "tp2+sp", "pp2", "pp2+frames_tp", "pp2+vpp2", "cp2", "tp2+pp2",
    "recompute_selective", "recompute_layers", "recompute_tower",
]  # fmt: skip
BYTES_TOLERANCE = 1e-9  #: relative; both sides are sums of the same integers, divided
_RANKS = 8
_DEADLINE_S = 300.0
_MB = 1e6
_WIDTH = 140  #: columns of the table where it goes to a file

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


@dataclass
class ParallelOptions:
    """Which layouts, and how much work."""

    layouts: list[str] = field(default_factory=lambda: list(LAYOUTS))
    """Names such as tp2+sp or pp2+vpp2: degrees tp pp vpp cp dp zero, and the words sp, frames_tp, frames_all,
    recompute_selective, recompute_layers, recompute_tower."""
    steps: int = 2
    """Timed steps of each layout; as many of one process are timed before and after it."""
    model: str = "bench"
    """Sizes, a file of recipes/model."""
    trainable: str = "all"
    """What is trained: a preset of parameter groups."""
    microbatches: int = 4
    """Microbatches of the global batch; data-parallel processes share them, a pipeline fills up with them."""
    frames: int = 2
    """Frames of a microbatch."""
    tokens_a_frame: int = 16
    """Text tokens for each frame."""

    def validate(self) -> None:
        """Raise ConfigError for the first field that cannot be."""
        for name in ("steps", "microbatches", "tokens_a_frame"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.frames < 0:
            raise ConfigError(f"frames={self.frames}: must be at least 0")
        for name in self.layouts:
            layout, _ = named_layout(name)
            share = layout.dp or 1
            multiple = share * (layout.pp if layout.vpp > 1 else 1)
            if self.microbatches % multiple:
                raise ConfigError(f"microbatches={self.microbatches}: {name} needs a multiple of {multiple}")


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


def parallel_command(options: ParallelOptions) -> int:
    """Train some steps in each layout, each on processes of its own, and compare them with one process.

    Every rank counts its live tensor bytes and what it sends in the first step; the bytes must equal the formula's.
    The steps after it are timed, with steps of one process before and after each layout. The last line on standard
    output is JSON; exit code 0 when nothing failed.
    """
    model = model_of(options.model)
    works = {name: _work(name, model, options) for name in options.layouts}
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else _WIDTH)
    measured: dict[str, list[RankFigures]] = {}
    ratios: dict[str, float] = {}
    with Ranks(max([1, *(work.ranks for work in works.values())])) as ranks:
        one = _work(ONE, model, options)

        def seconds_of_one() -> list[float]:
            return _slowest(ranks.run(1, time_only, one, options.steps, deadline_s=_DEADLINE_S))

        measured[ONE] = ranks.run(1, measure, one, options.steps, deadline_s=_DEADLINE_S)
        before = _seconds(measured[ONE])
        for name, work in works.items():
            measured[name] = ranks.run(work.ranks, measure, work, options.steps, deadline_s=_DEADLINE_S)
            after = seconds_of_one()
            ratios[name] = statistics.median(_seconds(measured[name])) / statistics.median(before + after)
            before = after
            console.print(f"{name}: {ratios[name]:.2f} of one process's step time", highlight=False)
    result = judge(measured, ratios)
    console.print(_table(measured, ratios))
    print(json.dumps(result))
    return 0 if result["ok"] else 1


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


def judge(measured: dict[str, list[RankFigures]], ratios: dict[str, float]) -> dict[str, Any]:
    """The result line: figures by layout, and what must hold of them.

    Bytes sent equal the formula's on every rank; the loss is one process's (relative 1e-5); what the forward pass
    leaves for the backward one is less than on one process wherever frames are shared or something is computed again.
    """
    errors = {name: max(bytes_error(figures) for figures in ranks) for name, ranks in measured.items()}
    totals = {name: sum(sum(figures.sent.values()) for figures in ranks) for name, ranks in measured.items()}
    figures: dict[str, Any] = {"bytes_per_step": max(totals.values()), "bytes_error": max(errors.values())}
    failures = []
    whole = _activations(measured[ONE])
    for name, ranks in measured.items():
        figures[f"{name}.step_time_ratio"] = ratios.get(name, 1.0)
        figures[f"{name}.peak_memory_mb"] = max(one.peak_memory for one in ranks) / _MB
        figures[f"{name}.activation_mb"] = _activations(ranks) / _MB
        figures[f"{name}.rss_mb"] = max(one.memory.rss for one in ranks) / _MB
        figures[f"{name}.bytes_per_step"] = totals[name]
        figures[f"{name}.bytes"] = by_kind([one.sent for one in ranks])
        figures[f"{name}.bytes_predicted"] = by_kind([one.predicted for one in ranks])
        if errors[name] > BYTES_TOLERANCE:
            failures.append(f"{name}.bytes: differ from the formula's by {errors[name]:.3g}")
        expected = measured[ONE][0].loss
        if not all(abs(one.loss - expected) <= 1e-5 * abs(expected) for one in ranks):
            failures.append(f"{name}.loss: {ranks[0].loss} instead of {expected}")
        layout, recompute = named_layout(name)
        saves = layout.cp > 1 or recompute != RecomputeConfig()
        if saves and _activations(ranks) >= whole:
            failures.append(f"{name}.activation_mb: {_activations(ranks) / _MB:.1f}, one process has {whole / _MB:.1f}")
    return {"name": "bench parallel", "ok": not failures, "figures": figures, "failures": failures}


def bytes_error(figures: RankFigures) -> float:
    """Largest relative difference between bytes sent and predicted, over the kinds of one rank."""
    kinds = set(figures.sent) | set(figures.predicted)
    pairs = [(figures.sent.get(kind, 0.0), figures.predicted.get(kind, 0.0)) for kind in kinds]
    return max((abs(sent - told) / max(sent, told) for sent, told in pairs if sent != told), default=0.0)


def by_kind(of_ranks: list[dict[str, float]]) -> dict[str, float]:
    """Sums over ranks."""
    return {kind: sum(one.get(kind, 0.0) for one in of_ranks) for kind in sorted({k for one in of_ranks for k in one})}


def _work(name: str, model: ModelConfig, options: ParallelOptions) -> Work:
    layout, recompute = named_layout(name)
    shape = Shape(rows=1, frames=options.frames, tokens_a_frame=options.tokens_a_frame)
    work = Work(model, layout, (shape,) * options.microbatches, recompute, options.trainable)
    check_layout(model, layout, work.ranks)
    return work


def _seconds(ranks: list[RankFigures]) -> list[float]:
    return _slowest([one.step_seconds for one in ranks])


def _slowest(of_ranks: Sequence[Sequence[float]]) -> list[float]:
    """Each step takes as long as its slowest rank."""
    return [max(step) for step in zip(*of_ranks, strict=True)]


def _activations(ranks: list[RankFigures]) -> int:
    return max(one.memory.activations for one in ranks)


def _table(measured: dict[str, list[RankFigures]], ratios: dict[str, float]) -> Table:
    table = Table(title="memory of the rank that needs most, bytes sent by all ranks in one step; MB = 10⁶ bytes")
    for title in ("layout", "ranks", "time", "peak MB", "activations", "RSS", "sent MB", "by kind"):
        table.add_column(title, justify="left" if title in ("layout", "by kind") else "right")
    for name, ranks in measured.items():
        kinds: dict[str, float] = {}
        for kind, size in by_kind([one.sent for one in ranks]).items():
            family = kind.split(".")[0]
            kinds[family] = kinds.get(family, 0.0) + size
        table.add_row(
            name,
            str(len(ranks)),
            f"{ratios.get(name, 1.0):.2f}",
            f"{max(one.peak_memory for one in ranks) / _MB:.0f}",
            f"{_activations(ranks) / _MB:.0f}",
            f"{max(one.memory.rss for one in ranks) / _MB:.0f}",
            f"{sum(kinds.values()) / _MB:.2f}",
            ", ".join(f"{kind} {size / _MB:.3g}" for kind, size in kinds.items() if size >= 1e3),
        )
    return table
