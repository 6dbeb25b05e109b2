"""FlexAttention's block masks, made from ranges of keys: no predicate is evaluated over queries × keys.

Every token sees one range of keys and, below it, one of sinks. A block of queries × keys is *empty*, *full* (every pair
is visible: the kernel computes it without asking) or *partial* (the kernel asks `mask_mod` pair by pair). Which one it
is follows from where ranges begin and end: each range adds one to the blocks it touches, and one to those it covers
whole; sums over the queries of a block tell the rest. All of it is a few operations on the device, without waiting.

Shape suffixes: R rows, T tokens of a row, Q blocks of queries, K blocks of keys.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask

from moss_train.data.batch import Batch
from moss_train.model.visibility import visible_ranges


@dataclass(frozen=True)
class KeyRanges:
    """The keys that each token sees, int64 [R, T] each: [lo, hi) and [sink_lo, sink_hi), the second below the first.

    Neighbouring ranges are joined and empty ones are [0, 0), as `of` makes them.
    """

    lo_RT: torch.Tensor
    hi_RT: torch.Tensor
    sink_lo_RT: torch.Tensor
    sink_hi_RT: torch.Tensor
    keys: int  #: of a row; no range ends beyond

    @classmethod
    def of(cls, lo_RT, hi_RT, sink_lo_RT, sink_hi_RT, unit: int, count: int) -> "KeyRanges":
        """From ranges of things of `unit` keys each, `count` of them in a row (frames and their vision tokens)."""
        sink_hi_RT = torch.minimum(sink_hi_RT, lo_RT)  # sinks inside the window are in the window already
        joined_RT = (sink_hi_RT >= lo_RT) & (sink_hi_RT > sink_lo_RT)
        lo_RT = torch.where(joined_RT, sink_lo_RT, lo_RT)
        kept_RT, sinks_RT = hi_RT > lo_RT, (sink_hi_RT > sink_lo_RT) & ~joined_RT
        zero = torch.zeros_like(lo_RT)
        ranges = [
            torch.where(kept, x, zero).long() * unit
            for kept, x in ((kept_RT, lo_RT), (kept_RT, hi_RT), (sinks_RT, sink_lo_RT), (sinks_RT, sink_hi_RT))
        ]
        return cls(*ranges, keys=count * unit)

    def sees_RT(self) -> torch.Tensor:
        """Bool: whether a token sees any key."""
        return (self.hi_RT > self.lo_RT) | (self.sink_hi_RT > self.sink_lo_RT)

    def pairs(self) -> torch.Tensor:
        """int64 scalar: visible pairs of query and key."""
        return (self.hi_RT - self.lo_RT).sum() + (self.sink_hi_RT - self.sink_lo_RT).sum()


class Occupancy(NamedTuple):
    """Which blocks hold a visible pair, and which hold no other; bool [R, Q, K]."""

    any_RQK: torch.Tensor
    full_RQK: torch.Tensor

    def scores(self, block: tuple[int, int]) -> torch.Tensor:
        """int64 scalar: pairs that a kernel computes that leaves out empty blocks alone."""
        return self.any_RQK.sum() * block[0] * block[1]


def occupancy(ranges: KeyRanges, block: tuple[int, int]) -> Occupancy:
    """`block`: queries and keys of a block. The last blocks of a row may be ragged: what is beyond counts for nothing,
    so that a ragged block is full when all of it that exists is visible."""
    queries, keys = block
    tokens = ranges.lo_RT.shape[1]
    query_blocks, key_blocks = -(-tokens // queries), -(-ranges.keys // keys)
    block_T = torch.arange(tokens, device=ranges.lo_RT.device) // queries
    touched, covered = [], []
    for lo_RT, hi_RT in ((ranges.lo_RT, ranges.hi_RT), (ranges.sink_lo_RT, ranges.sink_hi_RT)):
        touched.append((lo_RT // keys, (hi_RT + keys - 1) // keys, hi_RT > lo_RT))
        first_RT = (lo_RT + keys - 1) // keys
        end_RT = torch.where(hi_RT == ranges.keys, key_blocks, hi_RT // keys)
        covered.append((first_RT, end_RT, end_RT > first_RT))
    touched_RQK, covered_RQK = (_counts(x, block_T, query_blocks, key_blocks) for x in (touched, covered))
    real_Q = (tokens - torch.arange(query_blocks, device=block_T.device) * queries).clamp(max=queries)
    return Occupancy(touched_RQK > 0, covered_RQK == real_Q[:, None])


def _counts(
    spans: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    block_T: torch.Tensor,
    query_blocks: int,
    key_blocks: int,
) -> torch.Tensor:
    """How many queries of each block have each block of keys in a span, int64 [R, Q, K]; `spans`: (first block of keys,
    end, whether there is a span at all), [R, T] each."""
    rows, columns = spans[0][0].shape[0], key_blocks + 1
    steps = spans[0][0].new_zeros(rows, query_blocks * columns)
    for first_RT, end_RT, there_RT in spans:
        for place_RT, step in ((first_RT, 1), (end_RT, -1)):
            steps.scatter_add_(1, block_T * columns + place_RT.clamp(max=key_blocks), step * there_RT.to(steps.dtype))
    return steps.view(rows, query_blocks, columns).cumsum(2)[..., :-1]


def block_mask(ranges: KeyRanges, block: tuple[int, int]) -> BlockMask:
    """The mask for `flex_attention` of queries [R, heads, T, D] over keys [R, heads, keys, D]."""
    found = occupancy(ranges, block)
    partial_RQK = found.any_RQK & ~found.full_RQK
    lo_RT, hi_RT, sink_lo_RT, sink_hi_RT = (
        x.int() for x in (ranges.lo_RT, ranges.hi_RT, ranges.sink_lo_RT, ranges.sink_hi_RT)
    )

    def visible(row, head, query, key):
        in_window = (key >= lo_RT[row, query]) & (key < hi_RT[row, query])
        return in_window | ((key >= sink_lo_RT[row, query]) & (key < sink_hi_RT[row, query]))

    return BlockMask.from_kv_blocks(
        *_listed(partial_RQK),
        *_listed(found.full_RQK),
        BLOCK_SIZE=block,
        mask_mod=visible,
        seq_lengths=(lo_RT.shape[1], ranges.keys),
    )


def _listed(blocks_RQK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks of keys each block of queries has, int32 [R, 1, Q], and which, those first, [R, 1, Q, K]."""
    order = blocks_RQK.int().argsort(dim=-1, descending=True, stable=True)
    return blocks_RQK.sum(-1, dtype=torch.int32)[:, None].contiguous(), order.int()[:, None].contiguous()


