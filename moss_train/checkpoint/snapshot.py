"""Copies of pieces in host memory, so that training can go on while they are written."""

from collections.abc import Sequence

import torch

from moss_train.engines.pieces import Piece


class Snapshot:
    """Buffers that are kept from save to save: memory that was used before is several times faster to copy into than
    fresh pages, and pinned memory is dear to allocate."""

    def __init__(self) -> None:
        self._buffers: dict[tuple, torch.Tensor] = {}

    def take(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces with tensors of the snapshot's own, on the CPU; valid until the next call. Those of `constant`
        ones are not copied. Returns when every copy is made."""
        buffers: dict[tuple, torch.Tensor] = {}
        copies = []
        on_device = None
        for piece in pieces:
            if piece.constant:
                copies.append(piece)
                continue
            key = (piece.name, piece.offsets, tuple(piece.tensor.shape), piece.tensor.dtype)
            buffer = self._buffers.get(key)
            if buffer is None:
                pinned = piece.tensor.is_cuda
                buffer = torch.empty(piece.tensor.shape, dtype=piece.tensor.dtype, pin_memory=pinned)
            buffer.copy_(piece.tensor, non_blocking=True)
            on_device = piece.tensor.device if piece.tensor.is_cuda else on_device
            buffers[key] = buffer
            copies.append(Piece(piece.name, piece.whole, piece.offsets, buffer))
        if on_device is not None:
            torch.cuda.current_stream(on_device).synchronize()
        self._buffers = buffers  # what is no longer saved is freed
        return copies
