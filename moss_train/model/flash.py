"""Self-attention of packed rows through FlashAttention's kernel for sequences of unequal length (`flash-attn`).

Streams are laid end to end without padding; the kernel attends causally inside each, with un-repeated grouped keys and
values. Shape suffixes: T tokens, R rows, S places of the streams laid end to end, A query heads, B key/value heads,
D head width; AD = heads and width joined.
"""

from dataclasses import dataclass

import numpy as np
import torch

from moss_train.model.recompute import touch

_DTYPES = (torch.float16, torch.bfloat16)
_CAPABILITY = (8, 0)
_WIDEST_HEAD = 256
_HEAD_MULTIPLE = 8


@dataclass(frozen=True)
class PackedStreams:
    """Where the tokens of a batch's streams are when they are laid end to end, row by row, without padding."""

    token_of_place_S: torch.Tensor  #: int64, flat token index t * R + r
    place_of_token: torch.Tensor  #: int64 [T * R]; S for padding
    cu_seqlens: torch.Tensor  #: int32 [streams + 1], where each stream begins, and S
    longest: int  #: tokens of the longest stream
    in_order: bool  #: places and flat token indices are the same: nothing needs to be moved


def flash_attention_problem(dtype: torch.dtype, device: torch.device, head_size: int) -> str | None:
    """Why `packed_causal_attention` cannot take such tensors in this process; None when it can."""
    if dtype not in _DTYPES:
        return f"FlashAttention takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if device.type != "cuda":
        return f"FlashAttention needs a CUDA device, not {device.type}"
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        return "FlashAttention needs compute capability 8.0 or higher (Ampere)"
    if head_size > _WIDEST_HEAD or head_size % _HEAD_MULTIPLE:
        return f"FlashAttention takes heads of a width that {_HEAD_MULTIPLE} divides, up to {_WIDEST_HEAD}"
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError as error:
        return f"FlashAttention is not installed (extra `gpu`): {error}"
    return None


def flash_attention_available(dtype: torch.dtype, device: torch.device, head_size: int) -> bool:
    """Whether `packed_causal_attention` takes tensors of this dtype and head width on this device."""
    return flash_attention_problem(dtype, device, head_size) is None


def lay_out_streams(segments_RT: torch.Tensor, device: torch.device) -> PackedStreams:
    """From the stream number of each token (`Batch.segments_RT`, below zero for padding); once per batch."""
    segments = segments_RT.cpu().numpy()
    rows, tokens = segments.shape
    begins = np.ones((rows, tokens), dtype=bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    row, token = np.nonzero(segments >= 0)
    token_of_place = token * rows + row
    cu_seqlens = np.append(np.flatnonzero(begins[row, token]), len(row))
    place_of_token = np.full(tokens * rows, len(row))
    place_of_token[token_of_place] = np.arange(len(row))
    return PackedStreams(
        torch.from_numpy(token_of_place).to(device),
        torch.from_numpy(place_of_token).to(device),
        torch.from_numpy(cu_seqlens.astype(np.int32)).to(device),
        longest=int(np.diff(cu_seqlens).max(initial=0)),
        in_order=rows == 1 and len(row) == tokens,
    )


def packed_causal_attention(
    q_TRAD: torch.Tensor, k_TRBD: torch.Tensor, v_TRBD: torch.Tensor, streams: PackedStreams
) -> torch.Tensor:
    """Causal attention inside each stream, [T, R, AD]; exactly zero for padding.

    Inputs: float16 or bfloat16 on a CUDA device, see `flash_attention_problem`. The backward pass adds in an order that
    varies from run to run, unless torch.use_deterministic_algorithms is on.
    """
    from flash_attn import flash_attn_varlen_func

    tokens, rows = q_TRAD.shape[:2]
    if streams.longest == 0:
        return touch(q_TRAD.new_zeros(tokens, rows, q_TRAD.shape[2] * q_TRAD.shape[3]), (q_TRAD, k_TRBD, v_TRBD))
    packed = [x.flatten(0, 1) for x in (q_TRAD, k_TRBD, v_TRBD)]
    if not streams.in_order:
        packed = [x.index_select(0, streams.token_of_place_S) for x in packed]
    mixed_SAD = flash_attn_varlen_func(
        *packed,
        cu_seqlens_q=streams.cu_seqlens,
        cu_seqlens_k=streams.cu_seqlens,
        max_seqlen_q=streams.longest,
        max_seqlen_k=streams.longest,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    if not streams.in_order:
        zero = mixed_SAD.new_zeros(1, *mixed_SAD.shape[1:])
        mixed_SAD = torch.cat([mixed_SAD, zero]).index_select(0, streams.place_of_token)
    return mixed_SAD.reshape(tokens, rows, -1)
