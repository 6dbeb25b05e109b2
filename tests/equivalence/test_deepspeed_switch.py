"""Steps on one engine, then on the other, are steps on either; and a step that is not taken leaves nothing behind."""

import dataclasses
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from moss_train.bench.equivalence import reference
from moss_train.bench.equivalence.batches import microbatches
from moss_train.bench.equivalence.cases import Case, Problem
from moss_train.bench.equivalence.compare import tolerance, weight_deviations
from moss_train.bench.equivalence.outcome import Outcome, read_tensors, starting_weights
from moss_train.bench.equivalence.streams import tokenizer
from moss_train.checkpoint.saver import Saver
from moss_train.checkpoint.store import open_together
from moss_train.engines import build_engine
from moss_train.engines.pieces import MemorySource
from moss_train.model.build import build_model, whole_model
from moss_train.model.config import RecomputeConfig
from moss_train.model.groups import trainable_names
from moss_train.model.precision import Precision
from moss_train.objectives.streaming_loss import StreamingLoss
from moss_train.parallel import groups
from moss_train.parallel.config import LayoutConfig

SAVED_AT, STEPS = 5, 10
ADAMW = Problem(optimizer="adamw", clip=0.3)


def engine_of(case: Case, seed: int):
    state = groups.initialize(case.layout, seed=seed)
    problem = case.problem
    dtype = Precision.named(case.precision).dtype
    engine = build_engine(case.engine())
    model = build_model(problem.model(), state, dtype, case.recompute, seed=seed, store=engine.parameter_store())
    with torch.device("meta"):
        trained = trainable_names(whole_model(problem.model(), state), problem.trainable)
    objective = StreamingLoss(problem.objective(), tokenizer().special.silence, anchor_id=tokenizer().special.anchor)
    engine.setup(model, trained, problem.optim(), objective, STEPS)
    return engine, state


def started(engine, problem: Problem) -> None:
    shapes = {name.removeprefix("model/"): shape for name, shape in engine.expected_shapes(optimizer=False).items()}
    weights = starting_weights(problem, shapes)
    engine.load_weights(MemorySource({f"model/{name}": weight for name, weight in weights.items()}))


def train_and_save(rank: int, ranks: int, case: Case, folder: str) -> list[float]:
    """The first steps, and a checkpoint after them."""
    engine, state = engine_of(case, seed=case.problem.seed)
    started(engine, case.problem)
    losses = [engine.train_step(microbatches(case, step, state)).loss for step in range(SAVED_AT)]
    saver = Saver(Path(folder), file_bytes=20_000)
    saver.begin(SAVED_AT, engine.pieces(), {"engine": engine.metadata()}, {})
    saver.finish()
    return losses


def load_and_finish(rank: int, ranks: int, case: Case, folder: str) -> list[float]:
    """The other steps from the checkpoint on, beginning with other weights; the main rank leaves the last weights."""
    engine, state = engine_of(case, seed=case.problem.seed + 77)
    checkpoint = open_together(Path(folder) / f"step_{SAVED_AT:08d}")
    engine.load(checkpoint, checkpoint.state["engine"])
    losses = [engine.train_step(microbatches(case, step, state)).loss for step in range(SAVED_AT, STEPS)]
    weights = {name.removeprefix("model/"): tensor for name, tensor in engine.whole_weights().items()}
    if state.is_main:
        save_file({name: tensor.float().contiguous() for name, tensor in weights.items()}, Path(folder) / "last")
    return losses


def megatron(**layout) -> Case:
    return Case(ADAMW, LayoutConfig(**layout))


def deepspeed(**layout) -> Case:
    return Case(ADAMW, LayoutConfig(**layout), engine_name="deepspeed")


SWITCHES = [
    (megatron(pp=2, tp=2, sp=True), deepspeed(dp=2, zero=2)),
    (megatron(dp=2, zero=1), deepspeed(tp=2, dp=2, zero=3)),
    (deepspeed(tp=2, dp=2, sp=True, zero=3), megatron(pp=4)),
    (deepspeed(dp=2, zero=1), megatron(tp=2, cp=2)),
    (deepspeed(dp=2, zero=0), megatron(tp=2, dp=2, zero=1)),
    (deepspeed(cp=2, dp=2, zero=2), deepspeed(tp=2, zero=3)),
    (deepspeed(pp=2, tp=2, sp=True, zero=1), megatron(pp=2, vpp=2)),
    (megatron(dp=2), deepspeed(pp=4, zero=1)),
    (deepspeed(dp=2, zero=3), deepspeed(pp=2, dp=2, pipeline_schedule="dualpipev")),
]


