"""The model: vision tower, projector, and a decoder whose cross layers look at the frames.

Shape suffixes: R rows, T tokens, N frames held (of a batch or of this process's part of it), P vision tokens of a
frame, C colours, H decoder width, V rows of the head.
"""

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import nn

from moss_train.data.batch import Batch
from moss_train.model import modules, parts, visibility
from moss_train.model.attention import AttentionBackend, DenseAttention, SegmentAttention
from moss_train.model.config import ModelConfig, RecomputeConfig
from moss_train.model.decision_head import DecisionHead
from moss_train.model.distinct_frames import DistinctFrames
from moss_train.model.flash import flash_attention_available, lay_out_streams
from moss_train.model.flex import FlexAttention
from moss_train.model.layers import CrossLayer, LayerInputs, SelfLayer
from moss_train.model.precision import Precision
from moss_train.model.predictions import Predictions
from moss_train.model.projector import Projector, pooled_features
from moss_train.model.recompute import recomputed
from moss_train.model.rotary import RotaryTable
from moss_train.model.text_window import has_text_windows, plan_windows
from moss_train.model.vision_tower import GatedPositionEmbedding, VisionTower


def megatron_config(
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    tensor_ranks: int = 1,
    sequence_parallel: bool = False,
    initialise: bool = True,
    fp8: bool = False,
) -> TransformerConfig:
    """The part of the sizes that megatron-core's layers, optimizer and schedules read."""
    text = config.text
    return TransformerConfig(
        num_layers=text.layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.mlp_size,
        num_attention_heads=text.attention_heads,
        num_query_groups=text.key_value_heads,
        normalization="RMSNorm",
        add_bias_linear=False,
        layernorm_epsilon=text.norm_eps,
        tensor_model_parallel_size=tensor_ranks,
        sequence_parallel=sequence_parallel,
        perform_initialization=initialise,
        init_method=lambda weight: nn.init.normal_(weight, std=config.init_std),
        # Residual branches start smaller with depth (GPT-2), so deep fresh models train from the first step.
        output_layer_init_method=lambda weight: nn.init.normal_(weight, std=config.init_std / (2 * text.layers) ** 0.5),
        # On the GPU megatron would draw weights that depend on the layout, and ignore `torch.device("meta")`.
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **Precision.of(dtype, fp8).megatron_options(),
    )


class Embedding(nn.Module):
    """Token embedding whose input-only rows (the anchor) are a parameter of their own.

    Ids at and above the vocabulary size have no row in the head. Keeping them apart lets a stage freeze the
    text embedding and still train the anchor's.
    """

    def __init__(self, config: ModelConfig, megatron: TransformerConfig, group):
        super().__init__()
        text = config.text
        self.vocabulary_size = text.vocabulary_size
        self.group = group if megatron.sequence_parallel else None
        self.text = modules.token_embedding(megatron, text.vocabulary_size, text.hidden_size, group)
        self.extra = nn.Parameter(torch.empty(text.extra_embedding_rows, text.hidden_size, dtype=megatron.params_dtype))
        if megatron.perform_initialization:
            megatron.init_method(self.extra)

    def forward(self, ids_TR: torch.Tensor) -> torch.Tensor:
        """Ids to embeddings [T, R, H]; with sequence parallelism this rank's share of T."""
        is_extra = ids_TR >= self.vocabulary_size
        x = self.text(ids_TR.masked_fill(is_extra, 0))
        if self.extra.shape[0]:
            extra = self.extra[(ids_TR - self.vocabulary_size).clamp(min=0)]
            x = torch.where(is_extra[..., None], extra, x)
        return x if self.group is None else scatter_to_sequence_parallel_region(x, group=self.group)


def initialise_vision(tower: VisionTower, projector: Projector, config: ModelConfig) -> None:
    """Draw fresh weights of what lies before the decoder, in place."""
    for module in [*tower.modules(), projector]:
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            nn.init.normal_(module.weight, std=config.init_std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, GatedPositionEmbedding):
            nn.init.normal_(module.embedding, std=config.vision.hidden_size**-0.5)
    nn.init.normal_(tower.class_embedding, std=config.vision.hidden_size**-0.5)


