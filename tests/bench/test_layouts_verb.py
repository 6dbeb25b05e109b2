"""`bench layouts`: a line a layout, the summary last, and a verdict that follows from it."""

import json

import pytest

from moss_train.bench import layouts
from moss_train.bench.equivalence.cases import described
from moss_train.bench.equivalence.compare import Comparison
from moss_train.bench.equivalence.ranks import JobError
from moss_train.cli import main
from moss_train.errors import ConfigError


def run(capsys, *arguments: str) -> tuple[int, list[dict]]:
    code = main(["bench", "layouts", *arguments])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_two_layouts_agree_with_one_process(capsys):
    code, lines = run(capsys, "samples=2", "ranks=2", "seed=3")
    assert code == 0
    assert [line["ok"] for line in lines[:-1]] == [True, True]
    summary = lines[-1]
    assert (summary["name"], summary["ok"], summary["failures"]) == ("bench layouts", True, [])
    figures = summary["figures"]
    assert (figures["layouts"], figures["failures"]) == (2, 0)
    assert 0 <= figures["worst_loss"] <= 1e-5
    assert 0 <= figures["worst_gradient"] <= 5e-5
    assert 0 <= figures["worst_weight"] <= 1e-4


def answered(monkeypatch, *answers):
    """Let the comparisons give `answers` in turn, without training anything."""
    given = iter(answers)

    def compare(self, case, **options):
        answer = next(given)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(layouts.Comparer, "compare", compare)


def test_one_failure_among_many_fails_the_run_and_is_told(capsys, monkeypatch):
    bad = Comparison(loss=1.0, failures=["loss of step 0 deviates by 1, more than 1e-05"])
    answered(monkeypatch, Comparison(), bad, JobError("a job failed on rank 1"), Comparison())
    code, lines = run(capsys, "samples=4")
    assert code == 1
    assert [line["ok"] for line in lines] == [True, False, False, True, False]
    assert lines[-1]["figures"]["failures"] == 2
    assert "loss of step 0" in lines[-1]["failures"][0]
    assert "rank 1" in lines[-1]["failures"][1]


def test_a_number_that_is_none_is_kept_as_the_worst(capsys, monkeypatch):
    nan = Comparison(loss=float("nan"), gradient=2.0, failures=["loss of step 0 deviates by nan"])
    answered(monkeypatch, Comparison(loss=0.1), nan, Comparison(loss=0.5))
    case = json.dumps({"layout": {"dp": 2}})
    monkeypatch.setattr(layouts, "_cases", lambda options: [described(json.loads(case))] * 3)
    code, lines = run(capsys)
    assert code == 1
    assert lines[1]["loss"] is lines[-1]["figures"]["worst_loss"] is None
    assert lines[-1]["figures"]["worst_gradient"] == 2.0


def test_the_same_seed_draws_the_same_layouts():
    options = layouts.LayoutsOptions(samples=5, seed=7)
    assert layouts._cases(options) == layouts._cases(options) != layouts._cases(layouts.LayoutsOptions(samples=5))


def test_cases_of_deepspeed_have_every_stage_and_are_accepted():
    cases = layouts._cases(layouts.LayoutsOptions(samples=40, seed=2, engine="deepspeed"))
    assert {case.engine_name for case in cases} == {"deepspeed"}
    assert {case.layout.zero for case in cases} == {0, 1, 2, 3}
    assert {case.layout.tp for case in cases} == {1, 2} == {case.layout.sp + 1 for case in cases}
    for case in cases:
        case.check()


def test_the_engine_is_drawn_or_chosen():
    def engines(engine: str) -> set[str]:
        return {case.engine_name for case in layouts._cases(layouts.LayoutsOptions(samples=12, engine=engine))}

    assert engines("both") == {"megatron", "deepspeed"}
    assert engines("megatron") == {"megatron"}


def test_a_printed_case_can_be_tried_again():
    case = layouts._cases(layouts.LayoutsOptions(samples=1, seed=5))[0]
    assert layouts._cases(layouts.LayoutsOptions(case=json.dumps(case.describe()))) == [case]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0"),
        ({"ranks": 0}, "ranks=0"),
        ({"seed": -1}, "seed=-1"),
        ({"engine": "torch"}, "engine=torch"),
        ({"deadline_s": 0.0}, "deadline_s=0.0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        layouts.LayoutsOptions(**options).validate()


def test_a_case_that_is_not_json_is_refused():
    with pytest.raises(ConfigError, match="is not JSON"):
        layouts._cases(layouts.LayoutsOptions(case="tp=2"))
