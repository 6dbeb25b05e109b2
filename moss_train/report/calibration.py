"""Calibration curves of speaking: how often a reply was due where the model gave it so much probability."""

import math
from collections.abc import Sequence

from moss_train.report.curves import STYLE, plain_axis, plt, svg_of
from moss_train.report.metrics_file import MetricsRow
from moss_train.report.palette import INK, MUTED, SLOT_COLOURS

BINS = 10
#: prefix of the bins in a row, its title and colour
_CURVES = {
    "calibration/": ("next token", SLOT_COLOURS["speak"][0]),
    "decision_head/calibration/": ("decision head", SLOT_COLOURS["revise"][0]),
}
_SHARE = 0.1  #: of a stage's rows that are summed, the last ones

Point = tuple[float, float, float]  #: mean P(speak), observed rate, decisions


def calibration_points(rows: Sequence[MetricsRow], prefix: str) -> list[Point]:
    """One point for each bin that is not empty, of the last tenth of `rows`."""
    last = rows[-math.ceil(_SHARE * len(rows)) :] if rows else []
    points = []
    for number in range(BINS):
        sums = [sum(row.metrics.get(f"{prefix}bin_{number}/{name}", 0.0) for row in last)
                for name in ("count", "expected", "spoken")]  # fmt: skip
        if sums[0]:
            points.append((sums[1] / sums[0], sums[2] / sums[0], sums[0]))
    return points


def calibration_error(points: Sequence[Point]) -> float:
    """Σ n_b / n · |mean P(speak) − observed rate|."""
    return sum(count * abs(said - seen) for said, seen, count in points) / sum(count for _, _, count in points)


def calibration_curves(rows: Sequence[MetricsRow]) -> str:
    """The SVG of each stage that decides when to speak, at the end of it; empty when none does."""
    stages = list(dict.fromkeys(row.stage for row in rows if "calibration/error" in row.metrics))
    if not stages:
        return ""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(stages), figsize=(3.4 * len(stages) + 0.4, 3.2), squeeze=False)
        for stage, axis in zip(stages, axes[0], strict=True):
            _draw_stage(axis, stage, [row for row in rows if row.stage == stage])
        axes[0][0].set_ylabel("a reply was due", color=MUTED)
        figure.tight_layout(w_pad=1.5)
        return svg_of(figure)


def _draw_stage(axis, stage: str, rows: Sequence[MetricsRow]) -> None:
    axis.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=":")
    for prefix, (title, colour) in _CURVES.items():
        points = calibration_points(rows, prefix)
        if not points:
            continue
        said, seen, counts = zip(*points, strict=True)
        label = f"{title}: off by {calibration_error(points):.3f}"
        axis.plot(said, seen, color=colour, linewidth=1.2, label=label)
        axis.scatter(said, seen, s=[8 + 60 * math.sqrt(count / sum(counts)) for count in counts], color=colour)
    axis.set_title(stage, color=INK, fontsize=11, fontweight="bold", loc="left")
    axis.set_xlabel("P(speak)", color=MUTED)
    axis.set_xlim(-0.03, 1.03)
    axis.set_ylim(-0.03, 1.03)
    plain_axis(axis)
    axis.legend(frameon=False, fontsize=7.5, labelcolor=MUTED, loc="upper left")
