"""Number formats of a run: which dtype parameters have, and what megatron-core is told about it.

fp8 keeps bfloat16 parameters and multiplies in 8 bits (E4M3 forward, E5M2 gradients) where Transformer Engine has the
layer: all matrices of the self layers, and those of the cross layers that read text. Keys and values of frames, the
vision tower, the projector and the head stay in bfloat16.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import fp8_utils
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import is_te_min_version

from moss_train.errors import ConfigError
from moss_train.model import modules
from moss_train.model.config import ModelConfig

PRECISIONS = ("fp32", "bf16", "fp16", "fp8")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
FP8_MULTIPLE = 16  #: cuBLAS takes 8-bit matrices whose sides are multiples of this
_FP8_CAPABILITY = (8, 9)
_FP8_RECIPE_SINCE = "2.2.0"


@dataclass(frozen=True)
class Precision:
    """One of PRECISIONS. `dtype` is that of parameters and of what flows between layers."""

    name: str
    dtype: torch.dtype
    fp8: bool = False

    @classmethod
    def named(cls, name: str) -> "Precision":
        """ConfigError for a name that is not in PRECISIONS."""
        if name not in PRECISIONS:
            raise ConfigError(f"precision={name!r}: legal values are {', '.join(PRECISIONS)}")
        return cls(name, _DTYPES[name], fp8=name == "fp8")

    @classmethod
    def of(cls, dtype: torch.dtype, fp8: bool = False) -> "Precision":
        """The precision of parameters of `dtype`."""
        return cls("fp8" if fp8 else {kind: name for name, kind in _DTYPES.items() if name != "fp8"}[dtype], dtype, fp8)

    def check_supported(self, device: torch.device) -> None:
        """Raise ConfigError, naming all that is missing, unless this precision can run on `device`."""
        if not self.fp8:
            return
        missing = []
        if device.type != "cuda":
            missing.append(f"the device is {device.type}")
        elif (capability := torch.cuda.get_device_capability(device)) < _FP8_CAPABILITY:
            missing.append(f"the device has {'.'.join(map(str, capability))}")
        if (problem := modules.transformer_engine_problem()) is not None:
            missing.append(problem)
        elif not is_te_min_version(_FP8_RECIPE_SINCE):
            missing.append("Transformer Engine is older")
        if missing:
            raise ConfigError(
                "precision=fp8: needs an NVIDIA GPU of compute capability 8.9 or higher (Ada, Hopper, Blackwell) and "
                f"Transformer Engine {_FP8_RECIPE_SINCE} or later, but {' and '.join(missing)}; use precision=bf16"
            )

    def check_sizes(self, config: ModelConfig, tensor_ranks: int) -> None:
        """Raise ConfigError for the first matrix whose part on each of `tensor_ranks` processes has a side that cannot
        be multiplied in 8 bits."""
        if not self.fp8:
            return
        text = config.text
        key_values = text.hidden_size // text.attention_heads * text.key_value_heads
        sizes = {
            f"text.hidden_size={text.hidden_size}": text.hidden_size,
            f"text.mlp_size={text.mlp_size}": text.mlp_size,
            f"text.key_value_heads={text.key_value_heads} of width {key_values // text.key_value_heads}": key_values,
        }
        for name, size in sizes.items():
            if size % (FP8_MULTIPLE * tensor_ranks):
                raise ConfigError(
                    f"model.{name}: precision=fp8 with layout.tp={tensor_ranks} needs a size that is a multiple of "
                    f"{FP8_MULTIPLE} × {tensor_ranks} (it is {size}); lower layout.tp or use precision=bf16"
                )

    def megatron_options(self) -> dict[str, Any]:
        """The fields of TransformerConfig that follow from the precision.

        The recipe of fp8 is `tensorwise` (Transformer Engine's current scaling): each tensor's scale comes from its own
        largest value. The other one for Ada and Hopper, `delayed`, takes it from past steps, which would be state that
        every checkpoint has to carry, reductions over all processes, and wrong scales after a jump.
        """
        options = {
            "params_dtype": self.dtype,
            "pipeline_dtype": self.dtype,
            "bf16": self.dtype == torch.bfloat16,
            "fp16": self.dtype == torch.float16,
            "transformer_impl": modules.transformer_impl(self.dtype),
        }
        if self.fp8:
            options |= {
                "fp8": "hybrid",
                "fp8_recipe": "tensorwise",
                # Else 8-bit weights are kept until a pipeline schedule says that a step begins, and a forward pass
                # outside of a schedule computes with those of an earlier step.
                "disable_parameter_transpose_cache": True,
            }
        return options

    def token_multiple(self, tensor_ranks: int, sequence_parallel: bool) -> int:
        """Of what the padded length of rows must be a multiple, so that each process gets tokens it can multiply.

        With sequence parallelism rows are split evenly over `tensor_ranks`.
        """
        return (FP8_MULTIPLE if self.fp8 else 1) * (tensor_ranks if sequence_parallel else 1)


def fp8_context(megatron: TransformerConfig, training: bool = True) -> contextlib.AbstractContextManager:
    """Inside it the layers multiply in 8 bits, if `megatron` says fp8 and in training; otherwise it does nothing.

    Enter it inside of what is recomputed in the backward pass (once per decoder layer), or the second computation runs
    in bfloat16. Evaluation and streaming, whose rows have any number of tokens, run in bfloat16. Raises ConfigError
    when fp8 is asked for without Transformer Engine, which megatron-core would pass over in silence.
    """
    if not (megatron.fp8 and training):
        return contextlib.nullcontext()
    if (problem := modules.transformer_engine_problem()) is not None:
        raise ConfigError(f"precision=fp8: {problem}; use precision=bf16")
    return fp8_utils.get_fp8_context(megatron)
