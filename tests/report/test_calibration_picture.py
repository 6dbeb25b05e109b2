"""The calibration picture: what is summed, and when it is drawn."""

import pytest

from moss_train.report.calibration import calibration_curves, calibration_error, calibration_points
from moss_train.report.metrics_file import MetricsRow


def row(step: int, **bins: tuple[float, float, float]) -> MetricsRow:
    """A row with the sums (count, expected, spoken) of some bins."""
    metrics = {"loss": 1.0, "calibration/error": 0.1}
    for name, sums in bins.items():
        named = zip(("count", "expected", "spoken"), sums, strict=True)
        metrics |= {f"calibration/{name}/{field}": value for field, value in named}
    return MetricsRow("realtime", step, 20, 0.0, metrics)


def test_the_end_of_a_stage_is_summed_before_it_is_divided():
    rows = [row(step, bin_0=(9, 9, 9)) for step in range(1, 19)]
    rows += [row(19, bin_0=(3, 0.3, 0), bin_9=(1, 0.9, 1)), row(20, bin_0=(1, 0.1, 1))]
    points = calibration_points(rows, "calibration/")
    assert [pytest.approx(point) for point in points] == [(0.1, 0.25, 4), (0.9, 1.0, 1)]
    assert calibration_error(points) == pytest.approx((4 * 0.15 + 1 * 0.1) / 5)


def test_a_stage_that_decides_is_drawn_and_others_are_not():
    silent = MetricsRow("align", 1, 1, 0.0, {"loss": 2.0})
    assert calibration_curves([silent]) == ""
    assert calibration_curves([silent, row(1, bin_2=(4, 1.0, 1))]).startswith("<svg")
