"""The model: vision tower, projector, and a decoder whose cross layers look at the frames.

Shape suffixes: R rows, T tokens, N frames of the microbatch, F frames of a row, P vision tokens of a frame,
C colours, H decoder width, V rows of the head.
"""

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.transformer import TransformerConfig
from torch import nn

from moss_train.data.batch import Batch
from moss_train.model import visibility
from moss_train.model.attention import AttentionBackend, DenseAttention, SegmentAttention
from moss_train.model.config import ModelConfig
from moss_train.model.layers import CrossLayer, LayerInputs, SelfLayer
from moss_train.model.normalization import RMSNorm
from moss_train.model.projector import Projector, pooled_features
from moss_train.model.rotary import RotaryTable
from moss_train.model.vision_tower import GatedPositionEmbedding, VisionTower


def megatron_config(config: ModelConfig, dtype: torch.dtype = torch.float32) -> TransformerConfig:
    """The part of the sizes that megatron-core's layers, optimizer and schedules read."""
    text = config.text
    return TransformerConfig(
        num_layers=text.layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.mlp_size,
        num_attention_heads=text.attention_heads,
        num_query_groups=text.key_value_heads,
        add_bias_linear=False,
        layernorm_epsilon=text.norm_eps,
        init_method=lambda weight: nn.init.normal_(weight, std=config.init_std),
        # Residual branches start smaller with depth (GPT-2), so deep fresh models train from the first step.
        output_layer_init_method=lambda weight: nn.init.normal_(weight, std=config.init_std / (2 * text.layers) ** 0.5),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bf16=dtype == torch.bfloat16,
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
        self.text = VocabParallelEmbedding(
            text.vocabulary_size, text.hidden_size, init_method=megatron.init_method, config=megatron, tp_group=group
        )
        self.extra = nn.Parameter(torch.empty(text.extra_embedding_rows, text.hidden_size, dtype=megatron.params_dtype))
        megatron.init_method(self.extra)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids of any shape [...] to embeddings [..., H]."""
        is_extra = ids >= self.vocabulary_size
        x = self.text(ids.masked_fill(is_extra, 0))
        if self.extra.shape[0] == 0:
            return x
        extra = self.extra[(ids - self.vocabulary_size).clamp(min=0)]
        return torch.where(is_extra[..., None], extra, x)


class VideoModel(nn.Module):
    """The whole model on one pipeline stage."""

    def __init__(self, config: ModelConfig, tensor_group, dtype: torch.dtype = torch.float32):
        """`tensor_group`: the process group over which matrices are split (of one process, when they are not)."""
        super().__init__()
        config.validate()
        self.sizes = config
        self.config = megatron_config(config, dtype)  # megatron-core's wrappers look for this name
        text = config.text
        self.vision_tower = VisionTower(config.vision).to(dtype)
        self.projector = Projector(config.vision.feature_size, text.hidden_size, dtype=dtype)
        self.embedding = Embedding(config, self.config, tensor_group)
        self.layers = nn.ModuleList(
            (CrossLayer if index in text.cross_layers else SelfLayer)(index, config, self.config, tensor_group)
            for index in range(text.layers)
        )
        self.final_norm = RMSNorm(text.hidden_size, text.norm_eps, dtype)
        self.head = ColumnParallelLinear(
            text.hidden_size, text.vocabulary_size, config=self.config, init_method=self.config.init_method,
            bias=False, gather_output=False, tp_group=tensor_group,
        )  # fmt: skip
        self.rotary = RotaryTable(text.hidden_size // text.attention_heads, text.rope_theta, text.rope_scaling)
        self._initialise_vision()

    def _initialise_vision(self) -> None:
        std = self.sizes.init_std
        for module in [*self.vision_tower.modules(), self.projector]:
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, GatedPositionEmbedding):
                nn.init.normal_(module.embedding, std=self.sizes.vision.hidden_size**-0.5)
        nn.init.normal_(self.vision_tower.class_embedding, std=self.sizes.vision.hidden_size**-0.5)

    @property
    def embedding_rows(self) -> int:
        """Ids the model accepts: the head's rows and the input-only ones."""
        return self.sizes.text.vocabulary_size + self.sizes.text.extra_embedding_rows

    def encode_frames(self, frames_NCHW: torch.Tensor) -> torch.Tensor:
        """Frames to what the cross layers attend to, [N, P, H]."""
        return self.projector(self.pooled_features(frames_NCHW))

    def pooled_features(self, frames_NCHW: torch.Tensor) -> torch.Tensor:
        """Tower features after pooling and before the projector, [N, P, feature_size]."""
        return pooled_features(self.vision_tower(frames_NCHW), self.sizes.pool, self.sizes.pool_stride)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [T, R, V] of one microbatch (this rank's columns of V when matrices are split)."""
        device = batch.ids_RT.device
        features_RFPH = self._features_of_rows(batch)
        sees_TR1 = visibility.sees_frames(batch)
        inputs = LayerInputs(
            backend=self._backend(batch, device),
            text_rotation=self._text_rotation(batch.positions_RT.T),
            frame_rotation=self._frame_rotation(batch.frame_positions_RF),
            features_RFPH=features_RFPH,
            sees_frames_TR1=sees_TR1 if features_RFPH is not None else None,
        )
        return self.decode(batch.ids_RT.T, inputs)

    def decode(self, ids_TR: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """Run the decoder: ids [T, R] to logits [T, R, V]."""
        x_TRH = self.embedding(ids_TR)
        for layer in self.layers:
            x_TRH = layer(x_TRH, inputs)
        return self.head(self.final_norm(x_TRH))[0]

    def _features_of_rows(self, batch: Batch) -> torch.Tensor | None:
        """Encode every frame of the batch once and lay the results out by row, zero where a row has fewer."""
        if batch.frames_NCHW.shape[0] == 0:
            return None
        encoded_NPH = self.encode_frames(batch.frames_NCHW)
        rows, slots = batch.frame_positions_RF.shape
        if encoded_NPH.shape[0] == rows * slots:
            order = torch.argsort(batch.frame_rows_N * slots + batch.frame_slots_N)
            return encoded_NPH[order].unflatten(0, (rows, slots))
        laid_out = encoded_NPH.new_zeros(rows * slots, *encoded_NPH.shape[1:])
        where = batch.frame_rows_N * slots + batch.frame_slots_N
        return laid_out.index_copy(0, where, encoded_NPH).unflatten(0, (rows, slots))

    def _backend(self, batch: Batch, device: torch.device) -> AttentionBackend:
        compat = self.sizes.reference_compat
        if self.sizes.attention == "dense":
            return DenseAttention(
                visibility.dense_self_mask(batch, device), visibility.dense_cross_mask(batch, compat, device)
            )
        return SegmentAttention(
            visibility.plan_self_attention(batch, device), visibility.plan_cross_attention(batch, compat, device)
        )

    def _text_rotation(self, positions_TR: torch.Tensor):
        cos, sin = self.rotary(positions_TR)
        return cos[:, :, None], sin[:, :, None]

    def _frame_rotation(self, positions_RF: torch.Tensor):
        if not self.sizes.cross_rope:
            return None
        cos, sin = self.rotary(positions_RF)
        return cos[:, :, None, None], sin[:, :, None, None]

    # Incremental use, see model/streaming.py.

    def start_streams(self, rows: int, max_tokens: int, max_frames: int):
        """Empty caches for `rows` streams that grow token by token and frame by frame."""
        from moss_train.model.streaming import StreamState

        return StreamState(self, rows, max_tokens, max_frames)

    def add_frames(self, state, frames_NCHW: torch.Tensor, rows_N: torch.Tensor, positions_N: torch.Tensor) -> None:
        """Encode frames and append their keys and values to the caches of their rows."""
        state.add_frames(frames_NCHW, rows_N, positions_N)

    def extend(self, state, ids_RL, positions_RL, lengths_R, visible_lo_RL=None, visible_hi_RL=None, sinks: int = 0):
        """Append `lengths_R[r]` tokens to row r; logits [R, L, V], meaningful for the first `lengths_R[r]` of row r."""
        return state.extend(ids_RL, positions_RL, lengths_R, visible_lo_RL, visible_hi_RL, sinks)