@pytest.fixture(scope="module")
def ten_steps(comparer, tmp_path_factory) -> tuple[Problem, Outcome]:
    """Of a plain process."""
    problem, _ = comparer.reference(ADAMW)  # with a seed at which rounding is harmless
    path = tmp_path_factory.mktemp("ten") / "steps"
    ((steps, trained),) = comparer.ranks.run(1, train_plainly, problem, str(path))
    return problem, Outcome(steps, trained, read_tensors(path))


def train_plainly(rank: int, ranks: int, problem: Problem, path: str):
    with mock.patch.object(reference, "STEPS", STEPS):
        outcome = reference.train(problem)
    outcome.save_tensors(Path(path))
    return outcome.steps, outcome.trained


@pytest.mark.parametrize(
    ("first", "second"), SWITCHES, ids=lambda case: f"{case.engine_name}-{case.describe()['layout']}"
)
def test_deepspeed_and_megatron_go_on_from_each_other(comparer, ten_steps, tmp_path, first, second):
    problem, expected = ten_steps
    first, second = (dataclasses.replace(case, problem=problem) for case in (first, second))
    losses = comparer.ranks.run(first.world_size, train_and_save, first, str(tmp_path))[0]
    losses += comparer.ranks.run(second.world_size, load_and_finish, second, str(tmp_path))[0]
    require_steps(expected, losses, tmp_path / "last", second)


def require_steps(expected: Outcome, losses: list[float], last: Path, case: Case) -> None:
    """The losses of the steps and the weights after them are the plain process's."""
    allowed = tolerance(case)
    assert losses == pytest.approx([step.loss for step in expected.steps], rel=allowed.loss)
    found = load_file(last)
    deviations = weight_deviations(expected.tensors["start"], found, expected.tensors["last"], allowed)
    assert {name: deviation for name, deviation in deviations.items() if not deviation <= allowed.weight} == {}


