"""Bytes sent equal the formula's in every kind of layout; memory falls where it must; the verb and its verdict."""

import dataclasses
import json

import pytest

from moss_train.bench import parallel
from moss_train.bench.against_one import bytes_error
from moss_train.bench.equivalence.cases import Problem
from moss_train.bench.equivalence.ranks import Ranks
from moss_train.bench.names import ONE, named_layout
from moss_train.bench.one_layout import Shape, Work, measure
from moss_train.bench.parallel import by_kind, judge
from moss_train.bench.predicted import held_parameters
from moss_train.cli import main
from moss_train.cli_options import parse_options
from moss_train.errors import ConfigError
from moss_train.model.build import build_model
from moss_train.model.config import RecomputeConfig
from moss_train.model.groups import parameter_groups
from moss_train.parallel import groups
from moss_train.parallel.config import LayoutConfig

MODEL = Problem(pieces=True).model()  # with a decision head
#: Unequal microbatches, an odd number of tokens, fewer frames than shares, and text alone.
SHAPES = (Shape(1, 3, 8), Shape(2, 1, 9), Shape(1, 0, 11), Shape(1, 2, 7))
#: Layout and what is trained; together they meet every term of the formula.
CASES = [
    ("dp2", "all"),
    ("dp2+cp2+zero1", "all"),
    ("tp2", "all"),
    ("tp2+sp+recompute_layers", "all"),
    ("tp2+sp", "projector_only"),
    ("tp2+pp2+zero1+recompute_selective", "vision_projector_xattn"),
    ("pp2+frames_tp", "language_model"),
    ("pp2+vpp2", "all"),
    ("pp4", "projector_only"),
    ("cp2+recompute_selective", "all"),
    ("tp2+cp2+recompute_layers", "projector_xattn"),
    ("tp2+sp+pp2+frames_tp", "all"),
]


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4) as processes:
        yield processes


def work(name: str, trainable: str = "all", shapes: tuple[Shape, ...] = SHAPES) -> Work:
    layout, recompute = named_layout(name)
    return Work(MODEL, layout, shapes, recompute, trainable)


def measured(ranks: Ranks, one: Work):
    return ranks.run(one.ranks, measure, one, 0)


@pytest.mark.parametrize(("name", "trainable"), CASES)
def test_bytes_sent_equal_the_formula(ranks, name, trainable):
    figures = measured(ranks, work(name, trainable))
    assert sum(sum(one.sent.values()) for one in figures) > 0
    for rank, one in enumerate(figures):
        assert one.sent == pytest.approx(one.predicted, rel=1e-9), f"rank {rank}"
        assert "other.all_reduce" not in one.sent


def test_parameters_are_the_model_s_own():
    groups.shutdown()
    state = groups.initialize(LayoutConfig())
    try:
        model = build_model(MODEL, state, seed=0)
    finally:
        groups.shutdown()
    group_of = parameter_groups(model)
    real = sorted((group_of[name], parameter.numel()) for name, parameter in model.named_parameters())
    assert sorted((one.group, one.size) for one in held_parameters(MODEL, model.part, LayoutConfig())) == real


#: Many vision tokens, little text, few logits: what the frames leave behind is most of all.
LONG_MODEL = dataclasses.replace(
    MODEL,
    pool="none",
    vision=dataclasses.replace(MODEL.vision, image_size=56),
    text=dataclasses.replace(MODEL.text, vocabulary_size=64),
)
LONG = (Shape(1, 8, 2),)


def activations(ranks: Ranks, name: str, trainable: str) -> int:
    one = dataclasses.replace(work(name, trainable, LONG), model=LONG_MODEL)
    return max(figures.memory.activations for figures in measured(ranks, one))


def test_activations_fall_with_the_frames_held_and_with_recomputation(ranks):
    # With a frozen tower, keys and values of the cross layers are what frames leave behind.
    one = activations(ranks, ONE, "projector_xattn")
    assert activations(ranks, "cp2", "projector_xattn") < 0.75 * one
    whole = activations(ranks, ONE, "all")
    assert activations(ranks, "cp2", "all") < 0.65 * whole
    assert activations(ranks, "tp2", "all") < 0.65 * whole
    for recompute in ("recompute_selective", "recompute_layers", "recompute_tower"):
        assert activations(ranks, recompute, "all") < 0.95 * whole, recompute


def test_sharded_optimizer_state_takes_half(ranks):
    plain, sharded = (measured(ranks, work(name))[0] for name in ("dp2", "dp2+zero1"))
    weights = plain.sent["data.all_reduce"]  # at two processes, the size of the gradients
    # Of weights, gradients and two moments the moments are halved; buffers are padded a little.
    saved = plain.memory.before - plain.foreign - (sharded.memory.before - sharded.foreign)
    assert saved == pytest.approx(weights, rel=0.05)


def test_names():
    assert named_layout(ONE) == (LayoutConfig(dp=1), RecomputeConfig())
    assert named_layout("tp2+sp+pp2+frames_tp") == (
        LayoutConfig(tp=2, sp=True, pp=2, dp=1, frame_shard="tp"),
        RecomputeConfig(),
    )
    assert named_layout("recompute_layers+recompute_tower") == (
        LayoutConfig(dp=1),
        RecomputeConfig("full", "full", True),
    )
    for name in parallel.LAYOUTS:
        named_layout(name)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["layouts=[tp2+ps]"], "'ps' is no word"),
        (["layouts=[tp4+pp4]"], "16 processes"),
        (["layouts=[sp]"], "layout.sp"),
        (["layouts=[dp2]", "microbatches=3"], "multiple of 2"),
        (["layouts=[pp2+vpp2]", "microbatches=1"], "multiple of 2"),
        (["steps=0"], "steps=0"),
    ],
)
def test_what_cannot_be_is_said_at_once(arguments, expected):
    with pytest.raises(ConfigError, match=expected):
        parse_options(parallel.ParallelOptions, arguments)


def test_the_verdict(ranks):
    found = {name: measured(ranks, work(name)) for name in (ONE, "tp2", "recompute_layers")}
    good = judge(found, {"tp2": 0.6, "recompute_layers": 1.2})
    assert good["ok"] and good["failures"] == []
    figures = good["figures"]
    assert figures["bytes_error"] == 0 and figures["tp2.step_time_ratio"] == 0.6
    assert figures["bytes_per_step"] == figures["tp2.bytes_per_step"] > 0 == figures["one.bytes_per_step"]
    assert figures["tp2.bytes"] == by_kind([one.sent for one in found["tp2"]])

    sent_more = dataclasses.replace(found["tp2"][1], sent=found["tp2"][1].sent | {"tensor.all_reduce": 1.0})
    assert bytes_error(sent_more) > 0.9
    kept_more = dataclasses.replace(
        found["recompute_layers"][0], memory=found[ONE][0].memory, losses=(found[ONE][0].loss + 1e-3,)
    )
    bad = judge(found | {"tp2": [found["tp2"][0], sent_more], "recompute_layers": [kept_more]}, {})
    assert not bad["ok"]
    told = "\n".join(bad["failures"])
    assert "tp2.bytes" in told and "recompute_layers.activation_mb" in told and "recompute_layers.loss" in told


def test_the_verb(capfd):
    assert main(["bench", "parallel", "model=tiny", "layouts=[dp2]", "steps=1", "microbatches=2", "frames=1"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["name"] == "bench parallel" and result["ok"]
    assert result["figures"]["dp2.step_time_ratio"] > 0
    assert result["figures"]["dp2.peak_memory_mb"] > result["figures"]["dp2.activation_mb"] > 0
