"""The one place that chooses which implementation of a layer's parts is used: Transformer Engine's, or the local one.

Transformer Engine is used for bfloat16 and float16 parameters where it is installed and there is a CUDA device. It is
not used for float32: its float32 matrix products run in TF32, with ten bits of mantissa. `transformer_impl="local"` in
the TransformerConfig turns it off. Whichever is used, a layer has one parameter, `weight`, with the attributes that
megatron-core reads (`tensor_model_parallel`, `partition_dim`, `sequence_parallel`), and a linear layer returns
(output, None).
"""

import functools

import torch
from megatron.core.extensions import transformer_engine
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from torch import nn

from moss_train.model.normalization import RMSNorm


def transformer_engine_problem() -> str | None:
    """Why this process cannot use Transformer Engine's layers; None when it can."""
    if not transformer_engine.HAVE_TE:
        return "Transformer Engine is not installed (extra `gpu`)"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


def transformer_impl(dtype: torch.dtype) -> str:
    """What to set `TransformerConfig.transformer_impl` to for parameters of `dtype`: transformer_engine or local."""
    usable = dtype in (torch.bfloat16, torch.float16) and transformer_engine_problem() is None
    return "transformer_engine" if usable else "local"


def column_linear(megatron: TransformerConfig, size_in: int, size_out: int, group) -> nn.Module:
    """A bias-free linear layer whose output columns are split over the tensor-parallel group; returns (output, None).

    With sequence parallelism its input [T / ranks, R, size_in] is gathered along tokens first.
    """
    if _fused(megatron):
        layer = transformer_engine.TEColumnParallelLinear(
            size_in, size_out, config=megatron, init_method=megatron.init_method, gather_output=False, bias=False,
            skip_bias_add=False, is_expert=False, tp_group=group,
        )  # fmt: skip
        return _without_extra_state(layer)
    layer = ColumnParallelLinear(
        size_in, size_out, config=megatron, init_method=megatron.init_method, bias=False, gather_output=False,
        tp_group=group,
    )  # fmt: skip
    return _split(layer, dim=0)


def token_embedding(megatron: TransformerConfig, rows: int, width: int, group) -> nn.Module:
    """A table of `rows` vectors, split by rows over the tensor-parallel group."""
    layer = VocabParallelEmbedding(
        rows, width, init_method=megatron.init_method, config=megatron, tp_group=group
    )  # fmt: skip
    return _split(layer, dim=0)


def unsummed_linear(megatron: TransformerConfig, size_in: int, size_out: int, group) -> nn.Module:
    """`column_linear` whose input is whole on every process, and whose gradient is not summed over the tensor-parallel
    group here: dL/dinput holds the part of this rank's columns alone. Who makes the input sums it: for the frames of
    the cross layers where features are gathered, for the head where the positions that reach it are taken.

    Always the local layer: Transformer Engine's sums the gradient whenever its group has several processes, and takes
    no width such as a vocabulary's.
    """
    layer = ColumnParallelLinear(
        size_in, size_out, config=megatron, init_method=megatron.init_method, bias=False, gather_output=False,
        disable_grad_reduce=True, tp_group=group,
    )  # fmt: skip
    layer.sequence_parallel = False
    return _split(layer, dim=0)


def row_linear(megatron: TransformerConfig, size_in: int, size_out: int, group) -> nn.Module:
    """A bias-free linear layer whose input is split over the tensor-parallel group; returns (summed output, None).

    With sequence parallelism the sum is scattered along tokens.
    """
    if _fused(megatron):
        layer = transformer_engine.TERowParallelLinear(
            size_in, size_out, config=megatron, init_method=megatron.output_layer_init_method, bias=False,
            input_is_parallel=True, skip_bias_add=False, is_expert=False, tp_group=group,
        )  # fmt: skip
        return _without_extra_state(layer)
    layer = RowParallelLinear(
        size_in, size_out, config=megatron, init_method=megatron.output_layer_init_method, bias=False,
        input_is_parallel=True, skip_bias_add=False, tp_group=group,
    )  # fmt: skip
    return _split(layer, dim=1)


def rms_norm(megatron: TransformerConfig, size: int) -> nn.Module:
    """Root-mean-square norm over a last dimension of `size`.

    Transformer Engine's rounds once, after the weight; the local one, as Llama's, before the weight and after it.
    """
    if _fused(megatron):
        if megatron.normalization != "RMSNorm":
            raise ValueError(f"TransformerConfig.normalization={megatron.normalization!r}: must be 'RMSNorm'")
        return _without_extra_state(transformer_engine.TENorm(megatron, size, eps=megatron.layernorm_epsilon))
    norm = RMSNorm(size, megatron.layernorm_epsilon, megatron.params_dtype)
    norm.weight.sequence_parallel = megatron.sequence_parallel
    return norm


def head_norm(megatron: TransformerConfig, size: int) -> nn.Module:
    """Norm of queries or keys over the head width: always ours, since it works on any number of leading dimensions."""
    return RMSNorm(size, megatron.layernorm_epsilon, megatron.params_dtype)


def _split(layer: nn.Module, dim: int) -> nn.Module:
    """Mark the weight as split over tensor-parallel processes, which megatron does only while it initialises it."""
    if not hasattr(layer.weight, "partition_dim"):
        set_tensor_model_parallel_attributes(layer.weight, True, dim, 1)
    return layer


def _fused(megatron: TransformerConfig) -> bool:
    wanted = megatron.transformer_impl == "transformer_engine"
    return wanted and transformer_impl(megatron.params_dtype) == "transformer_engine"


def _without_extra_state(layer: nn.Module) -> nn.Module:
    """Keep `_extra_state` out of the layer's state_dict.

    Transformer Engine's layers put a uint8 tensor there, also when they do not run in FP8, which would be taken for a
    weight. It holds the history that the delayed-scaling recipe keeps; `precision` uses a recipe without one.
    """
    layer.__class__ = _weights_only(type(layer))
    return layer


@functools.cache
def _weights_only(kind: type[nn.Module]) -> type[nn.Module]:
    # torch looks for the two methods on the class, and writes no extra state when they are nn.Module's own.
    methods = {name: getattr(nn.Module, name) for name in ("get_extra_state", "set_extra_state")}
    return type(kind.__name__, (kind,), methods)
