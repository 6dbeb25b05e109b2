"""Three steps, a checkpoint, another process's worth of fresh objects, two steps: bit for bit five steps."""

import json

import pytest
from engine_parts import global_batches, setup_engine, tiny_model

# isort: split
import torch

from moss_train.checkpoint.store import latest, open_checkpoint, save_checkpoint
from moss_train.engines import EngineConfig, build_engine
from moss_train.engines.config import OptimConfig
from moss_train.errors import CheckpointError
from moss_train.model.groups import trainable_names

pytestmark = pytest.mark.usefixtures("one_process")

OPTIM = OptimConfig(lr=1e-2, group_lr={"projector": 2e-2}, weight_decay=0.1, warmup_fraction=0.4, schedule="cosine")


def engine_of(seed: int, preset: str):
    model = tiny_model(seed)
    return setup_engine(build_engine(EngineConfig()), model, OPTIM, trainable=trainable_names(model, preset))


@pytest.mark.parametrize("preset", ["all", "projector_xattn"])
def test_five_steps_equal_three_and_two(tmp_path, preset):
    batches = global_batches(5)
    through = engine_of(0, preset)
    straight = [through.train_step(microbatches) for microbatches in batches]

    early = engine_of(0, preset)
    for microbatches in batches[:3]:
        early.train_step(microbatches)
    state = early.state_dict()
    save_checkpoint(tmp_path, early.step, state.tensors, {"engine": state.metadata}, {})

    late = engine_of(77, preset)
    checkpoint = open_checkpoint(latest(tmp_path))
    late.load(checkpoint, checkpoint.state["engine"])
    assert (checkpoint.step, late.step) == (3, 3)
    assert [late.train_step(microbatches) for microbatches in batches[3:]] == straight[3:]
    left, right = late.state_dict(), through.state_dict()
    assert left.metadata == right.metadata == json.loads(json.dumps(left.metadata))
    assert all(torch.equal(left.tensors[name], right.tensors[name]) for name in right.tensors)


def test_a_stage_that_trains_other_groups_takes_the_weights_but_not_the_state(tmp_path):
    before = engine_of(0, "projector_xattn")
    before.train_step(global_batches(1)[0])
    state = before.state_dict()
    path = save_checkpoint(tmp_path, 1, state.tensors, {"engine": state.metadata}, {})
    after = engine_of(77, "all")
    with pytest.raises(CheckpointError, match=r"missing optimizer/head\.weight/exp_avg"):
        after.load(open_checkpoint(path), state.metadata)
    after.load_weights(open_checkpoint(path))
    assert after.step == 0
    taken = after.whole_weights()
    assert all(torch.equal(taken[name], state.tensors[name]) for name in taken)