class VideoModel(nn.Module):
    """The model, or what of it one process of a layout holds. Parameters have the same names in either case."""

    def __init__(
        self,
        config: ModelConfig,
        tensor_group,
        dtype: torch.dtype = torch.float32,
        part: parts.ModelPart | None = None,
        frame_group=None,
        sequence_parallel: bool = False,
        recompute: RecomputeConfig | None = None,
        initialise: bool = True,
        fp8: bool = False,
        finished: Callable[[nn.Module], object] | None = None,
    ):
        """`tensor_group`: the processes over which matrices are split (one process, when they are not).
        `frame_group`: those that share the frames of the cross layers; None or a group of one: all frames are here.
        `part`: None for the whole model. `initialise`: False leaves weights unset, for what is loaded right after.
        `fp8`: the decoder's matrices multiply in 8 bits (`model.precision`); `dtype` is bfloat16 then.
        `finished`: called with the tower, the projector, the embedding, each layer, the last norm and the heads, each
        before the next one is built, so that it can free the memory of what is not initialised.
        """
        super().__init__()

        def built(module):
            if finished is not None:
                finished(module)
            return module

        config.validate()
        self.sizes = config
        self.part = part or parts.whole(config)
        self.frame_group = frame_group if frame_group is not None and frame_group.size() > 1 else None
        self.tensor_group = tensor_group
        self.recompute = recompute or RecomputeConfig()
        # Megatron-core's wrappers look for this name.
        self.config = megatron_config(config, dtype, tensor_group.size(), sequence_parallel, initialise, fp8)
        text = config.text
        if self.part.encoder:
            self.vision_tower = built(VisionTower(config.vision).to(dtype))
            self.projector = built(Projector(config.vision.feature_size, text.hidden_size, dtype=dtype))
        if self.part.embedding:
            self.embedding = built(Embedding(config, self.config, tensor_group))
        # Keyed by number in the whole model, so that names do not depend on the layout.
        self.layers = nn.ModuleDict(
            {
                str(index): built(
                    (CrossLayer if index in text.cross_layers else SelfLayer)(index, config, self.config, tensor_group)
                )
                for first, end in self.part.chunks
                for index in range(first, end)
            }
        )
        if self.part.head:
            self.final_norm = built(modules.rms_norm(self.config, text.hidden_size))
            self.head = built(
                modules.unsummed_linear(self.config, text.hidden_size, text.vocabulary_size, tensor_group)
            )
            if config.decision_head:
                self.decision_head = built(DecisionHead(self.config, text.hidden_size, tensor_group))
        self.rotary = RotaryTable(text.hidden_size // text.attention_heads, text.rope_theta, text.rope_scaling)
        if self.part.encoder and initialise:
            initialise_vision(self.vision_tower, self.projector, config)
        self._mark_partial_gradients()

    def _mark_partial_gradients(self) -> None:
        """Say of which parameters each tensor-parallel process has only a part of the gradient, though all hold the
        whole parameter: norms of heads (each process has some heads) and, with sequence parallelism, everything applied
        to hidden states between matrices (each process has some tokens)."""
        for layer in self.decoder_layers:
            partial = []
            if isinstance(layer, CrossLayer):
                partial += [layer.attention.query_norm.weight, layer.attention.key_norm.weight]
            if self.config.sequence_parallel:
                partial += [layer.attention_norm.weight, layer.mlp_norm.weight]
                if isinstance(layer, CrossLayer):
                    partial += [layer.attention_gate, layer.mlp_gate]
            for parameter in partial:
                parameter.partial_over_tensor_group = True
        if self.part.head and self.config.sequence_parallel:
            self.final_norm.weight.partial_over_tensor_group = True

    @property
    def decoder_layers(self) -> list[SelfLayer | CrossLayer]:
        """The layers held here, in the order they run."""
        return list(self.layers.values())

    @property
    def is_whole(self) -> bool:
        """True when one process holds all layers (their matrices may be split)."""
        return self.part == parts.whole(self.sizes)

    @property
    def embedding_rows(self) -> int:
        """Ids the model accepts: the head's rows and the input-only ones."""
        return self.sizes.text.vocabulary_size + self.sizes.text.extra_embedding_rows

    def encode_frames(self, frames_NCHW: torch.Tensor) -> torch.Tensor:
        """Frames to what the cross layers attend to, [N, P, H]."""
        distinct = self.distinct_frames(frames_NCHW).to(self.projector.weight.device)
        return distinct.spread(self.encode_each(distinct.pixels_DCHW))

    def encode_each(self, frames_NCHW: torch.Tensor) -> torch.Tensor:
        """`encode_frames`, whether frames are alike or not."""
        return self.projector(self.pooled_features(frames_NCHW))

    def distinct_frames(self, frames_NCHW: torch.Tensor) -> DistinctFrames:
        """Which of the frames are encoded: those that differ, or all with `model.encode_once=false`."""
        return DistinctFrames.among(frames_NCHW) if self.sizes.encode_once else DistinctFrames(frames_NCHW, None)

    def pooled_features(self, frames_NCHW: torch.Tensor) -> torch.Tensor:
        """Tower features after pooling and before the projector, [N, P, feature_size]."""
        chunk = self.recompute.tower_frames or max(1, len(frames_NCHW))
        trained = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        again = self.recompute.tower and trained
        pooled = [recomputed(again, self._pooled_chunk, part) for part in frames_NCHW.split(chunk)]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled)

    def _pooled_chunk(self, frames_NCHW: torch.Tensor) -> torch.Tensor:
        return pooled_features(self.vision_tower(frames_NCHW), self.sizes.pool, self.sizes.pool_stride)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [T, R, V] of one microbatch whose frames are all here (this rank's columns of V when matrices are
        split). Only for a whole model; the engine drives a part."""
        return self.predictions(batch).logits

    def predictions(self, batch: Batch, trained_only: bool = False) -> Predictions:
        """`forward`, with the decision head's logits where there is one. Arguments as `layer_inputs`."""
        features_NPH = self.encode_frames(batch.frames_NCHW) if batch.frames else None
        return self.predict(batch.ids_RT.T, self.layer_inputs(batch, None, trained_only).with_features(features_NPH))

    def layer_inputs(
        self, batch: Batch, held: tuple[int, int] | None = None, trained_only: bool = False
    ) -> LayerInputs:
        """What the layers share, without the features, which `LayerInputs.with_features` adds.

        `held`: which flat frames this process holds, when it does not hold all of the batch's.
        `trained_only`: only positions with a label that is trained reach the head (`Batch.trained_places`).
        """
        device = batch.ids_RT.device
        row, slot = batch.frame_rows_N, batch.frame_slots_N
        rows, slots = batch.frame_positions_RF.shape
        places = None
        if held is not None:
            positions = batch.frame_positions_RF[row[slice(*held)], slot[slice(*held)]]
        else:
            positions = batch.frame_positions_RF.flatten()
            place = row * slots + slot
            if not torch.equal(place, torch.arange(rows * slots, device=device)):
                places = (place, rows * slots)
        return LayerInputs(
            backend=self._backend(batch, device, held),
            text_rotation=self.text_rotation(batch.positions_RT.T),
            frame_rotation=self.frame_rotation(positions),
            cross_rotation=self.text_rotation(batch.cross_positions_RT.T),
            features_NPH=None,
            sees_frames_TR1=self._own_tokens(visibility.sees_frames(batch)) if batch.frames else None,
            head_places_K=batch.trained_places() if trained_only and self.part.head else None,
            frame_places=places,
        )

    def decode(self, ids_TR: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """Run the decoder: ids [T, R] to logits [T, R, V]."""
        return self.predict(ids_TR, inputs).logits

    def predict(self, ids_TR: torch.Tensor, inputs: LayerInputs) -> Predictions:
        """`decode`, with the decision head's logits where there is one."""
        x_TRH = self.embedding(ids_TR)
        for layer in self.decoder_layers:
            x_TRH = layer(x_TRH, inputs, self.recompute)
        return self.read_out(x_TRH, inputs.head_places_K)

    def read_out(self, x_TRH: torch.Tensor, places_K: torch.Tensor | None = None) -> Predictions:
        """What the heads make of the last layer's output; where they are (`part.head`).

        places_K: flat token indices t * R + r that reach the head; None: all of them. The decision head, one number a
        token, always says all.
        """
        x_TRH = self.final_norm(x_TRH)
        decisions_TR = self.decision_head(x_TRH) if self.sizes.decision_head else None
        # The head's columns are split, so what it tells the positions' gradient is summed over the group here.
        if self.config.sequence_parallel:
            x_TRH = gather_from_sequence_parallel_region(x_TRH, group=self.tensor_group)
        x = x_TRH if places_K is None else x_TRH.flatten(0, 1).index_select(0, places_K)
        if not self.config.sequence_parallel and self.tensor_group.size() > 1:
            x = copy_to_tensor_model_parallel_region(x, group=self.tensor_group)
        at_once = self.recompute.head_positions
        if places_K is not None and at_once is not None and len(places_K) > at_once:
            return Predictions(None, decisions_TR, places_K, x, lambda hidden: self.head(hidden)[0], at_once)
        return Predictions(self.head(x)[0], decisions_TR, places_K)

    def _own_tokens(self, x_TR1: torch.Tensor) -> torch.Tensor:
        if not self.config.sequence_parallel:
            return x_TR1
        return x_TR1.chunk(self.tensor_group.size())[self.tensor_group.rank()]

    def _backend(self, batch: Batch, device: torch.device, held: tuple[int, int] | None) -> AttentionBackend:
        compat = self.sizes.reference_compat
        if self.sizes.attention == "dense":
            return DenseAttention(
                visibility.dense_self_mask(batch, device), visibility.dense_cross_mask(batch, compat, device)
            )
        if self.sizes.attention == "flex" and self.frame_group is None and held is None:
            return FlexAttention(batch, compat, self.sizes.tokens_per_frame, device)
        cross_plan = visibility.plan_cross_attention(batch, compat, device, held)
        if has_text_windows(batch):
            return SegmentAttention(None, cross_plan, self.frame_group, windows=plan_windows(batch, device))
        return SegmentAttention(
            visibility.plan_self_attention(batch, device),
            cross_plan,
            self.frame_group,
            lay_out_streams(batch.segments_RT, device) if self._has_flash(device) else None,
        )

    def _has_flash(self, device: torch.device) -> bool:
        head_size = self.sizes.text.hidden_size // self.sizes.text.attention_heads
        return flash_attention_available(self.config.params_dtype, device, head_size)

    def text_rotation(self, positions_TR: torch.Tensor):
        """Cosines and sines [T, R, 1, D] of token positions."""
        cos, sin = self.rotary(positions_TR)
        return cos[:, :, None], sin[:, :, None]

    def frame_rotation(self, positions: torch.Tensor):
        """Cosines and sines [..., 1, 1, D] of frame positions [...]; None when frames are not rotated."""
        if not self.sizes.cross_rope:
            return None
        cos, sin = self.rotary(positions)
        return cos[..., None, None, :], sin[..., None, None, :]

    # Incremental use, see model/streaming.py.

    def start_streams(self, rows: int, max_tokens: int | None = None, max_frames: int | None = None, **options):
        """Empty caches for `rows` streams that grow token by token and frame by frame. Arguments of `StreamState`; in a
        parallel layout every process of the model-parallel group calls this and what follows alike."""
        from moss_train.model.streaming import StreamState

        return StreamState(self, rows, max_tokens, max_frames, **options)

    def add_frames(self, state, frames_NCHW: torch.Tensor, rows_N: torch.Tensor, positions_N: torch.Tensor) -> None:
        """Encode frames and append their keys and values to the caches of their rows."""
        state.add_frames(frames_NCHW, rows_N, positions_N)

    def encode_new_frames(self, state, frames_NCHW: torch.Tensor) -> torch.Tensor:
        """Features of frames for `add_features`, [N, P, H]; does not touch the caches."""
        return state.encode(frames_NCHW)

    def add_features(self, state, features_NPH: torch.Tensor, rows_N: torch.Tensor, positions_N: torch.Tensor) -> None:
        """Append encoded frames to the caches of their rows."""
        state.add_features(features_NPH, rows_N, positions_N)

    def extend(self, state, *arguments, **options):
        """Append `lengths_R[r]` tokens to row r; logits [R, L, V], meaningful for the first `lengths_R[r]` of row r.
        Arguments of `StreamState.extend`."""
        return state.extend(*arguments, **options)
