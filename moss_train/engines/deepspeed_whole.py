"""Forward and backward passes of a DeepSpeed engine without pipeline stages: one microbatch after the other."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moss_train.data.batch import Batch
from moss_train.engines.even_work import EvenEncoder, even_microbatches, with_frames
from moss_train.engines.frames import own_share, plans_of, received, sees_a_part
from moss_train.engines.gradients import sum_as_they_arise
from moss_train.model.distinct_frames import DistinctFrames
from moss_train.model.predictions import Predictions
from moss_train.model.video_model import VideoModel
from moss_train.objectives.streaming_loss import LossOutput, StreamingLoss, detached
from moss_train.parallel.frame_gather import SharePlan, gather_over_tensor
from moss_train.parallel.groups import ParallelState
from moss_train.parallel.phases import beat


class WholePasses:
    """See `deepspeed.Passes`. Every process holds all layers."""

    def __init__(
        self,
        model: VideoModel,
        trained: Mapping[str, nn.Parameter],
        objective: StreamingLoss,
        parallel: ParallelState,
    ):
        self.module = _Step(model, parallel)
        self._objective, self._parallel = objective, parallel
        self._encoder = EvenEncoder(model, parallel)
        self._sum_partial_gradients(trained)

    def attach(self, engine: Any) -> None:
        """See `deepspeed.Passes.attach`."""
        self._engine = engine

    def batches(self, microbatches: Sequence[Batch]) -> list[Batch]:
        """See `deepspeed.Passes.batches`."""
        return [
            with_frames(received(batch, self._parallel), own_share(self._parallel))
            for batch in even_microbatches(microbatches, self._parallel)
        ]

    def run(self, batches: Sequence[Batch], totals: torch.Tensor, training: bool) -> list[LossOutput]:
        """See `deepspeed.Passes.run`."""
        state = self._parallel
        self._engine.train(training)
        outputs = []
        distinct = self._encoder.distinct(batches)
        calls = zip(batches, plans_of(batches, state), distinct, self._encoder.most_chunks(distinct), strict=True)
        for number, (batch, plan, frames, chunks) in enumerate(calls, start=1):
            beat()
            encode = _Encode(self._encoder, frames.to(state.device), chunks)
            if not training:
                outputs.append(self._objective(self._engine.module(batch, plan, encode), batch, totals))
                continue
            self._engine.set_gradient_accumulation_boundary(number == len(batches))
            output = self._objective(self._engine(batch, plan, encode), batch, totals)
            # DeepSpeed averages over the processes that hold the same parameters, data × frame ranks.
            self._engine.backward(output.loss * state.data_ranks, scale_wrt_gas=False)
            outputs.append(detached(output))
        return outputs

    def step(self) -> None:
        """See `deepspeed.Passes.step`."""
        self._engine.step()

    def _sum_partial_gradients(self, trained: Mapping[str, nn.Parameter]) -> None:
        """From now on, gradients of what tensor-parallel processes hold alike but apply to different tokens, heads or
        frames are summed over them as they arise, in float32.

        They arise in the same order on all of them (`even_work`), before DeepSpeed takes them."""
        group = self._parallel.tensor_group
        if group.size() > 1:
            sum_as_they_arise([one for name, one in trained.items() if sees_a_part(name, one)], group)


class _Encode:
    """One microbatch's frames, ready to be encoded: handed to the module that DeepSpeed wraps."""

    def __init__(self, encoder: EvenEncoder, frames: DistinctFrames, chunks: int):
        self._encoder, self._frames, self._chunks = encoder, frames, chunks

    def __call__(self) -> torch.Tensor:
        return self._encoder.encode(self._frames, self._chunks)


class _Step(nn.Module):
    """What DeepSpeed wraps: one microbatch from pixels and ids to predictions."""

    def __init__(self, model: VideoModel, state: ParallelState):
        super().__init__()
        self.model = model
        self._state = state

    def forward(self, batch: Batch, plan: SharePlan, encode: _Encode) -> Predictions:
        """Logits [K, V of this rank] of the trained positions, and the decision head's."""
        features_NPH = gather_over_tensor(encode(), plan, self._state.tensor_group)
        held = None if plan.frames == batch.frames else (plan.first, plan.end)
        inputs = self.model.layer_inputs(batch, held, trained_only=True)
        return self.model.predict(batch.ids_RT.T, inputs.with_features(features_NPH))
