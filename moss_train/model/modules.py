"""The one place that chooses which implementation of a layer's parts is used."""

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import nn

from moss_train.model.normalization import RMSNorm


def column_linear(megatron: TransformerConfig, size_in: int, size_out: int, group) -> nn.Module:
    """A bias-free linear layer whose output columns are split over the tensor-parallel group; returns (output, None).

    With sequence parallelism its input [T / ranks, R, size_in] is gathered along tokens first.
    """
    return ColumnParallelLinear(
        size_in, size_out, config=megatron, init_method=megatron.init_method, bias=False, gather_output=False,
        tp_group=group,
    )  # fmt: skip


def frame_linear(megatron: TransformerConfig, size_in: int, size_out: int, group) -> nn.Module:
    """`column_linear` for the frames of the cross layers, whose gradient is summed over the tensor-parallel group once,
    where features are gathered, and not here: dL/dinput holds the part of this rank's columns alone. Frames are never
    split along the sequence."""
    layer = ColumnParallelLinear(
        size_in, size_out, config=megatron, init_method=megatron.init_method, bias=False, gather_output=False,
        disable_grad_reduce=True, tp_group=group,
    )  # fmt: skip
    layer.sequence_parallel = False
    return layer


def row_linear(megatron: TransformerConfig, size_in: int, size_out: int, group) -> nn.Module:
    """A bias-free linear layer whose input is split over the tensor-parallel group; returns (summed output, None).

    With sequence parallelism the sum is scattered along tokens.
    """
    return RowParallelLinear(
        size_in, size_out, config=megatron, init_method=megatron.output_layer_init_method, bias=False,
        input_is_parallel=True, skip_bias_add=False, tp_group=group,
    )  # fmt: skip


def rms_norm(megatron: TransformerConfig, size: int) -> nn.Module:
    """Root-mean-square norm over a last dimension of `size`."""
    return RMSNorm(size, megatron.layernorm_epsilon, megatron.params_dtype)
