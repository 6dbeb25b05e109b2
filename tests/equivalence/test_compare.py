"""What the comparison refuses, on outcomes made by hand; and how cases are written, read and drawn."""

import copy
import math

import numpy as np
import pytest
import torch

from moss_train.bench.equivalence.cases import Case, Problem, described
from moss_train.bench.equivalence.compare import FLOOR, compare
from moss_train.bench.equivalence.drawing import draw_case
from moss_train.bench.equivalence.outcome import MOMENTS, Figures, Outcome
from moss_train.errors import ConfigError
from moss_train.parallel.config import LayoutConfig

CASE = Case()


def outcome() -> Outcome:
    """One trained matrix that moves by a hundredth, one frozen one."""
    generator = torch.Generator().manual_seed(0)
    trained, frozen, step = (torch.randn(4, 4, generator=generator) for _ in range(3))
    tensors = {moment: {"trained": trained.clone(), "frozen": frozen.clone()} for moment in MOMENTS}
    tensors["first"]["trained"] += 0.01 * step
    tensors["last"]["trained"] += 0.05 * step
    tensors["gradient"] = {"trained": step.clone()}
    return Outcome([Figures(2.0, 1.0, {"text": 2.0}, {"text": 3})] * 2, ["trained"], tensors)


def changed(change) -> Outcome:
    other = copy.deepcopy(outcome())
    change(other)
    return other


def test_an_outcome_equals_itself():
    comparison = compare(CASE, outcome(), outcome())
    assert comparison.ok and comparison.share_of_tolerance == 0.0


def scale(moment: str, factor: float):
    return lambda other: other.tensors[moment]["trained"].mul_(factor)


def move(moment: str, by: float):
    """Along what the weight moved."""

    def change(other):
        tensors = other.tensors
        tensors[moment]["trained"] += by * (tensors[moment]["trained"] - tensors["start"]["trained"])

    return change


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        (lambda other: other.tensors["gradient"].clear(), "gradient: lacks trained"),
        (lambda other: other.tensors["last"].pop("frozen"), "last: lacks frozen"),
        (lambda other: other.tensors["first"].update(new=torch.zeros(1)), "first: has beyond the reference new"),
        (lambda other: other.tensors["last"].update(trained=torch.zeros(2)), "last: has other shapes of trained"),
        (lambda other: other.steps.pop(), "1 steps instead of 2"),
        (lambda other: other.tensors["last"]["frozen"].add_(1e-6), "frozen is frozen, but was changed"),
        (lambda other: other.tensors["fresh"]["trained"].mul_(1 + 1e-6), "trained: the fresh weight is another"),
        (lambda other: other.tensors["start"]["frozen"].mul_(1 + 1e-6), "frozen is not what was loaded"),
        (scale("gradient", 1 + 6e-5), "gradient of trained deviates by 6"),
        (scale("gradient", math.nan), "gradient of trained deviates by nan"),
        (move("first", 2e-4), "trained after one step deviates by 0.0002"),
        (move("last", 2e-4), "trained after all steps deviates by 0.0002"),
    ],
)
def test_what_differs_is_a_failure(change, failure):
    failures = compare(CASE, changed(change), outcome()).failures
    assert any(text.startswith(failure) for text in failures), failures


@pytest.mark.parametrize("change", [scale("gradient", 1 + 4e-5), move("first", 5e-5), move("last", 5e-5)])
def test_what_rounding_explains_is_none(change):
    assert compare(CASE, changed(change), outcome()).ok


@pytest.mark.parametrize(
    ("figures", "failure"),
    [
        (Figures(2.0 * (1 + 2e-5), 1.0, {"text": 2.0}, {"text": 3}), "loss of step 0"),
        (Figures(math.nan, 1.0, {"text": 2.0}, {"text": 3}), "loss of step 0 deviates by nan"),
        (Figures(2.0, 1.0 + 1e-4, {"text": 2.0}, {"text": 3}), "gradient norm of step 0"),
        (Figures(2.0, 1.0, {"text": 2.1}, {"text": 3}), "loss of text in step 0"),
        (Figures(2.0, 1.0, {}, {"text": 3}), "loss of text in step 0 deviates by nan"),
        (Figures(2.0, 1.0, {"text": 2.0}, {"text": 4}), "step 0 trained {'text': 4} labels"),
    ],
)
def test_figures_that_differ_are_a_failure(figures, failure):
    other = outcome()
    other.steps = [figures, other.steps[1]]
    failures = compare(CASE, other, outcome()).failures
    assert any(text.startswith(failure) for text in failures), failures


def test_a_small_gradient_is_held_to_a_part_of_the_whole():
    expected = outcome()
    expected.tensors["gradient"]["frozen"] = torch.full((4, 4), 1e-9)  # both are trained here
    found = copy.deepcopy(expected)
    found.tensors["gradient"]["frozen"] *= 2
    size = float(expected.tensors["gradient"]["frozen"].norm())
    whole = float(expected.tensors["gradient"]["trained"].norm())
    assert compare(CASE, found, expected).gradient == pytest.approx(size / (FLOOR * whole), rel=1e-4)


def test_a_case_is_read_back_from_its_description():
    rng = np.random.default_rng(0)
    for _ in range(20):
        case = draw_case(rng, ranks=8)
        assert described(case.describe()) == case


def test_drawn_cases_are_legal_and_of_many_forms():
    rng = np.random.default_rng(1)
    cases = [draw_case(rng, ranks=4) for _ in range(60)]
    for case in cases:
        case.check()
    assert {case.world_size for case in cases} == {1, 2, 4}
    for name in ("tp", "pp", "vpp", "cp", "zero", "sp", "dp"):
        assert len({getattr(case.layout, name) for case in cases}) > 1, name
    assert any(0 in (case.layout.pipeline_split or []) for case in cases)


@pytest.mark.parametrize(
    "case", [Case(layout=LayoutConfig(tp=3)), Case(Problem(optimizer="sgd"), LayoutConfig(zero=1))]
)
def test_what_training_would_refuse_is_no_case(case):
    with pytest.raises(ConfigError, match=r"layout\."):
        case.check()


def test_a_description_with_an_unknown_field_is_refused():
    with pytest.raises(ConfigError, match=r"case\.layout\.tpp: there is no such field"):
        described({"layout": {"tpp": 2}})
