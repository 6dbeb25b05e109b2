"""The verdict: thresholds, comparison with weaker models, its file and its table."""

import io
import json
import math

import pytest
from rich.console import Console

from moss_train.report.quickstart import FULL, SMOKE, Requirements, build_report, print_report, write_report

GOOD = {
    "speak_f1": 0.97,
    "silence_f1": 0.99,
    "answer_accuracy": 0.93,
    "revision_accuracy": 0.92,
    "false_revision_rate": 0.02,
    "stale_rate": 0.01,
    "revision_delay_frames": 0.1,
    "n_streams": 300,
    "n_revisions": 120,
    "n_confirmations": 110,
    "n_answers": 130,
}
WEAK = GOOD | {"speak_f1": 0.2, "answer_accuracy": 0.1, "revision_accuracy": 0.0}
RUN = {"seconds": 480.0, "parameters": 1_300_000.0, "trained_tokens": 2e6}


def variants(**changes):
    return {
        "": GOOD | changes,
        "teacher_forced.": GOOD,
        "untrained.": WEAK,
        "without_realtime.": WEAK | {"speak_f1": math.nan},
    }


def test_a_good_run_passes():
    report = build_report(variants(), RUN)
    assert report.ok and report.failures == []
    assert report.name == "quickstart"
    for name in (
        "speak_f1",
        "teacher_forced.speak_f1",
        "untrained.n_streams",
        "without_realtime.stale_rate",
        "seconds",
    ):
        assert name in report.figures


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("speak_f1", 0.949),
        ("silence_f1", 0.949),
        ("answer_accuracy", 0.899),
        ("revision_accuracy", 0.899),
        ("false_revision_rate", 0.051),
        ("n_streams", 255),
        ("n_revisions", 99),
        ("n_confirmations", 99),
        ("n_answers", 99),
        ("speak_f1", math.nan),
        ("false_revision_rate", math.nan),
    ],
)
def test_each_threshold_fails_alone(name, value):
    report = build_report(variants(**{name: value}), RUN)
    assert not report.ok
    assert report.failures[0].startswith(f"{name} is ")
    exact = dict(FULL.at_least) | dict(FULL.at_most)
    assert build_report(variants(**{name: exact[name]}), RUN).ok


@pytest.mark.parametrize(("requirements", "limit"), [(FULL, 600), (SMOKE, 180)])
def test_a_run_that_takes_too_long_fails(requirements, limit):
    assert build_report(variants(), RUN | {"seconds": limit}, requirements).ok
    report = build_report(variants(), RUN | {"seconds": limit + 1}, requirements)
    assert [failure.split()[0] for failure in report.failures] == ["seconds"]


def test_a_weaker_model_that_is_as_good_fails_the_run():
    same = variants()
    same["untrained."] = dict(GOOD)
    report = build_report(same, RUN)
    assert [failure.split()[0] for failure in report.failures] == [
        "untrained.speak_f1",
        "untrained.answer_accuracy",
        "untrained.revision_accuracy",
    ]
    missing = variants()
    del missing["without_realtime."]
    assert not build_report(missing, RUN).ok, "a comparison that was not made is no comparison"


def test_smoke_asks_only_that_it_ran():
    poor = {prefix: dict.fromkeys(GOOD, math.nan) | {"n_streams": 8} for prefix in variants()}
    run = RUN | {"seconds": 100}
    report = build_report(poor, run, SMOKE)
    assert report.ok and report.name == "smoke"
    assert not build_report({"": {}}, run, SMOKE).ok


def test_without_requirements_there_is_no_verdict():
    nothing = Requirements(name="eval", at_least={}, at_most={}, compared=(), compared_with=())
    text = io.StringIO()
    print_report(build_report({"": GOOD}, {}, nothing), nothing, Console(file=text, width=80))
    assert "passed" not in text.getvalue() and "speak F1" in text.getvalue()
    assert not nothing.asked and FULL.asked and SMOKE.asked


def test_file_is_strict_json_in_the_agreed_form(tmp_path):
    path = write_report(build_report(variants(revision_delay_frames=math.nan), RUN), tmp_path / "report.json")
    report = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert set(report) == {"name", "ok", "figures", "failures"}
    assert report["figures"]["revision_delay_frames"] is None
    assert report["figures"]["speak_f1"] == 0.97
    assert list(tmp_path.iterdir()) == [path]


def test_table_fits_a_terminal_and_says_what_failed():
    text = io.StringIO()
    fewer = {"untrained.": WEAK | {"n_streams": 64}}
    report = build_report(variants(speak_f1=0.5) | fewer, RUN)
    assert report.figures["untrained.n_streams"] == 64
    print_report(report, console=Console(file=text, width=80, highlight=False))
    table = text.getvalue()
    for part in (
        "free-",
        "teacher-",
        "untrained",
        "required",
        "≥ 0.95",
        "≤ 0.05",
        "✗ speak_f1 is 0.5",
        "failed",
        "n=300",
        "n=64",
    ):
        assert part in table, part
    assert "…" not in table.replace("… evidence", ""), "a column was cut"
    assert "seconds 480, parameters 1,300,000" in table
