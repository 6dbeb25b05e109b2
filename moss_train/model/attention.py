"""Attention backends: over a plan of runs, over dense masks, over the caches of running streams.

Every backend answers the same two calls, so layers do not know which one runs. Shape suffixes: T tokens, R rows,
N frames held, P vision tokens of a frame, A query heads, B key/value heads, D head width; AD = heads and width joined.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from moss_train.model.flash import PackedStreams, packed_causal_attention
from moss_train.model.frame_parallel import frame_parallel_attention, frames_of
from moss_train.model.recompute import touch
from moss_train.model.text_window import WindowPlan
from moss_train.model.visibility import AttentionPlan, Group


class AttentionBackend(Protocol):
    """What a decoder layer asks for."""

    def self_attention(self, layer: int, q_TRAD, k_TRBD, v_TRBD) -> torch.Tensor:
        """Causal attention among the tokens of each stream, [T, R, AD]."""

    def cross_attention(self, layer: int, q_TRAD, k_NPBD, v_NPBD) -> torch.Tensor:
        """Attention of each token over the frames it sees, [T, R, AD]; exactly zero where it sees none."""


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask=None, causal: bool = False) -> torch.Tensor:
    """[batch, tokens, heads, width] in and out, un-repeated grouped keys and values.

    On CPUs half precision is lifted to float32: torch's kernel takes five times as long backwards in bfloat16.
    """
    dtype = q.dtype
    if q.device.type == "cpu" and dtype.itemsize < 4:
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )
    return mixed.transpose(1, 2).to(dtype)


#: Up to so many tokens, grouped queries are laid beside each other as if they were more tokens.
_FEW_TOKENS = 16


def attend_grouped(q_RLAD, keys_RBKD, values_RBKD, mask_RLK=None, causal: bool = False) -> torch.Tensor:
    """Attention over keys and values that lie head by head, K of them, un-repeated; [R, L, A, D].

    The A / B query heads that share a key head are put where tokens are, so that each key is read once for all of them:
    twice as fast for one token as torch's own `enable_gqa`, which is used where there are many tokens and a mask.
    """
    heads, key_heads = q_RLAD.shape[2], keys_RBKD.shape[1]
    few = mask_RLK is None or q_RLAD.shape[1] <= _FEW_TOKENS
    if heads == key_heads or causal or not few:
        mixed = F.scaled_dot_product_attention(
            q_RLAD.transpose(1, 2),
            keys_RBKD,
            values_RBKD,
            attn_mask=None if mask_RLK is None else mask_RLK[:, None],
            is_causal=causal,
            enable_gqa=heads != key_heads,
        )
        return mixed.transpose(1, 2)
    shares = heads // key_heads
    q = q_RLAD.unflatten(2, (key_heads, shares)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    mask = None if mask_RLK is None else mask_RLK.repeat(1, shares, 1)[:, None]
    mixed = F.scaled_dot_product_attention(q, keys_RBKD, values_RBKD, attn_mask=mask)
    return mixed.unflatten(2, (shares, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`x[index]` along the first dimension; its backward pass is an index_add, several times faster than index_put."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


def _collect(results: list[torch.Tensor], plan: AttentionPlan | WindowPlan, tokens: int, rows: int, like: torch.Tensor):
    """Bring the groups' results back into token order; tokens without a result get the zero row."""
    width = like.shape[-2] * like.shape[-1]
    zero = like.new_zeros(1, width)
    joined = torch.cat([*(r.reshape(-1, width) for r in results), zero])
    return joined.index_select(0, plan.result_of_token).view(tokens, rows, width)


def _attend_whole(flat: Sequence[torch.Tensor], groups: Sequence[Group]) -> list[torch.Tensor]:
    """Causal attention inside the streams of each group; `flat` are queries, keys and values, token by token."""
    return [_attend(*(_take(x, group.queries_GL) for x in flat), causal=True) for group in groups]


