"""Bytes that DeepSpeed sends equal those counted by hand; which setups are tried; the verb and its verdict."""

import dataclasses
import json
import math

import pytest

from moss_train.bench import engines
from moss_train.bench.engines import EnginesOptions, Measured, Setup, judge, setups_of
from moss_train.bench.equivalence.cases import Problem
from moss_train.bench.equivalence.ranks import JobError, Ranks
from moss_train.bench.names import ONE, model_of
from moss_train.bench.one_layout import measure
from moss_train.bench.predicted import held_parameters, parameter_count
from moss_train.bench.zero_sizes import scaled_sizes
from moss_train.cli import main
from moss_train.cli_options import parse_options
from moss_train.engines.config import EngineConfig
from moss_train.engines.engine_rules import check_engine
from moss_train.errors import ConfigError
from moss_train.model.config import RecomputeConfig
from moss_train.model.parts import part_of
from moss_train.parallel.config import LayoutConfig

MODEL = Problem().model()
OPTIONS = EnginesOptions(microbatches=4, frames=1, tokens_a_frame=8)
MICROBATCHES = 2  #: of each of two processes
#: At most so many bytes are padding of ZeRO's groups, flags and norms.
FEW = 256
#: ZeRO 3 gathers a weight where it is used, each time anew, unless it has no more elements than this.
PERSISTENT = 32
EAGER = {
    "stage3_param_persistence_threshold": PERSISTENT,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as processes:
        yield processes


def setup_of(engine: str, zero: int, layout: str = "dp2"):
    options = dataclasses.replace(OPTIONS, engines=[engine], zero=[zero], layouts=[layout])
    (setup,) = setups_of("small", MODEL, options, pytest.fail)
    return setup


def measured(ranks: Ranks, setup, steps: int = 0) -> Measured:
    return Measured(setup, ranks.run(setup.work.ranks, measure, setup.work, steps, 1), 0.5)


def bytes_by_hand(zero: int) -> dict[str, float]:
    """Sent by one of two processes, in a ring: half of what is gathered or scattered, all of what is all-reduced."""
    alone = LayoutConfig()
    sizes = [one.size for one in held_parameters(MODEL, part_of(MODEL, alone, 0), alone)]
    float32 = 4 * sum(sizes)
    if zero < 3:
        # Gradients once a step, with stage 2 once a microbatch; from stage 1 on each process updates half the weights.
        sums = {"all_reduce": float32 * (MICROBATCHES if zero == 2 else 1)}
        return sums | ({"all_gather": float32 / 2} if zero else {})
    whole = [4 * 2 * math.ceil(size / 2) for size in sizes]  # every parameter is cut in halves
    large = sum(one for one, size in zip(whole, sizes, strict=True) if size > PERSISTENT)
    # Forward and backward pass of each microbatch gather weights; small ones are gathered after the update.
    gathered = 2 * MICROBATCHES * large + (sum(whole) - large)
    return {"reduce_scatter": MICROBATCHES * sum(whole) / 2, "all_gather": gathered / 2}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bytes_that_deepspeed_sends_are_those_counted_by_hand(ranks, zero):
    setup = setup_of("deepspeed", zero)
    passed = {"zero_optimization": setup.work.deepspeed["zero_optimization"] | (EAGER if zero == 3 else {})}
    setup = dataclasses.replace(setup, work=dataclasses.replace(setup.work, deepspeed=passed))
    expected = bytes_by_hand(zero)
    for one in measured(ranks, setup).ranks:
        assert not [kind for kind in one.sent if kind.startswith("other")]
        sent = {kind.removeprefix("data."): size for kind, size in one.sent.items() if kind.startswith("data.")}
        for operation in expected.keys() | sent.keys():
            assert sent.get(operation, 0.0) == pytest.approx(expected.get(operation, 0.0), abs=FEW), operation


def test_gradients_that_tensor_parallel_processes_share_are_no_control(ranks):
    (one, _) = measured(ranks, setup_of("deepspeed", 1, "tp2")).ranks
    assert one.sent["shared_gradients.all_reduce"] > 10_000 > one.sent["control.all_reduce"]


def test_setups_are_those_that_the_engines_have():
    told: list[str] = []
    options = EnginesOptions(layouts=["dp2", "tp4"])
    found = [setup.name for setup in setups_of("small", MODEL, options, told.append)]
    assert found == [f"small.megatron.dp2+zero{zero}" for zero in (0, 1)] + [
        f"small.deepspeed.dp2+zero{zero}" for zero in (0, 1, 2, 3)
    ]
    assert "small.megatron.dp2+zero2 is left out: layout.zero=2" in told[0]
    assert sum("layout.tp=4: does not divide" in line for line in told) == 8


def test_deepspeeds_sizes_are_its_own_at_11b_and_legal_for_small_models():
    assert scaled_sizes(10_670_220_835, 3)["zero_optimization"]["reduce_bucket_size"] == 50_000_000
    small = scaled_sizes(100_000_000, 3)
    assert small["zero_optimization"]["reduce_bucket_size"] == 468_594
    assert scaled_sizes(101_858_797, 2)["zero_optimization"]["allgather_bucket_size"] % 2 == 0  # odd ones are refused
    assert small["zero_optimization"]["stage3_param_persistence_threshold"] == pytest.approx(9_681, abs=1)
    check_engine(EngineConfig(name="deepspeed", deepspeed=small), LayoutConfig(dp=2, zero=3), "fp32")
    (setup,) = setups_of("small", MODEL, EnginesOptions(engines=["deepspeed"], zero=[3], scaled_sizes=False), print)
    assert not setup.work.deepspeed


def test_the_larger_model_has_a_hundred_million_parameters():
    assert parameter_count(model_of("bench_100m")) == 101_858_797


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["engines=[torch]"], "engines=torch"),
        (["zero=[4]"], "zero=4"),
        (["zero=[]"], "names nothing"),
        (["models=[tiny,tiny]"], "names one twice"),
        (["layouts=[dp2+zero1]"], "stages are given apart"),
        (["microbatches=3"], "multiple of 2"),
        (["steps=0"], "steps=0"),
    ],
)
def test_what_cannot_be_is_said_at_once(arguments, expected):
    with pytest.raises(ConfigError, match=expected):
        parse_options(EnginesOptions, arguments)