def skip_and_go_on(rank: int, ranks: int, case: Case) -> list[str]:
    """What is wrong after steps that must not be taken, on the main rank; [] on the others."""
    # Nothing may be compiled: there are machines without a compiler.
    with mock.patch("torch.utils.cpp_extension.load", side_effect=AssertionError("a compilation was begun")):
        engine, state = engine_of(case, seed=1)
    started(engine, case.problem)
    engine.train_step(microbatches(case, 0, state))

    def copied():
        # By rank, from the engine's own memory: what several ranks hold must not change on any of them.
        own = {(piece.name, piece.offsets): piece.tensor.clone() for piece in engine.pieces()}
        return own, {name: tensor.clone() for name, tensor in engine.state_dict().tensors.items()}

    before, wrong = copied(), []
    poisoned = microbatches(case, 1, state)
    if rank == 0 or not case.layout.dualpipev and rank == ranks - 1:  # the head must see it
        poisoned[0].weights_RT[:] = float("inf")
    refused = {
        "limit": engine.train_step(microbatches(case, 1, state), loss_limit=1e-3),
        "not finite": engine.train_step(poisoned),
    }
    with mock.patch.object(type(engine._model.decoder_layers[0]), "forward", _infinite_gradient()):
        refused["gradient"] = engine.train_step(microbatches(case, 1, state))
    for what, output in refused.items():
        wrong += [] if output.skipped else [f"{what}: was taken"]
    if math.isfinite(refused["gradient"].grad_norm) or not math.isfinite(refused["gradient"].loss):
        wrong.append(f"gradient: {refused['gradient']}")
    for now, then in zip(copied(), before, strict=True):
        wrong += [f"{name} changed" for name in then if not torch.equal(now[name], then[name])]
    wrong += [] if (engine.step, engine.skipped_steps) == (4, 3) else ["counts"]

    # Goes on as one that was never asked to.
    other, _ = engine_of(case, seed=1)
    started(other, case.problem)
    other.train_step(microbatches(case, 0, state))
    steps = [one.train_step(microbatches(case, 1, state)) for one in (engine, other)]
    wrong += [] if str(steps[0]) == str(steps[1]) else [f"another step: {steps}"]
    weights = [one.whole_weights() for one in (engine, other)]
    wrong += [f"{name} differs after" for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    return wrong


def _infinite_gradient():
    from moss_train.model.layers import SelfLayer

    original = SelfLayer.forward

    def forward(self, *arguments):
        x_TRH = original(self, *arguments)
        if x_TRH.requires_grad:
            x_TRH.register_hook(lambda gradient: gradient * float("inf"))
        return x_TRH

    return forward


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        *[(LayoutConfig(tp=2, dp=2, zero=zero), "fp32") for zero in (0, 3)],
        *[(LayoutConfig(tp=2, dp=2, zero=zero), "bf16") for zero in (1, 2)],
        (LayoutConfig(pp=2, tp=2), "fp32"),
        (LayoutConfig(pp=2, dp=2, zero=1), "bf16"),
        (LayoutConfig(pp=2, pipeline_schedule="dualpipev"), "fp32"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"pp{value.pp}-zero{value.zero}",
)
def test_deepspeed_leaves_everything_as_it_was_when_a_step_is_not_taken(comparer, layout, precision):
    case = Case(
        ADAMW, layout, precision=precision, engine_name="deepspeed", recompute=RecomputeConfig("selective", "none")
    )
    ranks = case.world_size
    assert [wrong for wrong in comparer.ranks.run(ranks, skip_and_go_on, case) if wrong] == []


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_deepspeed_with_offloading_goes_on_after_a_step_that_overflowed(comparer, zero):
    case = Case(ADAMW, LayoutConfig(dp=2, zero=zero), precision="bf16", engine_name="deepspeed")
    assert comparer.ranks.run(2, overflow_offloaded, case) == [[], []]


def overflow_offloaded(rank: int, ranks: int, case: Case) -> list[str]:
    """What is wrong after a step whose gradients were not finite, with optimizer state in the memory of the host."""
    offloaded = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    config = dataclasses.replace(case.engine(), deepspeed=offloaded)
    with mock.patch.object(Case, "engine", lambda self: config):
        engines = [engine_of(case, seed=1) for _ in range(2)]
        poisoned, _ = engines[0]
        told = []
        for engine, state in engines:
            started(engine, case.problem)
            if engine is poisoned:
                with mock.patch.object(type(engine._model.decoder_layers[0]), "forward", _infinite_gradient()):
                    assert engine.train_step(microbatches(case, 0, state)).skipped
            outputs = [engine.train_step(microbatches(case, step, state)) for step in range(3)]
            told.append([(output.skipped, output.loss, output.grad_norm) for output in outputs])
    return [] if told[0] == told[1] and not told[0][-1][0] else [str(told)]


def scale_in_fp16(rank: int, ranks: int, case: Case, initial: float) -> list[tuple]:
    """Of steps with a scale that is too large at first: skipped, overflowed, the scale, the loss, the norm."""
    original = case.engine()
    engine_config = dataclasses.replace(original, initial_loss_scale=initial)
    with mock.patch.object(Case, "engine", lambda self: engine_config):
        engine, state = engine_of(case, seed=1)
        started(engine, case.problem)
        told = []
        for _ in range(4):
            output = engine.train_step(microbatches(case, 0, state))
            scale = engine.metadata()["loss_scale"]["scale"]
            told.append((output.skipped, output.overflowed, scale, output.loss, output.grad_norm))
        if not told[-1][0]:
            saved = {name: tensor.clone() for name, tensor in engine.state_dict().tensors.items()}
            if ranks == 1:  # a state in memory is whole on the main rank alone
                other, _ = engine_of(case, seed=2)
                other.load(MemorySource(saved), engine.metadata())
                assert other.metadata()["loss_scale"] == engine.metadata()["loss_scale"]
                outputs = [one.train_step(microbatches(case, 1, state)) for one in (engine, other)]
                assert str(outputs[0]) == str(outputs[1])
    return told


@pytest.mark.parametrize(
    "layout",
    [*[LayoutConfig(zero=zero) for zero in (1, 2, 3)], LayoutConfig(pp=2, zero=1)],
    ids=["zero1", "zero2", "zero3", "pp2-zero1"],
)
def test_deepspeed_float16_scale_falls_as_megatrons(comparer, layout):
    ours = Case(ADAMW, layout, precision="fp16", engine_name="deepspeed")
    theirs = Case(ADAMW, LayoutConfig(pp=layout.pp), precision="fp16")
    for initial in (2.0**40, 2.0**10):
        found, expected = (comparer.ranks.run(layout.pp, scale_in_fp16, case, initial)[0] for case in (ours, theirs))
        assert [one[:3] for one in found] == [one[:3] for one in expected]
        assert found[0][3] == pytest.approx(expected[0][3], rel=3e-3)
    assert [one[4] for one in found] == pytest.approx([one[4] for one in expected], rel=2e-2)
