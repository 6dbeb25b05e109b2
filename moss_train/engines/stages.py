"""The modules that an engine with pipeline stages wraps, the frame encoder and each chunk of the decoder, and what they
are called with."""

from collections.abc import Callable, Sequence

import torch
from megatron.core.enums import ModelType
from torch import nn

from moss_train.data.batch import Batch
from moss_train.engines.frames import FrameFeatures
from moss_train.model.layers import LayerInputs
from moss_train.model.predictions import Predictions
from moss_train.model.recompute import touch
from moss_train.model.video_model import VideoModel
from moss_train.parallel.frame_gather import SharePlan
from moss_train.parallel.message import message_length, pack_message, unpack_message
from moss_train.parallel.phases import beat


class FrameEncoder(nn.Module):
    """Vision tower and projector, which run on other processes and at other times than the decoder's first layers."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, model: VideoModel):
        super().__init__()
        self.vision_tower = model.vision_tower
        self.projector = model.projector
        # In a tuple, so that its parameters are not registered here a second time.
        self._model = (model,)

    def forward(self, frames_NCHW: torch.Tensor, pooled_NPD: torch.Tensor | None = None) -> torch.Tensor:
        """Features [N, P, H] of frames; `pooled_NPD` is what the tower made of them earlier, if it did."""
        if not len(frames_NCHW):
            # Not run, but part of the backward pass: other processes wait for this one where gradients return.
            sizes = self._model[0].sizes
            weight = self.projector.weight
            return touch(weight.new_zeros(0, sizes.tokens_per_frame, weight.shape[0]), self.parameters())
        return self.projector(self._model[0].pooled_features(frames_NCHW) if pooled_NPD is None else pooled_NPD)


class DecoderChunk(nn.Module):
    """One pipeline chunk: some layers, with the embedding before the first and the heads behind the last."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, model: VideoModel, virtual: int):
        super().__init__()
        self.is_first = model.part.embedding and virtual == 0
        self.is_last = model.part.head and virtual == len(model.part.chunks) - 1
        self.virtual = virtual
        if self.is_first:
            self.embedding = model.embedding
        first, end = model.part.chunks[virtual]
        self.layers = nn.ModuleList(model.layers[str(index)] for index in range(first, end))
        if self.is_last:
            self.final_norm, self.head = model.final_norm, model.head
            if model.sizes.decision_head:
                self.decision_head = model.decision_head
        self._model = (model,)
        self._received: torch.Tensor | None = None

    def set_input_tensor(self, tensors: list[torch.Tensor | None] | torch.Tensor | None) -> None:
        """Called before `forward` with the message of the chunk before, None for the first."""
        self._received = tensors[0] if isinstance(tensors, list) else tensors

    def forward(
        self,
        ids_TR: torch.Tensor,
        inputs: LayerInputs,
        features_NPH: torch.Tensor | None,
        hidden_shape: tuple[int, int],
        features_shape: tuple[int, int] | None,
        message_length: int,
    ) -> torch.Tensor | Predictions:
        """Predictions from the last chunk, else the message [S, 1, H] for the next one.

        `features_NPH` is read by the first chunk alone; later ones take the features from the message. The
        shapes are those of the hidden state [T, R] and of the features [N, P] that travel with it, None without.
        """
        if self.is_first:
            x_TRH = self.embedding(ids_TR)
        else:
            x_TRH, features_NPH = unpack_message(self._received, hidden_shape, features_shape)
        inputs = inputs.with_features(features_NPH)
        for layer in self.layers:
            x_TRH = layer(x_TRH, inputs, self._model[0].recompute)
        if self.is_last:
            return self._model[0].read_out(x_TRH, inputs.head_places_K)
        return pack_message(x_TRH, features_NPH, message_length)


class ChunkCalls:
    """The microbatches of one step, and what the chunks of this process are called with for each."""

    def __init__(
        self,
        model: VideoModel,
        frames: FrameFeatures,
        batches: Sequence[Batch],
        plans: Sequence[SharePlan],
        token_ranks: int,
    ):
        """`token_ranks`: over how many processes the tokens between matrices are split."""
        self._model, self._frames, self._batches, self._plans = model, frames, batches, plans
        self._token_ranks = token_ranks
        self._inputs: dict[int, LayerInputs] = {}
        self.message_length = max(
            message_length(*self._hidden_shape(batch), plan.frames, model.sizes.tokens_per_frame)
            for batch, plan in zip(batches, plans, strict=True)
        )

    def forward(
        self, number: int, chunk: DecoderChunk, call: Callable[..., torch.Tensor | Predictions]
    ) -> torch.Tensor | Predictions:
        """Run one chunk on microbatch `number`, through `call`: the chunk itself, or what wraps it."""
        beat()
        batch, plan = self._batches[number], self._plans[number]
        if number not in self._inputs:
            held = None if plan.frames == batch.frames else (plan.first, plan.end)
            self._inputs[number] = self._model.layer_inputs(batch, held, trained_only=True)
        inputs = self._inputs[number]
        features_NPH = self._frames.of(number, batch, plan) if chunk.is_first else None
        if chunk.virtual == len(self._model.part.chunks) - 1:
            del self._inputs[number]
        features_shape = (plan.frames, self._model.sizes.tokens_per_frame) if batch.frames else None
        return call(
            batch.ids_RT.T, inputs, features_NPH, self._hidden_shape(batch), features_shape, self.message_length
        )

    def _hidden_shape(self, batch: Batch) -> tuple[int, int]:
        rows, tokens = batch.ids_RT.shape
        return tokens // self._token_ranks, rows
