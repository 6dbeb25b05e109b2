"""Decoder layers on megatron-core's parallel linear layers.

Shape suffixes: T tokens, R rows, H decoder width, A query heads, B key/value heads, D head width, N frames held, P
vision tokens of a frame. Heads are those of this tensor-parallel rank. With sequence parallelism the hidden state
between the matrices has this rank's share of T; attention always sees all tokens.
"""

from dataclasses import dataclass, replace

import torch
from megatron.core.transformer import TransformerConfig
from torch import nn

from moss_train.model import modules
from moss_train.model.attention import AttentionBackend
from moss_train.model.config import ModelConfig, RecomputeConfig
from moss_train.model.precision import fp8_context
from moss_train.model.recompute import GatedProduct, recomputed, touch
from moss_train.model.rotary import rotate

Rotation = tuple[torch.Tensor, torch.Tensor]


@dataclass
class LayerInputs:
    """What every layer of one forward pass shares."""

    backend: AttentionBackend
    text_rotation: Rotation  #: cos, sin [T, R, 1, D]
    cross_rotation: Rotation  #: cos, sin [T, R, 1, D] of the cross-attention's queries
    frame_rotation: Rotation | None  #: cos, sin [N, 1, 1, D]; None when cross-attention is not rotated
    features_NPH: torch.Tensor | None  #: projected frames; None when the batch has none or all are cached
    sees_frames_TR1: torch.Tensor | None  #: bool, of the tokens between matrices; None when the batch has no frames
    #: int64, flat token index t * R + r of the positions whose logits are asked for; None: of all
    head_places_K: torch.Tensor | None = None
    #: place of each encoded frame among those that layers read, and how many places there are; None: as encoded
    frame_places: tuple[torch.Tensor, int] | None = None

    def with_features(self, encoded_NPH: torch.Tensor | None) -> "LayerInputs":
        """The same with these features, put in their places."""
        if encoded_NPH is None or self.frame_places is None:
            return replace(self, features_NPH=encoded_NPH)
        places, count = self.frame_places
        laid_out = encoded_NPH.new_zeros(count, *encoded_NPH.shape[1:])
        return replace(self, features_NPH=laid_out.index_copy(0, places, encoded_NPH))


