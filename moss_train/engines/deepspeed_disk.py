"""The optimizer state that ZeRO 3 keeps on a disk (`offload_optimizer.device=nvme`), as tensors.

DeepSpeed reads and writes its files itself, a group of parameters' state at a time, and only in a step.
Between steps each file holds one tensor as it is in memory. So it is mapped: reading one block of it, or loading one
into it, needs no room for the rest.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def keep_gradients_in_memory(zero: Any) -> None:
    """DeepSpeed 0.19.8 reads gradients into the middle of a buffer, past the system's cache. Unless that place is a
    multiple of 512 bytes, nothing is read, and nothing is said. So they stay in the host's memory, where they are in
    any case: they are summed there."""
    swapper = zero.optimizer_swapper
    if swapper is None:
        return

    def keep(parameter: torch.Tensor, gradient_offsets: list[int], gradient_tensors: list[torch.Tensor]) -> None:
        info = swapper.swap_params_info.get(parameter.ds_id)
        if info is not None:
            info.unswapped_gradients.update(zip(gradient_offsets, gradient_tensors, strict=True))

    swapper.swap_out_gradients = keep


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


def write_through(zero: Any) -> None:
    """Have what was written into the files on the disk: DeepSpeed reads past the system's cache."""
    swapper = zero.optimizer_swapper
    infos = [] if swapper is None else swapper.swap_params_info.values()
    for path in [context.swap_path for info in infos for context in info.tensors]:
        file = os.open(path, os.O_RDWR)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _mapped(path: str, elements: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=elements, dtype=dtype)
