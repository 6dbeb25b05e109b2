"""Block masks against the dense masks they stand for, and FlexAttention over them against dense attention."""

import numpy as np
import pytest
import torch
from model_cases import pack, stream

from moss_train.errors import ConfigError
from moss_train.model import visibility
from moss_train.model.block_mask import KeyRanges, block_mask, cross_ranges, occupancy, self_ranges
from moss_train.model.flex import FlexAttention

CPU = torch.device("cpu")


def rows_of_streams(seed: int, **options):
    rng = np.random.default_rng(seed)
    return [
        [stream(rng, frames=4, **options), stream(rng, frames=2, leading=1, **options)],
        [stream(rng, frames=0, leading=5)],
        [stream(rng, frames=5, leading=0, **options)],
    ]


def dense_of(ranges: KeyRanges) -> torch.Tensor:
    key = torch.arange(ranges.keys)
    lo, hi, sink_lo, sink_hi = (
        x[..., None] for x in (ranges.lo_RT, ranges.hi_RT, ranges.sink_lo_RT, ranges.sink_hi_RT)
    )
    return ((key >= lo) & (key < hi)) | ((key >= sink_lo) & (key < sink_hi))


def blocks_of(dense_RTK: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks hold a visible pair and which hold no other, by looking at every pair."""
    rows, tokens, keys = dense_RTK.shape
    grid = [(q, k) for q in range(0, tokens, block[0]) for k in range(0, keys, block[1])]
    shape = (rows, -(-tokens // block[0]), -(-keys // block[1]))
    parts = [dense_RTK[:, q : q + block[0], k : k + block[1]].flatten(1) for q, k in grid]
    return tuple(torch.stack([found(part, 1) for part in parts], 1).view(shape) for found in (torch.any, torch.all))


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"window": 2, "sinks": 1}, {"window": 1, "sinks": 2}])
@pytest.mark.parametrize("compat", [False, True])
def test_ranges_are_the_dense_masks(options, compat):
    batch = pack(rows_of_streams(0, **options), padding=3)
    ranges = cross_ranges(batch, compat, 5, CPU)
    frames = batch.frame_positions_RF.shape[1]
    dense_RTN = visibility.dense_cross_mask(batch, compat, CPU).unflatten(2, (batch.rows, frames))
    own_RTF = torch.stack([dense_RTN[row, :, row] for row in range(batch.rows)])
    assert torch.equal(dense_of(ranges), own_RTF.repeat_interleave(5, dim=2))
    assert int(ranges.pairs()) == int(own_RTF.sum()) * 5
    member_RT1 = (batch.segments_RT >= 0)[..., None]
    dense_RTT = (
        visibility.dense_self_mask(batch, CPU) & member_RT1 | torch.eye(batch.ids_RT.shape[1]).bool() & ~member_RT1
    )
    assert torch.equal(dense_of(self_ranges(batch, CPU)), dense_RTT)


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (5, 3), (16, 8), (64, 64)])
def test_blocks_are_what_looking_at_every_pair_finds(block):
    """Random ranges: empty, touching sinks, whole rows, ragged last blocks."""
    rng = np.random.default_rng(3)
    for keys, tokens in ((1, 1), (7, 9), (30, 21), (64, 64)):
        draws = np.sort(rng.integers(0, keys + 1, (4, 3, tokens)), axis=0)
        draws[:, 0] = [[0], [0], [0], [keys]]  # a row that sees all
        lo, hi, sink_lo, sink_hi = (torch.from_numpy(draws[place]) for place in (2, 3, 0, 1))
        empty = torch.from_numpy(rng.random((3, tokens)) < 0.2)
        hi = torch.where(empty, lo, hi)
        ranges = KeyRanges.of(lo, hi, sink_lo, sink_hi, unit=1, count=keys)
        found, dense = occupancy(ranges, block), dense_of(ranges)
        any_RQK, full_RQK = blocks_of(dense, block)
        assert torch.equal(found.any_RQK, any_RQK)
        assert torch.equal(found.full_RQK, full_RQK)
        mask = block_mask(ranges, block)
        listed = mask.to_dense()[:, 0].bool()
        assert torch.equal(listed, any_RQK)
        assert torch.equal(mask.full_kv_num_blocks[:, 0], full_RQK.sum(-1).int())
        rows, queries, key = torch.meshgrid(*(torch.arange(n) for n in dense.shape), indexing="ij")
        assert torch.equal(mask.mask_mod(rows, 0, queries, key), dense)


@pytest.mark.parametrize("options", [{}, {"window": 2, "sinks": 1}])
@pytest.mark.parametrize("compat", [False, True])
@torch.no_grad()
def test_flex_equals_dense(build, options, compat):
    """float32, plain (uncompiled) FlexAttention, which has no backward pass on CPUs: tests/gpu has the gradients."""
    batch = pack(rows_of_streams(0, **options), padding=3)
    real = (batch.segments_RT >= 0).T
    found, expected = (build(attention=name, reference_compat=compat)(batch)[real] for name in ("flex", "dense"))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_training_with_flex_on_a_cpu_is_refused(build):
    with pytest.raises(ConfigError, match="model.attention=flex.*segments"):
        build(attention="flex")(pack(rows_of_streams(0)))


@torch.no_grad()
def test_a_batch_without_frames_attends_to_text_alone(build):
    rng = np.random.default_rng(1)
    batch = pack([[stream(rng, frames=0, leading=5)]])
    backend = FlexAttention(batch, False, 5, CPU)
    assert backend.cross_mask is None
    expected, found = (build(attention=attention)(batch) for attention in ("dense", "flex"))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