class Attention(nn.Module):
    """The four projections of grouped-query attention; the attending itself is the backend's."""

    def __init__(self, config: ModelConfig, megatron: TransformerConfig, group, key_value_linear=modules.column_linear):
        super().__init__()
        text = config.text
        self.head_size = text.hidden_size // text.attention_heads
        key_value_size = self.head_size * text.key_value_heads
        self.query = modules.column_linear(megatron, text.hidden_size, text.hidden_size, group)
        self.key = key_value_linear(megatron, text.hidden_size, key_value_size, group)
        self.value = key_value_linear(megatron, text.hidden_size, key_value_size, group)
        self.output = modules.row_linear(megatron, text.hidden_size, text.hidden_size, group)

    def project(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Apply one projection and split its heads: [..., H] to [..., heads, D]."""
        flat = x.flatten(0, -3) if x.dim() > 3 else x  # megatron's backward takes three dimensions
        heads = layer(flat)[0].unflatten(-1, (-1, self.head_size))
        return heads.unflatten(0, x.shape[:-2]) if x.dim() > 3 else heads


class SelfAttention(Attention):
    """Causal attention among tokens, rotated by text positions."""

    def forward(self, index: int, x_TRH: torch.Tensor, inputs: LayerInputs, selective: bool) -> torch.Tensor:
        q_TRAD = rotate(self.project(self.query, x_TRH), *inputs.text_rotation)
        k_TRBD = rotate(self.project(self.key, x_TRH), *inputs.text_rotation)
        v_TRBD = self.project(self.value, x_TRH)
        return self.output(recomputed(selective, inputs.backend.self_attention, index, q_TRAD, k_TRBD, v_TRBD))[0]


class CrossAttention(Attention):
    """Attention of tokens over frames (`model_facts.md` A.4).

    Queries are normalised, then rotated; keys are rotated, then normalised. The norm's weight is per channel, so
    the orders differ, and both are the reference's.
    """

    def __init__(self, config: ModelConfig, megatron: TransformerConfig, group):
        super().__init__(config, megatron, group, key_value_linear=modules.unsummed_linear)
        self.query_norm = modules.head_norm(megatron, self.head_size)
        self.key_norm = modules.head_norm(megatron, self.head_size)

    def keys_values(self, features: torch.Tensor, frame_rotation: Rotation | None):
        """Keys and values of frames [..., P, H], each [..., P, B, D]; they depend on the frame and its position alone.

        `frame_rotation` is [..., 1, 1, D].
        """
        keys = self.project(self.key, features)
        if frame_rotation is not None:
            keys = rotate(keys, *frame_rotation)
        return self.key_norm(keys), self.project(self.value, features)

    def forward(self, index: int, x_TRH: torch.Tensor, inputs: LayerInputs, selective: bool) -> torch.Tensor:
        q_TRAD = self.query_norm(self.project(self.query, x_TRH))
        if inputs.frame_rotation is not None:
            q_TRAD = rotate(q_TRAD, *inputs.cross_rotation)
        return self.output(recomputed(selective, self._attend, index, q_TRAD, inputs))[0]

    def _attend(self, index: int, q_TRAD: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        keys, values = None, None
        if inputs.features_NPH is not None:
            keys, values = self.keys_values(inputs.features_NPH, inputs.frame_rotation)
        return inputs.backend.cross_attention(index, q_TRAD, keys, values)


class GatedMLP(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, megatron: TransformerConfig, group):
        super().__init__()
        text = config.text
        self.gate = modules.column_linear(megatron, text.hidden_size, text.mlp_size, group)
        self.up = modules.column_linear(megatron, text.hidden_size, text.mlp_size, group)
        self.down = modules.row_linear(megatron, text.mlp_size, text.hidden_size, group)

    def forward(self, x: torch.Tensor, selective: bool = False) -> torch.Tensor:
        product = GatedProduct(selective)
        return product.consumed_by(self.down(product(self.gate(x)[0], self.up(x)[0]))[0])


class SelfLayer(nn.Module):
    """Pre-norm decoder layer of Llama."""

    def __init__(self, index: int, config: ModelConfig, megatron: TransformerConfig, group):
        super().__init__()
        self.index, self.megatron = index, megatron
        self.attention_norm = modules.rms_norm(megatron, config.text.hidden_size)
        self.attention = SelfAttention(config, megatron, group)
        self.mlp_norm = modules.rms_norm(megatron, config.text.hidden_size)
        self.mlp = GatedMLP(config, megatron, group)

    def forward(self, x_TRH: torch.Tensor, inputs: LayerInputs, recompute: RecomputeConfig) -> torch.Tensor:
        return recomputed(
            recompute.self_layers == "full", self._run, x_TRH, inputs, recompute.self_layers == "selective"
        )

    def _run(self, x_TRH: torch.Tensor, inputs: LayerInputs, selective: bool) -> torch.Tensor:
        with fp8_context(self.megatron, self.training):
            x_TRH = x_TRH + self.attention(self.index, self.attention_norm(x_TRH), inputs, selective)
            return x_TRH + self.mlp(self.mlp_norm(x_TRH), selective)


class CrossLayer(nn.Module):
    """Gated cross-attention layer. A token that sees no frame gets exactly zero from both branches.

    With `reference_compat` the attention branch of such a token is what the reference computes (attention over
    every frame of the row); its feed-forward branch is zero there too.
    """

    def __init__(self, index: int, config: ModelConfig, megatron: TransformerConfig, group):
        super().__init__()
        self.index, self.megatron = index, megatron
        dtype = megatron.params_dtype
        self.attention_norm = modules.rms_norm(megatron, config.text.hidden_size)
        self.attention = CrossAttention(config, megatron, group)
        self.attention_gate = nn.Parameter(torch.full((1,), config.initial_gate, dtype=dtype))
        self.mlp_norm = modules.rms_norm(megatron, config.text.hidden_size)
        self.mlp = GatedMLP(config, megatron, group)
        self.mlp_gate = nn.Parameter(torch.full((1,), config.initial_gate, dtype=dtype))

    def forward(self, x_TRH: torch.Tensor, inputs: LayerInputs, recompute: RecomputeConfig) -> torch.Tensor:
        if inputs.sees_frames_TR1 is None:
            return touch(x_TRH, self.parameters())
        return recomputed(
            recompute.cross_layers == "full", self._run, x_TRH, inputs, recompute.cross_layers == "selective"
        )

    def _run(self, x_TRH: torch.Tensor, inputs: LayerInputs, selective: bool) -> torch.Tensor:
        with fp8_context(self.megatron, self.training):
            attended = self.attention(self.index, self.attention_norm(x_TRH), inputs, selective)
            x_TRH = x_TRH + self.attention_gate.tanh() * attended
            fed = self.mlp(self.mlp_norm(x_TRH), selective) * inputs.sees_frames_TR1.to(x_TRH.dtype)
            return x_TRH + self.mlp_gate.tanh() * fed
