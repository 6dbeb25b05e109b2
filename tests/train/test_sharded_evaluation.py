"""Evaluation in the loop, shared out among processes: the same figures in every layout, on every process."""

import math

import pytest
from evaluation_jobs import evaluate
from small_runs import SMALL

from moss_train.bench.equivalence.ranks import Ranks
from moss_train.evaluate.metrics import figure_names

SIZES = [
    "model.text.key_value_heads=2", "model.text.layers=4", "model.text.cross_layers=[1,3]", "model.initial_gate=0.5",
]  # fmt: skip
ALONE = ["~stages.align", "~stages.temporal", "~stages.sft", "stages.realtime.init=scratch"]
LAYOUTS = {
    "dp2": [],
    "tp2": ["layout.tp=2"],
    "pp2": ["layout.pp=2"],
    "cp2": ["layout.cp=2"],
    "zero3": ["engine=deepspeed", "layout.zero=3"],
}


@pytest.fixture(scope="module")
def overrides(packed):
    """Three streams and three conversations, so that the shares are uneven."""
    return [
        "recipe=quickstart", *SMALL, *SIZES, *ALONE, "evaluate.during_training=3", "evaluate.settings.answer_tokens=4",
        f"evaluate.source={packed / 'heldout' / 'realtime'}", f"evaluate.offline_source={packed / 'train' / 'sft'}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def alone(overrides, ranks):
    """The figures on one process."""
    (((figures, again), _),) = ranks.run(1, evaluate, overrides, 2)
    assert_same(again, figures)
    return figures


def assert_same(found, expected):
    timed = {name for name in expected if name.endswith("evaluation_seconds")}
    assert found.keys() == expected.keys() and len(timed) == 2
    for name in expected.keys() - timed:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, nan_ok=True), name


def test_one_process_measures_everything(alone):
    assert set(figure_names()) <= set(alone)
    assert alone["n_streams"] == alone["teacher_forced/n_streams"] == 3 and alone["n_offline"] >= 3
    assert 0 < alone["speak_recall"] and math.isfinite(alone["teacher_forced/lm_ppl"])
    assert math.isfinite(alone["offline_accuracy"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_measures_the_same(overrides, ranks, alone, layout):
    for (figures,), beats in ranks.run(2, evaluate, [*overrides, *LAYOUTS[layout]]):
        assert_same(figures, alone)
        assert beats > 20 or layout in ("tp2", "pp2")  # there one process evaluates, the other waits for it


def test_a_process_without_streams_waits_and_knows_the_figures(overrides, ranks):
    one = [*overrides, "evaluate.during_training=1"]
    (((alone,), _),) = ranks.run(1, evaluate, one)
    for (figures,), _ in ranks.run(2, evaluate, one):
        assert_same(figures, alone)
        assert figures["n_streams"] == 1
