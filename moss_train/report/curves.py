"""Loss curves of every stage, as one picture."""

import io
import math
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")  # no display, in any process
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from moss_train.report.metrics_file import MetricsRow
from moss_train.report.palette import GRID, INK, KIND_COLOURS, MUTED, STAGE_COLOURS

STYLE = {"font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "path"}
KIND_TITLES = {
    "text": "text",
    "onset": "onset",
    "idle_silence": "idle silence",
    "stop_silence": "stop silence",
    "revision": "revision",
}


def loss_curves(rows: Sequence[MetricsRow]) -> str:
    """The SVG of the stages side by side: the loss as measured, smoothed, and by kind where the rows hold it."""
    stages = list(dict.fromkeys(row.stage for row in rows if "loss" in row.metrics))
    if not stages:
        return ""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(stages), figsize=(3.1 * len(stages) + 0.4, 2.9), squeeze=False)
        for index, (stage, axis) in enumerate(zip(stages, axes[0], strict=True)):
            _draw_stage(
                axis, stage, [row for row in rows if row.stage == stage], STAGE_COLOURS[index % len(STAGE_COLOURS)]
            )
            if index == 0:
                axis.set_ylabel("loss", color=MUTED)
        figure.tight_layout(w_pad=1.5)
        return svg_of(figure)


def svg_of(figure) -> str:
    """The figure as an SVG element, closed."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True)
    plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def plain_axis(axis) -> None:
    """A light grid, and no frame."""
    axis.grid(color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(which="both", colors=MUTED, length=0)
    for side in ("top", "right", "left", "bottom"):
        axis.spines[side].set_visible(False)


def _draw_stage(axis, stage: str, rows: Sequence[MetricsRow], colour: str) -> None:
    steps, losses = _series(rows, "loss")
    axis.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
    axis.plot(steps, smoothed(losses), color=colour, linewidth=2.0, label="all", marker=_marker(losses))
    for kind, title in KIND_TITLES.items():
        kind_steps, kind_losses = _series(rows, f"loss/{kind}")
        if len(kind_steps) and len(_kinds(rows)) > 1:
            colour, marker = KIND_COLOURS[kind], _marker(kind_losses)
            axis.plot(kind_steps, smoothed(kind_losses), color=colour, linewidth=1.1, label=title, marker=marker)
    positive = losses[losses > 0]
    if len(positive) and positive.max() / positive.min() > 20:
        axis.set_yscale("log")
    axis.set_title(stage, color=INK, fontsize=11, fontweight="bold", loc="left")
    axis.set_xlabel("step", color=MUTED)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    plain_axis(axis)
    if len(axis.get_lines()) > 2:
        axis.legend(frameon=False, fontsize=7.5, labelcolor=MUTED, loc="upper left", bbox_to_anchor=(1, 1))


def _marker(values: np.ndarray) -> str | None:
    """A dot where there is one value, of which a line shows nothing."""
    return "o" if len(values) == 1 else None


def _kinds(rows: Sequence[MetricsRow]) -> set[str]:
    return {name for row in rows for name in row.metrics if name.startswith("loss/")}


def _series(rows: Sequence[MetricsRow], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row.step, row.metrics[name]) for row in rows if math.isfinite(row.metrics.get(name, math.nan))]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.asarray(steps, dtype=float), np.asarray(values, dtype=float)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Exponential mean over about a thirtieth of the series, corrected for its start."""
    keep = 1.0 - 1.0 / max(1.0, len(values) / 30)
    out = np.empty(len(values))
    total = weight = 0.0
    for index, value in enumerate(values):
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out[index] = total / weight
    return out
