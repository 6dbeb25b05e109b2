"""bfloat16 and float16 parameters with float32 originals, in the plain and in the distributed optimizer."""

import json
import math

import pytest
from engine_parts import global_batches, setup_engine, tiny_model

# isort: split
import torch

from moss_train.engines import EngineConfig, build_engine
from moss_train.engines.config import OptimConfig
from moss_train.engines.pieces import MemorySource
from moss_train.engines.protocol import EngineState
from moss_train.model.groups import trainable_names
from moss_train.parallel import groups
from moss_train.parallel.config import LayoutConfig

OPTIM = OptimConfig(lr=1e-2, group_lr={"projector": 2e-2}, weight_decay=0.1, warmup_steps=0, schedule="constant")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: relative error of a step's loss that rounding to 8 or 11 significant bits explains, measured 4e-3 and 6e-4
LOSS_TOLERANCE = {"bf16": 2e-2, "fp16": 3e-3}


@pytest.fixture(params=[0, 1], ids=["zero0", "zero1"], autouse=True)
def zero(request):
    groups.shutdown()
    groups.initialize(LayoutConfig(zero=request.param))
    yield request.param
    groups.shutdown()


def engine_of(dtype: torch.dtype, seed: int = 0, preset: str = "all", **options):
    model = tiny_model(seed, dtype)
    trainable = trainable_names(model, preset)
    return setup_engine(build_engine(EngineConfig(**options)), model, OPTIM, trainable=trainable), model


def copied(state: EngineState) -> EngineState:
    return EngineState({name: t.clone() for name, t in state.tensors.items()}, json.loads(json.dumps(state.metadata)))


@pytest.mark.parametrize("name", DTYPES)
def test_training_follows_float32(name):
    half, _ = engine_of(DTYPES[name])
    full, _ = engine_of(torch.float32)
    full.load_weights(MemorySource({weight: t.float() for weight, t in half.whole_weights().items()}))
    for microbatches in global_batches(4):
        found, expected = half.train_step(microbatches), full.train_step(microbatches)
        assert not found.skipped
        assert found.loss == pytest.approx(expected.loss, rel=LOSS_TOLERANCE[name])
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=5 * LOSS_TOLERANCE[name])


@pytest.mark.parametrize("name", DTYPES)
def test_saved_weights_are_the_float32_ones(name):
    engine, model = engine_of(DTYPES[name], preset="projector_xattn")
    for microbatches in global_batches(2):
        engine.train_step(microbatches)
    saved = engine.state_dict().tensors
    trained = trainable_names(model, "projector_xattn")
    finer = 0
    for parameter_name, parameter in model.named_parameters():
        weight = saved[f"model/{parameter_name}"]
        if parameter_name not in trained:
            assert weight.dtype == DTYPES[name] and torch.equal(weight, parameter)
            continue
        assert weight.dtype == torch.float32
        assert torch.equal(weight.to(DTYPES[name]), parameter)
        finer += int((weight != parameter.float()).sum())
    assert finer > 100  # digits that the 16-bit weights do not have


@pytest.mark.parametrize("name", DTYPES)
def test_resuming_is_exact(name):
    batches = global_batches(5)
    through, _ = engine_of(DTYPES[name])
    straight = [through.train_step(microbatches) for microbatches in batches]
    early, _ = engine_of(DTYPES[name])
    for microbatches in batches[:3]:
        early.train_step(microbatches)
    state = copied(early.state_dict())
    late, _ = engine_of(DTYPES[name], seed=77)
    late.load(MemorySource(state.tensors), state.metadata)
    assert [late.train_step(microbatches) for microbatches in batches[3:]] == straight[3:]
    left, right = late.state_dict(), through.state_dict()
    assert left.metadata == right.metadata
    assert all(torch.equal(left.tensors[one], right.tensors[one]) for one in right.tensors)


def test_float16_halves_a_scale_that_overflows_and_takes_no_step():
    engine, model = engine_of(torch.float16, initial_loss_scale=2.0**40)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batches = global_batches(1)[0]
    scales = []
    for _ in range(4):
        output = engine.train_step(batches)
        assert output.skipped and output.overflowed
        scales.append(engine.state_dict().metadata["loss_scale"]["scale"])
    assert scales == [2.0**40, 2.0**39, 2.0**38, 2.0**37]  # the first overflow is forgiven
    assert engine.skipped_steps == 4
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_an_overflow_at_the_lowest_scale_is_a_fault():
    """Neither 1, below which the scale does not fall, nor a constant scale answers it."""
    for options in ({"initial_loss_scale": 1.0}, {"loss_scale": 2.0**40}):
        engine, model = engine_of(torch.float16, **options)
        if "initial_loss_scale" in options:
            model.head.weight.register_hook(lambda gradient: gradient * float("inf"))
        output = engine.train_step(global_batches(1)[0])
        assert math.isfinite(output.loss) and output.skipped and not output.overflowed


def test_float16_goes_on_with_the_scale_it_was_saved_with():
    engine, _ = engine_of(torch.float16, initial_loss_scale=2.0**40)
    for _ in range(3):
        engine.train_step(global_batches(1)[0])
    state = copied(engine.state_dict())
    other, _ = engine_of(torch.float16)
    other.load(MemorySource(state.tensors), state.metadata)
    assert other.state_dict().metadata["loss_scale"] == state.metadata["loss_scale"]
    batch = global_batches(1)[0]
    assert str(other.train_step(batch)) == str(engine.train_step(batch))


def test_the_norm_does_not_depend_on_the_scale():
    batches = global_batches(1)[0]
    norms = [engine_of(torch.float16, loss_scale=scale)[0].train_step(batches).grad_norm for scale in (256.0, 8192.0)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
