"""Means and spreads of the runs of `bench behaviour`, what each removed piece costs, and the verdict."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from moss_train.bench.behaving.variants import (
    FIGURES,
    FULL,
    GAP_FIGURES,
    LEAST,
    MOST,
    MOST_OFFLINE_LOST,
    MOST_SYNTH_GAP,
    SYNTH,
    VARIANTS,
)

Rows = Mapping[tuple[int, str], dict[str, Any]]
#: figures of which less is better
_LESS_IS_BETTER = {"revision_delay_frames", "false_revision_rate"}


def values(rows: Rows, variant: str, figure: str) -> list[float]:
    """The figure of every seed that has it, seeds ascending."""
    found = [row["figures"].get(figure) for (_, name), row in sorted(rows.items()) if name == variant]
    return [float(value) for value in found if value is not None and math.isfinite(value)]


def summary(rows: Rows, names: list[str], targets: bool = True) -> dict[str, Any]:
    """The last line of the verb; without `targets` it is ok whatever the figures are."""
    figures: dict[str, float] = {}
    for name in names:
        for figure in FIGURES:
            found = values(rows, name, figure)
            if found:
                figures[f"{name}.{figure}"] = round(statistics.fmean(found), 5)
                figures[f"{name}.{figure}.std"] = round(statistics.stdev(found), 5) if len(found) > 1 else 0.0
    failures: list[str] = []
    gap = synth_gap(figures)
    if gap is not None:
        figures["synth_gap"] = gap
    lost = offline_lost(figures)
    if lost is not None:
        figures["offline_lost"] = lost
    figures["seeds"] = len({seed for seed, _ in rows})
    if targets:
        failures = _missed(figures)
    return {"name": "bench behaviour", "ok": not failures, "figures": figures, "failures": failures}


def synth_gap(figures: Mapping[str, float]) -> float | None:
    """By how much the model of synthesised streams lies below that of rendered ground truth: the largest difference of
    the mean `GAP_FIGURES`, as a fraction (0.05 = 5 points); None unless both were trained."""
    pairs = [(figures.get(f"{FULL.name}.{name}"), figures.get(f"{SYNTH.name}.{name}")) for name in GAP_FIGURES]
    if any(full is None or synth is None for full, synth in pairs):
        return None
    return round(max(full - synth for full, synth in pairs), 5)


def offline_lost(figures: Mapping[str, float]) -> float | None:
    """Offline accuracy before the real-time stage minus that after it; None unless both were measured."""
    before, after = figures.get("no_realtime.offline_accuracy"), figures.get(f"{FULL.name}.offline_accuracy")
    return None if before is None or after is None else round(before - after, 5)


def _missed(figures: Mapping[str, float]) -> list[str]:
    failures = []
    for bounds, word, sign in ((LEAST, "below", 1), (MOST, "above", -1)):
        for name, bound in bounds.items():
            value = figures.get(f"{FULL.name}.{name}")
            if value is None:
                failures.append(f"{FULL.name}.{name} was not measured")
            elif sign * value < sign * bound:
                failures.append(f"{FULL.name}.{name} is {value:.4f}, {word} {bound}")
    for name, bound in (("offline_lost", MOST_OFFLINE_LOST), ("synth_gap", MOST_SYNTH_GAP)):
        if name in figures and figures[name] > bound:
            failures.append(f"{name} is {figures[name]:.4f}, above {bound}")
    return failures


def cost(figures: Mapping[str, float], name: str) -> str:
    """What taking a piece away costs, in words: each figure that becomes worse by more than both spreads together."""
    told = []
    for figure in FIGURES:
        keys = [f"{variant}.{figure}" for variant in (FULL.name, name)]
        if not all(key in figures for key in keys):
            continue
        full, without = (figures[key] for key in keys)
        worse = (without - full) if figure in _LESS_IS_BETTER else (full - without)
        spread = sum(figures[f"{key}.std"] for key in keys)
        if worse > max(spread, 0.005):
            told.append(f"{figure} {without - full:+.3f}")
    return ", ".join(told) or "nothing"


def table_of(rows: Rows, names: list[str]) -> Table:
    """A line a variant: mean ± standard deviation over the seeds, and what it costs."""
    figures = summary(rows, names)["figures"]
    table = Table(title="the real-time stage with one piece taken away, on held-out streams")
    table.add_column("variant")
    for figure in FIGURES:
        table.add_column(figure.replace("_", " "), justify="right")
    table.add_column("s", justify="right")
    table.add_column("costs")
    for name in names:
        cells = []
        for figure in FIGURES:
            mean = figures.get(f"{name}.{figure}")
            cells.append("–" if mean is None else f"{mean:.3f} ± {figures[f'{name}.{figure}.std']:.3f}")
        spent = [row["training_s"] for (_, variant), row in rows.items() if variant == name]
        seconds = f"{statistics.fmean(spent):.0f}" if spent and VARIANTS[name].trains else "–"
        table.add_row(name, *cells, seconds, "" if name == FULL.name else cost(figures, name))
    return table
