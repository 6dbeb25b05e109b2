"""Attention through FlexAttention's fused kernel over block masks (`block_mask.py`), un-repeated grouped keys.

Shape suffixes: T tokens, R rows, N frames (a rectangle of rows), P vision tokens of a frame, A query heads, B key/value
heads, D head width; AD = heads and width joined.
"""

import functools
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from moss_train.data.batch import Batch
from moss_train.errors import ConfigError
from moss_train.model.block_mask import block_mask, cross_ranges, self_ranges
from moss_train.model.recompute import touch

#: queries × keys of a block; what the kernel works on at a time must divide it. A stream has a few tokens a frame, so
#: the tokens of a block see frames that differ by the block's tokens over that: smaller blocks compute less in vain.
CROSS_BLOCK = (128, 128)
SELF_BLOCK = (128, 128)


@functools.cache
def _kernel(device_type: str) -> Callable[..., torch.Tensor]:
    # On CUDA the kernel exists only compiled; lengths change from batch to batch. On the CPU the plain function
    # computes every pair and masks: slow, for tests.
    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention


class FlexAttention:
    """Both kinds of attention of a batch whose frames are all held, in a rectangle of rows."""

    def __init__(self, batch: Batch, reference_compat: bool, tokens_per_frame: int, device: torch.device):
        if device.type == "cpu" and torch.is_grad_enabled():
            raise ConfigError("model.attention=flex: FlexAttention has no backward pass on CPUs; use segments")
        self.self_mask = block_mask(self_ranges(batch, device), SELF_BLOCK)
        self.cross_mask: BlockMask | None = None
        if batch.frames:
            ranges = cross_ranges(batch, reference_compat, tokens_per_frame, device)
            self.cross_mask = block_mask(ranges, CROSS_BLOCK)
            self._sees_TR1 = ranges.sees_RT().T[..., None]

    def self_attention(self, layer: int, q_TRAD, k_TRBD, v_TRBD) -> torch.Tensor:
        """See `attention.AttentionBackend`."""
        return self._attend(q_TRAD, *(x.permute(1, 2, 0, 3) for x in (k_TRBD, v_TRBD)), self.self_mask)

    def cross_attention(self, layer: int, q_TRAD, k_NPBD, v_NPBD) -> torch.Tensor:
        """See `attention.AttentionBackend`."""
        tokens, rows, heads, width = q_TRAD.shape
        if self.cross_mask is None:
            return touch(q_TRAD.new_zeros(tokens, rows, heads * width), (q_TRAD, k_NPBD, v_NPBD))
        keys, values = (x.unflatten(0, (rows, -1)).flatten(1, 2).transpose(1, 2) for x in (k_NPBD, v_NPBD))
        mixed = self._attend(q_TRAD, keys, values, self.cross_mask)
        # What a kernel makes of a query without a key is its own affair.
        return torch.where(self._sees_TR1, mixed, 0.0)

    def _attend(self, q_TRAD, keys_RBKD, values_RBKD, mask: BlockMask) -> torch.Tensor:
        q_RATD = q_TRAD.permute(1, 2, 0, 3)
        mixed = _kernel(q_TRAD.device.type)(
            q_RATD, keys_RBKD, values_RBKD, block_mask=mask, enable_gqa=q_RATD.shape[1] != keys_RBKD.shape[1]
        )
        return mixed.permute(2, 0, 1, 3).flatten(2)
