"""The message between stages keeps values and gradients of both parts; plans of shares put frames back in order."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moss_train.data.batch import FrameShare
from moss_train.parallel.frame_gather import plan_shares
from moss_train.parallel.message import message_length, pack_message, unpack_message

TOKENS, ROWS, FRAMES, FRAME_TOKENS, WIDTH = 3, 2, 4, 5, 6


def parts(requires_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, ROWS, WIDTH, generator=generator)
    features = torch.randn(FRAMES, FRAME_TOKENS, WIDTH, generator=generator)
    return hidden.requires_grad_(requires_grad), features.requires_grad_(requires_grad)


@pytest.mark.parametrize("room", [0, 7])
def test_both_parts_and_their_gradients_arrive(room):
    hidden, features = parts(requires_grad=True)
    length = message_length(TOKENS, ROWS, FRAMES, FRAME_TOKENS) + room
    message = pack_message(hidden, features, length)
    assert message.shape == (length, 1, WIDTH)
    assert message._base is None  # megatron frees the sent tensor, which must not be a view
    received = message.detach().requires_grad_()
    found = unpack_message(received, hidden.shape[:2], features.shape[:2])
    assert torch.equal(found[0], hidden) and torch.equal(found[1], features)
    weights = [torch.randn_like(part) for part in found]
    torch.autograd.backward(found, weights)
    message.backward(received.grad)
    assert torch.equal(hidden.grad, weights[0]) and torch.equal(features.grad, weights[1])


def test_a_message_without_frames():
    hidden, _ = parts(requires_grad=True)
    message = pack_message(hidden, None, TOKENS * ROWS + 2)
    found, features = unpack_message(message, hidden.shape[:2], None)
    assert features is None and torch.equal(found, hidden)


def test_a_message_takes_part_in_the_backward_pass_when_nothing_before_it_is_trained():
    hidden, features = parts(requires_grad=False)
    message = pack_message(hidden, features, message_length(TOKENS, ROWS, FRAMES, FRAME_TOKENS))
    assert message.requires_grad
    message.backward(torch.ones_like(message))
    with torch.no_grad():
        assert not pack_message(hidden, features, 100).requires_grad


@given(
    frames=st.integers(0, 40),
    tensor_ranks=st.integers(1, 3),
    stages=st.integers(1, 3),
    frame_ranks=st.integers(1, 3),
)
def test_gathered_frames_are_in_the_batch_order(frames, tensor_ranks, stages, frame_ranks):
    bounds = FrameShare(0, frame_ranks * stages * tensor_ranks).bounds(frames)
    seen = []
    for frame_rank in range(frame_ranks):
        plan = plan_shares(
            bounds, SimpleNamespace(frame_rank=frame_rank, frame_ranks=frame_ranks, tensor_ranks=tensor_ranks)
        )
        shares = [
            list(range(bounds[share], bounds[share + 1]))
            for share in range(frame_rank * stages * tensor_ranks, (frame_rank + 1) * stages * tensor_ranks)
        ]
        # What the first stage's tensor rank t holds: its own share, then those of the later stages' rank t.
        held = [
            sum((shares[stage * tensor_ranks + rank] for stage in range(stages)), []) for rank in range(tensor_ranks)
        ]
        assert [len(part) for part in held] == plan.by_tensor_rank()
        gathered = sum(held, [])
        part = [gathered[place] for place in plan.flat_order()]
        assert part == list(range(plan.first, plan.end)) and len(part) == plan.frames
        seen += part
    assert seen == list(range(frames))
