"""Summing a step's gradients: over the processes that hold the same parameters, and over those that hold the same
parameter but saw a part of what it was applied to."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from moss_train.parallel.groups import ParallelState
from moss_train.parallel.slices import is_split


def sum_gradients(
    chunks: Iterable[DistributedDataParallel], encoder: DistributedDataParallel | None, state: ParallelState
) -> None:
    """Complete `main_grad` of every trained parameter. With `layout.zero=1` only this process's shard is complete.

    1. Over data × frame ranks: megatron's all-reduce, or reduce-scatter with a distributed optimizer.
    2. Over tensor ranks: parameters marked `partial_over_tensor_group`.
    3. The encoder: over all processes of one copy of the model that encode frames, each of which saw its share. Its
       chunk holds nothing else, so its shards lie alike on all of them.
    """
    chunks = list(chunks)
    for chunk in [encoder, *chunks] if encoder is not None else chunks:
        chunk.finish_grad_sync()
    sum_partial_gradients(chunks, state)
    if encoder is not None:
        sum_encoder_gradients(encoder, state)


def sum_partial_gradients(chunks: Iterable[DistributedDataParallel], state: ParallelState) -> None:
    """Add up, over tensor ranks, the gradients of replicated parameters that were applied to split activations."""
    grads = [
        parameter.main_grad
        for chunk in chunks
        for parameter in chunk.module.parameters()
        if parameter.requires_grad and getattr(parameter, "partial_over_tensor_group", False)
    ]
    add_up(grads, state.tensor_group)


def sum_as_they_arise(parameters: Iterable[torch.nn.Parameter], group: dist.ProcessGroup) -> None:
    """From now on, add up gradients of `parameters` over `group` as a backward pass makes them, in float32. They must
    arise in the same order on all its processes."""

    def summed(grad: torch.Tensor) -> torch.Tensor:
        whole = grad.to(torch.float32, copy=True)
        dist.all_reduce(whole, group=group)
        return whole.to(grad.dtype)

    for parameter in parameters:
        parameter.register_hook(summed)


def sum_encoder_gradients(encoder: DistributedDataParallel, state: ParallelState) -> None:
    """Add up what the encoding processes of one copy of the model contributed."""
    group = state.model_group if state.layout.sharding == "model_parallel" else state.tensor_group
    add_up([buffer.grad_data for buffer in encoder.buffers], group)


def add_up(tensors: list[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Replace each tensor by its sum over `group`, in one collective and in float32."""
    if group.size() == 1 or not tensors:
        return
    in_place = len(tensors) == 1 and tensors[0].dtype == torch.float32
    flat = tensors[0] if in_place else torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    if not in_place:
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def global_norm(parameters: Iterable[torch.nn.Parameter], state: ParallelState) -> float:
    """Norm of the whole gradient, from complete `grad`s: what tensor-parallel processes hold alike counts once.

    `parameters`: this process's, without those that an earlier stage counts.
    """
    squares = torch.zeros((), dtype=torch.float64, device=state.device)
    for parameter in parameters:
        if parameter.grad is not None and (is_split(parameter) or state.tensor_rank == 0):
            squares += torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).double() ** 2
    dist.all_reduce(squares, group=state.model_group)
    return float(squares.sqrt())


def clip_to_norm(parameters: Iterable[torch.nn.Parameter], norm: float, limit: float) -> None:
    """Scale the gradients, whose norm is `norm`, down to a norm of `limit`; 0 leaves them."""
    factor = limit / (norm + 1e-6)
    if limit > 0.0 and factor < 1.0:
        torch._foreach_mul_([parameter.grad for parameter in parameters if parameter.grad is not None], factor)
