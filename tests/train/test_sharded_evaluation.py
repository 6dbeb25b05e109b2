"""Evaluation in the loop, shared out among processes: the same figures in every layout, on every process."""

import math

import pytest
from evaluation_jobs import evaluate
from small_runs import SMALL

from moss_train.bench.equivalence.ranks import Ranks
from moss_train.evaluate.metrics import figure_names

SIZES = [
    "model.text.key_value_heads=2", "model.text.layers=4", "model.text.cross_layers=[1,3]", "model.initial_gate=0.5",
    "model.decision_head=true",
]  # fmt: skip
ALONE = ["~stages.align", "~stages.temporal", "~stages.sft", "stages.realtime.init=scratch"]
#: processes, overrides, what is evaluated (who decides, on how many streams), whether on the parts as they are held
LAYOUTS = {
    "dp2+pp2+vpp2, weights gathered late": (
        4,
        [
            "layout.pp=2", "layout.vpp=2", "layout.zero=1",
            "engine.overlap_grad_reduce=true", "engine.overlap_param_gather=true",
        ],
        [("tokens", 3), ("tokens", 1)],
        True,
    ),
    "tp2": (2, ["layout.tp=2"], [("head", 3)], True),
    "pp2 of DeepSpeed": (2, ["engine=deepspeed", "layout.pp=2", "layout.zero=1"], [("tokens", 3)], True),
    "cp2": (2, ["layout.cp=2"], [("tokens", 3)], True),
    "ZeRO 3": (2, ["engine=deepspeed", "layout.zero=3"], [("tokens", 3)], False),
}  # fmt: skip


@pytest.fixture(scope="module")
def overrides(packed):
    """Three streams and three conversations, so that the shares are uneven."""
    return [
        "recipe=quickstart", *SMALL, *SIZES, *ALONE, "evaluate.during_training=3", "evaluate.settings.answer_tokens=4",
        f"evaluate.source={packed / 'heldout' / 'realtime'}", f"evaluate.offline_source={packed / 'train' / 'sft'}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def alone(overrides, ranks):
    """The figures on one process, by who decides and the number of streams."""
    evaluations = [("tokens", 3), ("tokens", 3), ("head", 3), ("tokens", 1)]
    (found,) = ranks.run(1, evaluate, overrides, evaluations)
    assert_same(found.figures[1], found.figures[0])
    assert found.assembled == 0 and found.reads == [6, 6, 6, 6]
    return dict(zip(evaluations, found.figures, strict=True))


def assert_same(found, expected):
    timed = {name for name in expected if name.endswith("evaluation_seconds")}
    assert found.keys() == expected.keys() and len(timed) == 2
    for name in expected.keys() - timed:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, nan_ok=True), name


def test_one_process_measures_everything(alone):
    tokens, head = alone["tokens", 3], alone["head", 3]
    assert set(figure_names()) <= set(tokens)
    assert tokens["n_streams"] == tokens["teacher_forced/n_streams"] == 3 and tokens["n_offline"] >= 3
    assert 0 < tokens["speak_recall"] and math.isfinite(tokens["teacher_forced/lm_ppl"])
    assert math.isfinite(tokens["offline_accuracy"]) and alone["tokens", 1]["n_streams"] == 1
    for name in ("balanced_accuracy", "teacher_forced/balanced_accuracy"):
        assert head[name] != tokens[name], "the head must decide otherwise for this to mean something"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_measures_the_same(overrides, ranks, alone, layout):
    """Also with one stream on two pairs of processes, of which one pair then has nothing to do."""
    count, more, evaluations, as_held = LAYOUTS[layout]
    everyone = ranks.run(count, evaluate, [*overrides, *more], evaluations)
    for found in everyone:
        for figures, evaluation in zip(found.figures, evaluations, strict=True):
            assert_same(figures, alone[evaluation])
        assert found.beats > 20 and found.assembled == (0 if as_held else 1)
    assert sum(found.reads[0] for found in everyone) == 6, "each sample is decoded once"
