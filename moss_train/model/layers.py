"""Decoder layers on megatron-core's parallel linear layers.

Shape suffixes: T tokens, R rows, H decoder width, A query heads, B key/value heads, D head width, F frames,
P vision tokens of a frame. Heads are those of this tensor-parallel rank.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import nn

from moss_train.model.attention import AttentionBackend
from moss_train.model.config import ModelConfig
from moss_train.model.normalization import RMSNorm
from moss_train.model.rotary import rotate

Rotation = tuple[torch.Tensor, torch.Tensor]


@dataclass
class LayerInputs:
    """What every layer of one forward pass shares."""

    backend: AttentionBackend
    text_rotation: Rotation  #: cos, sin [T, R, 1, D]
    frame_rotation: Rotation | None  #: cos, sin [R, F, 1, 1, D]; None when cross-attention is not rotated
    features_RFPH: torch.Tensor | None  #: projected frames; None when none are in the batch or all are cached
    sees_frames_TR1: torch.Tensor | None  #: bool; None when no token sees a frame


def column_linear(megatron: TransformerConfig, size_in: int, size_out: int, group) -> ColumnParallelLinear:
    """A bias-free linear layer whose output columns are split over the tensor-parallel group."""
    return ColumnParallelLinear(
        size_in, size_out, config=megatron, init_method=megatron.init_method, bias=False, gather_output=False,
        tp_group=group,
    )  # fmt: skip


def row_linear(megatron: TransformerConfig, size_in: int, size_out: int, group) -> RowParallelLinear:
    """A bias-free linear layer whose input is split over the tensor-parallel group; the output is summed."""
    return RowParallelLinear(
        size_in, size_out, config=megatron, init_method=megatron.output_layer_init_method, bias=False,
        input_is_parallel=True, skip_bias_add=False, tp_group=group,
    )  # fmt: skip


class Attention(nn.Module):
    """The four projections of grouped-query attention; the attending itself is the backend's."""

    def __init__(self, config: ModelConfig, megatron: TransformerConfig, group):
        super().__init__()
        text = config.text
        self.head_size = text.hidden_size // text.attention_heads
        key_value_size = self.head_size * text.key_value_heads
        self.query = column_linear(megatron, text.hidden_size, text.hidden_size, group)
        self.key = column_linear(megatron, text.hidden_size, key_value_size, group)
        self.value = column_linear(megatron, text.hidden_size, key_value_size, group)
        self.output = row_linear(megatron, text.hidden_size, text.hidden_size, group)

    def project(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Apply one projection and split its heads: [..., H] to [..., heads, D]."""
        flat = x.flatten(0, -3) if x.dim() > 3 else x  # megatron's backward takes three dimensions
        return layer(flat)[0].view(*x.shape[:-1], -1, self.head_size)


class SelfAttention(Attention):
    """Causal attention among tokens, rotated by text positions."""

    def forward(self, index: int, x_TRH: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        q_TRAD = rotate(self.project(self.query, x_TRH), *inputs.text_rotation)
        k_TRBD = rotate(self.project(self.key, x_TRH), *inputs.text_rotation)
        v_TRBD = self.project(self.value, x_TRH)
        return self.output(inputs.backend.self_attention(index, q_TRAD, k_TRBD, v_TRBD))[0]


class CrossAttention(Attention):
    """Attention of tokens over frames (`model_facts.md` A.4).

    Queries are normalised, then rotated; keys are rotated, then normalised. The norm's weight is per channel, so
    the orders differ, and both are the reference's.
    """

    def __init__(self, config: ModelConfig, megatron: TransformerConfig, group):
        super().__init__(config, megatron, group)
        self.query_norm = RMSNorm(self.head_size, config.text.norm_eps, megatron.params_dtype)
        self.key_norm = RMSNorm(self.head_size, config.text.norm_eps, megatron.params_dtype)

    def keys_values(self, features_RFPH: torch.Tensor, frame_rotation: Rotation | None):
        """Keys and values of frames, each [R, F, P, B, D]; they depend on the frame and its position alone."""
        k_RFPBD = self.project(self.key, features_RFPH)
        if frame_rotation is not None:
            k_RFPBD = rotate(k_RFPBD, *frame_rotation)
        return self.key_norm(k_RFPBD), self.project(self.value, features_RFPH)

    def forward(self, index: int, x_TRH: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        q_TRAD = self.query_norm(self.project(self.query, x_TRH))
        if inputs.frame_rotation is not None:
            q_TRAD = rotate(q_TRAD, *inputs.text_rotation)
        keys, values = None, None
        if inputs.features_RFPH is not None:
            keys, values = self.keys_values(inputs.features_RFPH, inputs.frame_rotation)
        return self.output(inputs.backend.cross_attention(index, q_TRAD, keys, values))[0]


class GatedMLP(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, megatron: TransformerConfig, group):
        super().__init__()
        text = config.text
        self.gate = column_linear(megatron, text.hidden_size, text.mlp_size, group)
        self.up = column_linear(megatron, text.hidden_size, text.mlp_size, group)
        self.down = row_linear(megatron, text.mlp_size, text.hidden_size, group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)[0]) * self.up(x)[0])[0]


class SelfLayer(nn.Module):
    """Pre-norm decoder layer of Llama."""

    def __init__(self, index: int, config: ModelConfig, megatron: TransformerConfig, group):
        super().__init__()
        self.index = index
        width, eps, dtype = config.text.hidden_size, config.text.norm_eps, megatron.params_dtype
        self.attention_norm = RMSNorm(width, eps, dtype)
        self.attention = SelfAttention(config, megatron, group)
        self.mlp_norm = RMSNorm(width, eps, dtype)
        self.mlp = GatedMLP(config, megatron, group)

    def forward(self, x_TRH: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        x_TRH = x_TRH + self.attention(self.index, self.attention_norm(x_TRH), inputs)
        return x_TRH + self.mlp(self.mlp_norm(x_TRH))


class CrossLayer(nn.Module):
    """Gated cross-attention layer. A token that sees no frame gets exactly zero from both branches.

    With `reference_compat` the attention branch of such a token is what the reference computes (attention over
    every frame of the row); its feed-forward branch is zero there too.
    """

    def __init__(self, index: int, config: ModelConfig, megatron: TransformerConfig, group):
        super().__init__()
        self.index = index
        width, eps, dtype = config.text.hidden_size, config.text.norm_eps, megatron.params_dtype
        self.attention_norm = RMSNorm(width, eps, dtype)
        self.attention = CrossAttention(config, megatron, group)
        self.attention_gate = nn.Parameter(torch.full((1,), config.initial_gate, dtype=dtype))
        self.mlp_norm = RMSNorm(width, eps, dtype)
        self.mlp = GatedMLP(config, megatron, group)
        self.mlp_gate = nn.Parameter(torch.full((1,), config.initial_gate, dtype=dtype))

    def forward(self, x_TRH: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        if inputs.sees_frames_TR1 is None:
            return x_TRH
        x_TRH = x_TRH + self.attention_gate.tanh() * self.attention(self.index, self.attention_norm(x_TRH), inputs)
        fed = self.mlp(self.mlp_norm(x_TRH)) * inputs.sees_frames_TR1.to(x_TRH.dtype)
        return x_TRH + self.mlp_gate.tanh() * fed
