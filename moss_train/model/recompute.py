"""Computing again in the backward pass what the forward pass does not keep, and gradients of what it left out."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from torch.utils.checkpoint import checkpoint


def recomputed(again: bool, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`; with `again`, its intermediate results are not kept but computed a second time.

    The function must be deterministic: no part of the model draws random numbers, so no random state is kept.
    """
    if not (again and torch.is_grad_enabled()):
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class GatedProduct:
    """silu(gate) · up of one feed-forward layer. With `again` its result is freed once the next layer has read it, and
    computed again in the backward pass when that layer needs it (megatron-core's output-discarding recompute)."""

    def __init__(self, again: bool):
        self._checkpoint = CheckpointWithoutOutput(fp8=None) if again and torch.is_grad_enabled() else None

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if self._checkpoint is None or not (gate.requires_grad or up.requires_grad):
            self._checkpoint = None
            return _gated_product(gate, up)
        return self._checkpoint.checkpoint(_gated_product, gate, up)

    def consumed_by(self, output: torch.Tensor) -> torch.Tensor:
        """Say that `output`, made from the product, has been computed."""
        if self._checkpoint is not None:
            self._checkpoint.discard_output_and_register_recompute(output)
        return output


def _gated_product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def touch(x: torch.Tensor, unused: Iterable[torch.Tensor]) -> torch.Tensor:
    """`x`, with zero gradients for those tensors of `unused` that take gradients; this batch has no other use for them.

    Data-parallel processes sum gradients bucket by bucket as they become ready; a process whose batch skips a layer
    must come to that layer's bucket at the same place as the others, or all of them wait for ever.
    """
    trained = [tensor for tensor in unused if tensor.requires_grad]
    if not (trained and torch.is_grad_enabled()):
        return x
    return _Touch.apply(x, *trained)


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *unused):
        ctx.unused = [(tensor.shape, tensor.dtype, tensor.device) for tensor in unused]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.unused)
