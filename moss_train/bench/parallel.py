"""`moss-train bench parallel`: what each layout costs on a CPU, on the `bench` model: time, bytes sent, memory.

`bench/names.py` says how layouts are named.
"""

import json
import sys
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from moss_train.bench.against_one import BYTES_TOLERANCE, MB, AgainstOne, bytes_error
from moss_train.bench.equivalence.ranks import Ranks
from moss_train.bench.names import ONE, model_of, named_layout
from moss_train.bench.one_layout import RankFigures, Work
from moss_train.bench.work_options import WorkOptions
from moss_train.model.config import ModelConfig, RecomputeConfig
from moss_train.model.layout_rules import check_layout

LAYOUTS = [
    "dp2", "dp2+zero1", "tp2", "tp2+sp", "pp2", "pp2+frames_tp", "pp2+vpp2", "cp2", "tp2+pp2",
    "recompute_selective", "recompute_layers", "recompute_tower",
]  # fmt: skip
_WIDTH = 140  #: columns of the table where it goes to a file


@dataclass
class ParallelOptions(WorkOptions):
    """Which layouts, and how much work."""

    layouts: list[str] = field(default_factory=lambda: list(LAYOUTS))
    """Names such as tp2+sp or pp2+vpp2: degrees tp pp vpp cp dp zero, and the words sp, frames_tp, frames_all,
    recompute_selective, recompute_layers, recompute_tower."""
    model: str = "bench"
    """Sizes, a file of recipes/model."""

    def validate(self) -> None:
        """Raise ConfigError for the first field that cannot be."""
        super().validate()
        for name in self.layouts:
            layout, _ = named_layout(name)
            self.require_even(name, layout)


def parallel_command(options: ParallelOptions) -> int:
    """Train some steps in each layout, each on processes of its own, and compare them with one process.

    Every rank counts its live tensor bytes and what it sends in the first step; the bytes must equal the formula's.
    The steps after it are timed, with steps of one process before and after each layout. The last line on standard
    output is JSON; exit code 0 when nothing failed.
    """
    model = model_of(options.model)
    works = {name: _work(name, model, options) for name in options.layouts}
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else _WIDTH)
    ratios: dict[str, float] = {}
    with Ranks(max([1, *(work.ranks for work in works.values())])) as ranks:
        against_one = AgainstOne(ranks, _work(ONE, model, options), options.steps)
        measured = {ONE: against_one.figures_of_one}
        for name, work in works.items():
            measured[name], ratios[name] = against_one.measure(work)
            console.print(f"{name}: {ratios[name]:.2f} of one process's step time", highlight=False)
    result = judge(measured, ratios)
    console.print(_table(measured, ratios))
    print(json.dumps(result))
    return 0 if result["ok"] else 1


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
        figures[f"{name}.peak_memory_mb"] = max(one.peak_memory for one in ranks) / MB
        figures[f"{name}.activation_mb"] = _activations(ranks) / MB
        figures[f"{name}.rss_mb"] = max(one.memory.rss for one in ranks) / MB
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
            failures.append(f"{name}.activation_mb: {_activations(ranks) / MB:.1f}, one process has {whole / MB:.1f}")
    return {"name": "bench parallel", "ok": not failures, "figures": figures, "failures": failures}


def by_kind(of_ranks: list[dict[str, float]]) -> dict[str, float]:
    """Sums over ranks."""
    return {kind: sum(one.get(kind, 0.0) for one in of_ranks) for kind in sorted({k for one in of_ranks for k in one})}


def _work(name: str, model: ModelConfig, options: ParallelOptions) -> Work:
    layout, recompute = named_layout(name)
    work = options.work(model, layout, recompute)
    check_layout(model, layout, work.ranks)
    return work


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
            f"{max(one.peak_memory for one in ranks) / MB:.0f}",
            f"{_activations(ranks) / MB:.0f}",
            f"{max(one.memory.rss for one in ranks) / MB:.0f}",
            f"{sum(kinds.values()) / MB:.2f}",
            ", ".join(f"{kind} {size / MB:.3g}" for kind, size in kinds.items() if size >= 1e3),
        )
    return table
