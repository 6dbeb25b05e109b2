"""Making every process run the same modules, whatever its data: blank frames where there are none.

DeepSpeed sums gradients bucket by bucket in the order in which they come, and ZeRO-3 gathers each module's weights when
it runs. A process that left out the tower, or ran it once more, would sum other gradients than its neighbours, or wait
for ever. So a batch without frames gets a blank one that no token sees (which changes nothing: such tokens get exactly
zero from the cross layers), and a process whose share of the frames is empty encodes a blank one and drops the result.
"""

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
import torch.distributed as dist

from moss_train.data.batch import Batch, FrameShare
from moss_train.model.distinct_frames import DistinctFrames
from moss_train.model.video_model import VideoModel
from moss_train.parallel.groups import ParallelState
from moss_train.streams.compiled import IGNORED_LABEL


def even_microbatches(batches: Sequence[Batch], state: ParallelState) -> list[Batch]:
    """As many microbatches as the process with most of them has: the own ones, then blank ones. Collective."""
    most = torch.tensor(len(batches), device=state.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return [*batches, *[blank_batch(batches[0])] * (int(most) - len(batches))]


def blank_batch(like: Batch) -> Batch:
    """One padding token and no frame: what the loader gives a process that has nothing left."""
    tokens = {one.name: getattr(like, one.name)[:1, :1].clone() for one in fields(like) if one.name.endswith("_RT")}
    blank = {name: torch.zeros_like(tensor) for name, tensor in tokens.items()}
    blank["labels_RT"].fill_(IGNORED_LABEL)
    for name in ("segments_RT", "origins_RT", "contrasts_RT"):
        blank[name].fill_(-1)
    return replace(
        like,
        **blank,
        frames_NCHW=like.frames_NCHW[:0],
        frame_rows_N=like.frame_rows_N[:0],
        frame_slots_N=like.frame_slots_N[:0],
        frame_positions_RF=like.frame_positions_RF[:1, :0],
        frame_counts_R=torch.zeros_like(like.frame_counts_R[:1]),
        frame_bounds=(),
        trained_K=None,
        keys=((),),
        sources=((),),
    )


def with_frames(batch: Batch, share: FrameShare) -> Batch:
    """The batch, with a blank frame in its first row if it has no frames at all."""
    if batch.frames:
        return batch
    bounds = share.bounds(1)
    first, end = share.of(bounds)
    counts = torch.zeros_like(batch.frame_counts_R)
    counts[0] = 1
    positions = batch.frame_positions_RF
    return replace(
        batch,
        frames_NCHW=batch.frames_NCHW.new_zeros(end - first, *batch.frames_NCHW.shape[1:]),
        frame_rows_N=batch.frame_rows_N.new_zeros(1),
        frame_slots_N=batch.frame_slots_N.new_zeros(1),
        frame_positions_RF=positions.new_zeros(positions.shape[0], 1),
        frame_counts_R=counts,
        frame_bounds=bounds,
    )


class EvenEncoder:
    """The tower and the projector of a model, run equally often on every process."""

    def __init__(self, model: VideoModel, state: ParallelState):
        self._model, self._state = model, state

    def distinct(self, batches: Sequence[Batch]) -> list[DistinctFrames]:
        """The pixels of this process's share of each microbatch, where they were decoded."""
        return [self._model.distinct_frames(batch.frames_NCHW) for batch in batches]

    def most_chunks(self, microbatches: Sequence[DistinctFrames]) -> list[int]:
        """Of each microbatch: in how many parts the process with most frames sends them through the tower. Collective
        when frames go in parts (`engine.recompute.tower_frames`)."""
        size = self._model.recompute.tower_frames
        if size is None:
            return [1] * len(microbatches)
        chunks = [max(1, -(-len(distinct.pixels_DCHW) // size)) for distinct in microbatches]
        most = torch.tensor(chunks, device=self._state.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return most.tolist()

    def encode(self, distinct: DistinctFrames, chunks: int) -> torch.Tensor:
        """Features [N, P, H] of this process's frames, of which there may be none."""
        size, pixels = self._model.recompute.tower_frames, distinct.pixels_DCHW
        own, needed = len(pixels), 1 if size is None else size * (chunks - 1) + 1
        if own < needed:
            pixels = torch.cat([pixels, pixels.new_zeros(needed - own, *pixels.shape[1:])])
        return distinct.spread(self._model.encode_each(pixels)[:own])
