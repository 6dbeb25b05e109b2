"""Who encodes a microbatch's frames, when, and how the features reach the cross layers (`layout.frame_shard`).

`tp`: the first stage's processes encode their shares inside the schedule, with a graph. `model_parallel`: every process
encodes its share of every microbatch before the schedule, without a graph; after the schedule the gradients of the
features return and the encoder is run again with one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moss_train.data.batch import Batch, FrameShare
from moss_train.model.distinct_frames import DistinctFrames
from moss_train.model.video_model import VideoModel
from moss_train.parallel.frame_gather import (
    SharePlan,
    from_first_stage,
    gather_over_tensor,
    plan_shares,
    to_first_stage,
)
from moss_train.parallel.groups import ParallelState
from moss_train.parallel.phases import beat


@dataclass
class _Encoded:
    """What one microbatch's encoding left behind until its gradients return."""

    plan: SharePlan
    distinct: DistinctFrames  #: the pixels of this process's share, where they were decoded
    own_NPH: torch.Tensor  #: what this process encoded
    pooled_NPD: torch.Tensor | None  #: what the projector read, kept when only the projector is trained
    brought_NPH: torch.Tensor | None  #: first stage: what this tensor rank's processes of all stages encoded


class FrameFeatures:
    """Features of the frames of one step's microbatches, on the first stage."""

    def __init__(
        self,
        state: ParallelState,
        encoder: Callable[..., torch.Tensor] | None,
        model: VideoModel,
        trains_tower: bool,
        trains_projector: bool,
        backward: Callable[[torch.Tensor, torch.Tensor], None] = torch.autograd.backward,
    ):
        """`encoder`: a `FrameEncoder` of `model`, wrapped or not; None where this process encodes nothing.
        `backward`: (features, their gradient) → gradients of the encoder."""
        self._state = state
        self._encoder, self._model = encoder, model
        self._trains_tower = trains_tower
        self._trained = trains_tower or trains_projector
        self._backward = backward
        self._ahead = state.layout.sharding == "model_parallel" and state.pipeline_ranks > 1
        self._returns_gradients = False
        self._encoded: list[_Encoded | None] = []

    def begin(self, microbatches: Sequence[Batch], plans: Sequence[SharePlan], training: bool) -> None:
        """Encode ahead what is encoded before the schedule. `training`: gradients will follow."""
        self._returns_gradients = training and self._trained
        if self._ahead:
            self._encoded = [
                self._encode_ahead(batch, plan) if batch.frames else None
                for batch, plan in zip(microbatches, plans, strict=True)
            ]

    def of(self, number: int, batch: Batch, plan: SharePlan) -> torch.Tensor | None:
        """Features [N, P, H] of the part of microbatch `number` that this process attends to; first stage only."""
        if not batch.frames:
            return None
        if self._ahead:
            encoded = self._encoded[number]
            assert encoded is not None and encoded.brought_NPH is not None
            return gather_over_tensor(encoded.brought_NPH, plan, self._state.tensor_group)
        distinct = self._model.distinct_frames(batch.frames_NCHW).to(self._state.device)
        own_NPH = distinct.spread(self._encoder(distinct.pixels_DCHW))
        return gather_over_tensor(own_NPH, plan, self._state.tensor_group)

    def finish(self) -> None:
        """Bring the gradients of what was encoded ahead to its encoders, and through them; forget it."""
        for encoded in self._encoded:
            if encoded is not None and self._returns_gradients:
                self._backward_one(encoded)
        self._encoded = []

    @torch.no_grad()
    def _encode_ahead(self, batch: Batch, plan: SharePlan) -> _Encoded:
        beat()
        pooled_NPD = None
        held = self._model.distinct_frames(batch.frames_NCHW)
        distinct = held.to(self._state.device)
        pixels = distinct.pixels_DCHW
        if self._returns_gradients and not self._trains_tower and len(pixels):
            pooled_NPD = self._model.pooled_features(pixels)
        own_NPH = distinct.spread(self._encoder(pixels, pooled_NPD))
        brought_NPH = to_first_stage(own_NPH, plan, self._state)
        if brought_NPH is not None:
            brought_NPH.requires_grad_(self._returns_gradients)
        return _Encoded(plan, held, own_NPH, pooled_NPD, brought_NPH)

    def _backward_one(self, encoded: _Encoded) -> None:
        beat()
        grad = encoded.brought_NPH.grad if encoded.brought_NPH is not None else None
        if encoded.brought_NPH is not None and grad is None:
            grad = torch.zeros_like(encoded.brought_NPH)
        own_grad_NPH = from_first_stage(grad, encoded.plan, self._state, like=encoded.own_NPH)
        if len(own_grad_NPH):
            distinct = encoded.distinct.to(self._state.device)
            features_DPH = self._encoder(distinct.pixels_DCHW, encoded.pooled_NPD)
            self._backward(distinct.spread(features_DPH), own_grad_NPH)


def plans_of(microbatches: Sequence[Batch], state: ParallelState) -> list[SharePlan]:
    """Which frames of each microbatch lie where."""
    return [plan_shares(batch.frame_bounds, state) for batch in microbatches]


def own_share(state: ParallelState) -> FrameShare:
    """Which of a microbatch's frames this process decodes and encodes."""
    return FrameShare(state.share_rank, state.share_ranks)


def received(batch: Batch, state: ParallelState) -> Batch:
    """The batch cut to this process's share of frames, if the loader has not done it, and what only the host can say
    without waiting for the device."""
    return (batch if batch.frame_bounds else batch.share(own_share(state))).counted()


def is_of_encoder(name: str) -> bool:
    """Whether a parameter belongs to what encodes frames: the vision tower and the projector."""
    return name.startswith(("vision_tower.", "projector."))


def sees_a_part(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether each tensor-parallel process applies a parameter, which all hold alike, to a part of the work alone."""
    return is_of_encoder(name) or getattr(parameter, "partial_over_tensor_group", False)