class SegmentAttention:
    """Unmasked attention call by call over groups of runs: the default without a fused kernel.

    frame_group: processes that share the frames; each holds a part of them, and `cross_plan` is over that part.
    streams: the tokens laid end to end, when FlashAttention does the self-attention.
    windows: chunks of queries with their masks, when tokens see the latest of their stream alone; the others are not
    asked then.
    """

    def __init__(
        self,
        self_plan: AttentionPlan | None,
        cross_plan: AttentionPlan,
        frame_group=None,
        streams: PackedStreams | None = None,
        windows: WindowPlan | None = None,
    ):
        self.self_plan = self_plan
        self.cross_plan = cross_plan
        self.frame_group = frame_group
        self.streams = streams
        self.windows = windows

    def self_attention(self, layer, q_TRAD, k_TRBD, v_TRBD):
        tokens, rows = q_TRAD.shape[:2]
        if self.windows is not None:
            flat = [x.flatten(0, 1) for x in (q_TRAD, k_TRBD, v_TRBD)]
            results = _attend_whole(flat, self.windows.whole)
            for group in self.windows.groups:
                seen = [_take(x, group.keys_GK) for x in flat[1:]]
                results.append(_attend(_take(flat[0], group.queries_GL), *seen, group.mask_GLK[:, None]))
            return _collect(results, self.windows, tokens, rows, q_TRAD)
        if self.streams is not None:
            return packed_causal_attention(q_TRAD, k_TRBD, v_TRBD, self.streams)
        if self.self_plan is None:
            mixed = _attend(*(x.transpose(0, 1) for x in (q_TRAD, k_TRBD, v_TRBD)), causal=True)
            return mixed.transpose(0, 1).reshape(tokens, rows, -1)
        flat = [x.flatten(0, 1) for x in (q_TRAD, k_TRBD, v_TRBD)]
        return _collect(_attend_whole(flat, self.self_plan.groups), self.self_plan, tokens, rows, q_TRAD)

    def cross_attention(self, layer, q_TRAD, k_NPBD, v_NPBD):
        tokens, rows = q_TRAD.shape[:2]
        if self.frame_group is not None:
            return frame_parallel_attention(q_TRAD, k_NPBD, v_NPBD, self.cross_plan, self.frame_group)
        if not self.cross_plan.groups:
            return touch(q_TRAD.new_zeros(tokens, rows, q_TRAD.shape[2] * q_TRAD.shape[3]), (q_TRAD, k_NPBD, v_NPBD))
        q = q_TRAD.flatten(0, 1)
        results = []
        for group in self.cross_plan.groups:
            seen = [frames_of(group, x).flatten(1, 2) for x in (k_NPBD, v_NPBD)]
            results.append(_attend(_take(q, group.queries_GL), *seen))
        return _collect(results, self.cross_plan, tokens, rows, q_TRAD)


class DenseAttention:
    """Full boolean masks: slow and large, the independent check of the other backends."""

    def __init__(self, self_mask_RTT: torch.Tensor, cross_mask_RTN: torch.Tensor):
        self.self_mask_RTT = self_mask_RTT
        self.cross_mask_RTN = cross_mask_RTN

    def self_attention(self, layer, q_TRAD, k_TRBD, v_TRBD):
        q, k, v = (x.transpose(0, 1) for x in (q_TRAD, k_TRBD, v_TRBD))
        return _attend(q, k, v, mask=self.self_mask_RTT[:, None]).flatten(2).transpose(0, 1)

    def cross_attention(self, layer, q_TRAD, k_NPBD, v_NPBD):
        rows = q_TRAD.shape[1]
        mask_RTK = self.cross_mask_RTN.repeat_interleave(k_NPBD.shape[1], dim=2)
        blind_RT1 = ~mask_RTK.any(-1, keepdim=True)
        keys, values = (x.flatten(0, 1)[None].expand(rows, -1, -1, -1) for x in (k_NPBD, v_NPBD))
        # A row without a single True has no softmax; let it attend anywhere and set its result to zero.
        mixed = _attend(q_TRAD.transpose(0, 1), keys, values, mask=(mask_RTK | blind_RT1)[:, None]).flatten(2)
        return mixed.masked_fill(blind_RT1, 0.0).transpose(0, 1)