def mask_bytes(mask: BlockMask) -> int:
    """Bytes of all tensors that a mask holds, of what `mask_mod` reads too."""
    lists = (
        mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices, mask.q_num_blocks,
        mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices,
    )  # fmt: skip
    read = [cell.cell_contents for cell in mask.mask_mod.__closure__ or ()]
    return sum(x.numel() * x.element_size() for x in (*lists, *read) if isinstance(x, torch.Tensor))


def cross_ranges(batch: Batch, reference_compat: bool, tokens_per_frame: int, device: torch.device) -> KeyRanges:
    """Keys of each token among its row's frames, which lie in a rectangle of rows, `tokens_per_frame` keys each."""
    ranges = (torch.from_numpy(x).to(device, non_blocking=True) for x in visible_ranges(batch, reference_compat))
    return KeyRanges.of(*ranges, unit=tokens_per_frame, count=batch.frame_positions_RF.shape[1])


def self_ranges(batch: Batch, device: torch.device) -> KeyRanges:
    """Keys of each token among its row's tokens: those of its stream up to itself, as its text window has it; padding
    sees itself."""
    segments_RT = batch.segments_RT.to(device)
    rows, tokens = segments_RT.shape
    index_T = torch.arange(tokens, device=device)
    begins_RT = torch.ones_like(segments_RT, dtype=torch.bool)
    begins_RT[:, 1:] = segments_RT[:, 1:] != segments_RT[:, :-1]
    start_RT = torch.where(begins_RT, index_T, 0).cummax(dim=1).values
    member_RT = segments_RT >= 0
    lo_RT, sink_lo_RT, sink_hi_RT = (
        x.to(device).long() for x in (batch.text_lo_RT, batch.text_sink_lo_RT, batch.text_sink_hi_RT)
    )
    lo_RT = torch.where(member_RT, torch.maximum(lo_RT, start_RT), index_T)
    sink_lo_RT = torch.maximum(sink_lo_RT, start_RT)
    sink_hi_RT = torch.where(member_RT, sink_hi_RT, 0)
    return KeyRanges.of(lo_RT, (index_T + 1).expand(rows, -1), sink_lo_RT, sink_hi_RT, unit=1, count=tokens)
