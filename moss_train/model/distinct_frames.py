"""Frames that look the same are encoded once: a static camera, two streams cut from one clip.

Shape suffixes: N frames, D of them that differ, C colours, H, W pixels, P vision tokens of a frame.
"""

from typing import NamedTuple

import torch
import xxhash


class DistinctFrames(NamedTuple):
    """The frames that must be encoded, and which of them each frame is."""

    pixels_DCHW: torch.Tensor
    frame_of_N: torch.Tensor | None  #: int64, place among the D; None: no two frames are alike

    @classmethod
    def among(cls, frames_NCHW: torch.Tensor) -> "DistinctFrames":
        """Frames are compared where they are decoded, on the CPU, by a 128-bit hash of their bytes. Frames on another
        device are taken as they are: to compare them the host would wait for it."""
        if frames_NCHW.device.type != "cpu" or len(frames_NCHW) < 2:
            return cls(frames_NCHW, None)
        places: dict[bytes, int] = {}
        kept, frame_of = [], []
        for number, picture in enumerate(frames_NCHW.contiguous().view(torch.uint8).numpy()):
            key = xxhash.xxh3_128_digest(picture)
            if key not in places:
                places[key] = len(kept)
                kept.append(number)
            frame_of.append(places[key])
        if len(kept) == len(frame_of):
            return cls(frames_NCHW, None)
        return cls(frames_NCHW[torch.tensor(kept)], torch.tensor(frame_of))

    def to(self, device: torch.device) -> "DistinctFrames":
        """The same on `device`."""
        of_N = None if self.frame_of_N is None else self.frame_of_N.to(device, non_blocking=True)
        return DistinctFrames(self.pixels_DCHW.to(device, non_blocking=True), of_N)

    def spread(self, features_DPH: torch.Tensor) -> torch.Tensor:
        """What was made of the distinct frames, [D, …], for every frame: [N, …]. Gradients of copies are summed, in
        float32 at least."""
        return features_DPH if self.frame_of_N is None else _Spread.apply(features_DPH, self.frame_of_N)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features_DPH, frame_of_N):
        ctx.save_for_backward(frame_of_N)
        ctx.count = len(features_DPH)
        return features_DPH.index_select(0, frame_of_N)

    @staticmethod
    def backward(ctx, grad_NPH):
        (frame_of_N,) = ctx.saved_tensors
        exact = torch.promote_types(grad_NPH.dtype, torch.float32)
        summed = grad_NPH.new_zeros(ctx.count, *grad_NPH.shape[1:], dtype=exact)
        return summed.index_add_(0, frame_of_N, grad_NPH.to(exact)).to(grad_NPH.dtype), None
