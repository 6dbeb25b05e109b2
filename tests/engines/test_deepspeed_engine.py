"""The DeepSpeed engine on one process: rates by group, what it tells, what it refuses when it is set up."""

import dataclasses
import weakref
from unittest import mock

from engine_parts import batch, global_batches, setup_engine, tiny_model

# isort: split
import pytest
import torch

from moss_train.engines import EngineConfig, build_engine, deepspeed
from moss_train.engines.config import OptimConfig
from moss_train.engines.held_optimizer import held_optimizer as held
from moss_train.engines.pieces import MemorySource
from moss_train.errors import ConfigError
from moss_train.model.groups import trainable_names
from moss_train.model.video_model import VideoModel
from moss_train.parallel import groups
from moss_train.parallel.config import LayoutConfig

OPTIM = OptimConfig(
    lr=1e-2, group_lr={"projector": 3e-2, "head": 0.0}, weight_decay=0.3, eps=1e-3, clip=0.5, warmup_steps=2
)


@pytest.fixture(params=[0, 1, 2, 3], ids=lambda zero: f"zero{zero}")
def zero(request):
    groups.shutdown()
    groups.initialize(LayoutConfig(zero=request.param))
    yield request.param
    groups.shutdown()


def engine_of(name: str, model: VideoModel, preset: str = "all", optim: OptimConfig = OPTIM, **options):
    engine = build_engine(EngineConfig(name=name, **options))
    return setup_engine(engine, model, optim, trainable=trainable_names(model, preset))


def test_rates_and_weight_decay_by_group_are_megatrons(zero):
    ours = engine_of("deepspeed", tiny_model())
    found = [ours.train_step(microbatches) for microbatches in global_batches(4)]
    weights = {name: tensor.clone() for name, tensor in ours.whole_weights().items()}
    groups.shutdown()
    groups.initialize(LayoutConfig(zero=min(zero, 1)))
    theirs = engine_of("megatron", tiny_model())
    start = {name: tensor.clone() for name, tensor in theirs.whole_weights().items()}
    expected = [theirs.train_step(microbatches) for microbatches in global_batches(4)]
    assert [output.lr for output in found] == [output.lr for output in expected]
    for figure in ("loss", "grad_norm"):
        assert [getattr(o, figure) for o in found] == pytest.approx([getattr(o, figure) for o in expected], rel=2e-5)
    for name, weight in theirs.whole_weights().items():
        moved = (weight - start[name]).norm()
        assert (weights[name] - weight).norm() <= 1e-3 * moved + 1e-6, name
        assert (moved == 0) == name.startswith("model/head")


def test_the_fused_optimizer_takes_the_same_steps(zero):
    """Which is what runs on a GPU."""
    found = []
    for fused in (False, True):
        with mock.patch.object(
            deepspeed, "held_optimizer", lambda *arguments, fused, on=fused: held(*arguments, fused=on)
        ):
            engine = engine_of("deepspeed", tiny_model())
        losses = [engine.train_step(microbatches).loss for microbatches in global_batches(4)]
        found.append((losses, {name: tensor.clone() for name, tensor in engine.whole_weights().items()}))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for name, weight in found[0][1].items():
        assert torch.allclose(found[1][1][name], weight, rtol=1e-4, atol=1e-6), name


def test_metadata_holds_the_dictionary_that_deepspeed_was_given(zero):
    engine = engine_of("deepspeed", tiny_model(), deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}})
    told = engine.metadata()
    assert told["engine"] == "deepspeed"
    zero_settings = told["deepspeed"]["zero_optimization"]
    assert (zero_settings["stage"], zero_settings["reduce_bucket_size"]) == (zero, 1000)


def test_the_engine_of_the_stage_before_is_freed(zero):
    first = engine_of("deepspeed", tiny_model())
    first.train_step(global_batches(1)[0])
    memory = weakref.ref(first._engine.optimizer)
    del first
    engine_of("deepspeed", tiny_model())
    assert memory() is None


def test_gradients_are_told_of_only_when_they_were_kept(zero):
    engine = engine_of("deepspeed", tiny_model())
    engine.train_step(global_batches(1)[0])
    with pytest.raises(RuntimeError, match="set keep_gradients"):
        engine.gradients()


@pytest.mark.parametrize("preset", ["all", "projector_only"])
def test_a_parameter_without_elements(zero, preset):
    """No rows beside the vocabulary's. The batch has no frames, and the projector alone is trained: still a step."""
    sizes = tiny_model().sizes
    sizes = dataclasses.replace(sizes, text=dataclasses.replace(sizes.text, extra_embedding_rows=0))
    model = VideoModel(sizes, groups.state().tensor_group)
    if zero == 3:
        with pytest.raises(ConfigError, match=r"layout\.zero=3: .*embedding\.extra.*set layout\.zero=2"):
            engine_of("deepspeed", model, preset, OptimConfig())
        return
    engine = engine_of("deepspeed", model, preset, OptimConfig())
    assert not engine.train_step([batch(1, frames=0)]).skipped
    saved = {name: tensor.clone() for name, tensor in engine.state_dict().tensors.items()}
    assert {piece.name for piece in engine.pieces()} == set(saved) == set(engine.expected_shapes())
    engine.load(MemorySource(saved), engine.metadata())
    assert all(torch.equal(tensor, saved[name]) for name, tensor in engine.state_dict().tensors.items())


def test_what_it_cannot_do_is_refused_when_it_is_set_up():
    groups.shutdown()
    groups.initialize(LayoutConfig())
    with pytest.raises(ConfigError, match=r"layout\.zero=0: with precision=bf16"):
        engine_of("deepspeed", tiny_model(dtype=torch.bfloat16))