def test_nothing_possible_is_a_mistake():
    with pytest.raises(ConfigError, match="none of these is possible"):
        engines.engines_command(EnginesOptions(models=["tiny"], engines=["megatron"], zero=[2]))


def test_the_verdict(ranks):
    alone = Setup("small", "megatron", ONE, OPTIONS.work(MODEL, LayoutConfig(dp=1), RecomputeConfig()))
    one = measured(ranks, alone, 1)
    sharded = measured(ranks, setup_of("megatron", 1), 1)
    good = judge([one, sharded])
    assert good["ok"] and good["name"] == "engines"
    figures = good["figures"]
    assert figures["small.megatron.dp2+zero1.step_time_ratio"] == 0.5
    assert figures["small.megatron.dp2+zero1.bytes"] > 0 == figures["small.one.bytes"]
    assert 0 < figures["small.megatron.dp2+zero1.peak_memory_mb"] < figures["small.one.peak_memory_mb"]

    first, second = sharded.ranks
    assert len(first.losses) == 3
    drifted = dataclasses.replace(second, losses=(*second.losses[:2], second.losses[2] * (1 + 1e-4)))
    assert failures_of(one, sharded, [first, drifted]) == ["small.megatron.dp2+zero1.loss"]
    broken = dataclasses.replace(first, losses=(math.nan, *first.losses[1:]))
    assert failures_of(one, sharded, [broken, second]) == ["small.megatron.dp2+zero1.loss"]
    sent_more = dataclasses.replace(second, sent=second.sent | {"data.all_reduce": 1.0})
    assert failures_of(one, sharded, [first, sent_more]) == ["small.megatron.dp2+zero1.bytes"]
    assert judge([one], ["small.deepspeed.dp2+zero3: did not run"])["ok"] is False


def failures_of(one: Measured, other: Measured, ranks: list) -> list[str]:
    result = judge([one, dataclasses.replace(other, ranks=ranks)])
    assert not result["ok"]
    return [failure.split(":")[0] for failure in result["failures"]]


def test_the_verb(capfd):
    arguments = ["quick=true", "zero=[1,3]", "microbatches=2", "frames=1"]
    assert main(["bench", "engines", *arguments]) == 0
    output = capfd.readouterr()
    result = json.loads(output.out.splitlines()[-1])
    assert result["name"] == "engines" and result["ok"]
    assert "time ÷ one process" in output.err and "zero3 is left out" in output.err
    for name in ("megatron.dp2+zero1", "deepspeed.dp2+zero1", "deepspeed.dp2+zero3"):
        for figure in ("step_time_ratio", "peak_memory_mb", "bytes"):
            assert result["figures"][f"tiny.{name}.{figure}"] > 0


def test_a_setup_that_does_not_run_fails_the_run_and_is_told(capsys, monkeypatch):
    class Failing:
        figures_of_one: list = []

        def __init__(self, *_):
            pass

        def measure(self, work):
            raise JobError("a job failed on rank 1\nrank 1:\nRuntimeError: no memory")

    monkeypatch.setattr(engines, "AgainstOne", Failing)
    monkeypatch.setattr(engines, "judge", lambda found, failures: {"ok": not failures, "failures": failures})
    monkeypatch.setattr(engines, "_table", lambda found: "")
    assert main(["bench", "engines", "models=[tiny]", "engines=[deepspeed]", "zero=[3]"]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["failures"] == ["tiny.deepspeed.dp2+zero3: did not run: RuntimeError: no memory"]
