"""Which part of a whole parameter a tensor-parallel process holds, read from the marks that megatron-core's layers
set."""

import torch
import torch.distributed as dist


def is_split(parameter: torch.nn.Parameter) -> bool:
    """Whether tensor-parallel processes hold different parts of it."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def own_slice(parameter: torch.nn.Parameter, full: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This process's part of `full`, whose shape is the whole parameter's; a view."""
    if not is_split(parameter) or group.size() == 1:
        return full
    return full.chunk(group.size(), dim=parameter.partition_dim)[group.rank()]


def own_offsets(parameter: torch.nn.Parameter, group: dist.ProcessGroup) -> tuple[int, ...]:
    """Where this process's part begins in the whole parameter."""
    offsets = [0] * parameter.dim()
    if is_split(parameter):
        offsets[parameter.partition_dim] = group.rank() * parameter.shape[parameter.partition_dim]
    return tuple(offsets)


def whole_shape(parameter: torch.nn.Parameter, group: dist.ProcessGroup) -> tuple[int, ...]:
    """The shape of the parameter before it was split over `group`."""
    shape = list(parameter.shape)
    if is_split(parameter):
        shape[parameter.partition_dim] *= group.size()
    return tuple(shape)


def joined(parameter: torch.nn.Parameter, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The whole tensor from every process's `part`, which is shaped like `parameter`; on every process of `group`."""
    if not is_split(parameter) or group.size() == 1:
        return part
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=parameter.partition_dim)
