import random

import numpy as np
import pytest
import torch

from moss_train.checkpoint.random_state import capture_random_state, restore_random_state
from moss_train.checkpoint.store import load_checkpoint, save_checkpoint
from moss_train.errors import CheckpointError


def draw() -> list:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        np.random.standard_normal(),
        torch.rand(3).tolist(),
        torch.randn(1).item(),
    ]


@pytest.mark.parametrize("draws_before", [0, 1, 2])
def test_draws_go_on_as_if_nothing_had_happened(tmp_path, draws_before):
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    for _ in range(draws_before):  # an odd number leaves a second Gaussian waiting in Python and in numpy
        draw()
    path = save_checkpoint(tmp_path, 1, capture_random_state(rank=3), {}, {})
    expected = [draw(), draw()]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(99)
    restore_random_state(load_checkpoint(path).tensors, rank=3)
    assert [draw(), draw()] == expected


def test_a_missing_state_is_named_and_nothing_is_changed():
    states = capture_random_state(rank=0)
    expected = draw()
    restore_random_state(states)
    with pytest.raises(CheckpointError, match="random/1/python_gauss"):
        restore_random_state(states, rank=1)
    del states["random/0/torch"]
    with pytest.raises(CheckpointError, match="random/0/torch"):
        restore_random_state(states)
    assert draw() == expected
