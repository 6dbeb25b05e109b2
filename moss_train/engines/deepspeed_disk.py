"""What ZeRO 3 keeps on a disk (`offload_optimizer.device=nvme`, `offload_param.device=nvme`), as tensors.

DeepSpeed reads and writes its files itself, a group of optimizer state or a parameter at a time, and only in a step.
Between steps each file holds one tensor as it is in memory. So it is mapped: reading one block of it, or loading one
into it, needs no room for the rest. Files of which DeepSpeed has no use yet (small tensors) are not there.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def brought_in(zero: Any) -> Iterator[torch.Tensor]:
    """The flat float32 weights that the optimizer inside `zero` steps, each in memory until the next is asked for."""
    for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
        swapped = zero._swappable_optimizer_subgroup(number)
        if swapped:
            zero._optimizer_states_and_gradient_swap_in(number)
        yield flat
        if swapped:
            zero._optimizer_states_and_gradient_swap_out(number)


def readable(zero: Any, flat: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors`, which are `flat` (one of those above) and state that belongs to it, with their elements: themselves,
    or the files that hold them. What is written into these is in the files."""
    swapper = zero.optimizer_swapper
    swapped = None if swapper is None else swapper.swap_params_info.get(flat.ds_id)
    if swapped is None:
        return dict(tensors)
    paths = {id(context.compute_tensor): context.swap_path for context in swapped.tensors}
    return {name: _mapped(paths[id(tensor)], swapped.numel(), flat.dtype) for name, tensor in tensors.items()}


def readable_run(parameter: torch.nn.Parameter) -> torch.Tensor:
    """This process's run of a parameter, flat: itself, or the file that holds it."""
    run = parameter.ds_tensor
    if _lies_on_disk(parameter):
        return _mapped(parameter.nvme_swapper.get_path(parameter, must_exist=True), run.ds_numel, parameter.dtype)
    return run.detach().view(-1)


def write_through(zero: Any) -> None:
    """Have what was written into the files on the disk: DeepSpeed reads past the system's cache."""
    swapper = zero.optimizer_swapper
    infos = [] if swapper is None else swapper.swap_params_info.values()
    paths = [context.swap_path for info in infos for context in info.tensors]
    paths += [one.nvme_swapper.get_path(one, must_exist=True) for one in zero.module.parameters() if _lies_on_disk(one)]
    for path in paths:
        file = os.open(path, os.O_RDWR)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _lies_on_disk(parameter: torch.nn.Parameter) -> bool:
    return parameter.ds_tensor.status.name == "NOT_AVAILABLE"


def _mapped(path: str, elements: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=elements, dtype=dtype)
