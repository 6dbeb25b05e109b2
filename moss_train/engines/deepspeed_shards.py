"""Where DeepSpeed's optimizers keep the float32 weight, the moments and the gradient of a parameter.

Without ZeRO each process holds whole tensors. ZeRO 1 and 2 lay the parameters of a group end to end and give each
process a run of that; ZeRO 3 gives each process a run of every parameter, trained or not. So what a process holds is
always one run of the flattened parameter (of this tensor-parallel rank), which may be empty. Runs that DeepSpeed keeps
on a disk are seen here as tensors all the same (`deepspeed_disk`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moss_train.engines import deepspeed_disk
from moss_train.engines.held_optimizer import HeldAdamW, HeldSGD
from moss_train.engines.optimizer_state import MAIN, HeldState


@dataclass(frozen=True)
class _Place:
    """A run of a parameter: elements [start, end) of it are elements from `offset` on of the flat `tensor`."""

    tensor: torch.Tensor
    offset: int
    start: int
    end: int


class Shards:
    """The state of one DeepSpeed engine on this process."""

    def __init__(self, engine: Any, optimizer: HeldAdamW | HeldSGD, stage: int):
        """`optimizer`: the one inside of DeepSpeed's."""
        self._zero, self._optimizer, self._stage = engine.optimizer, optimizer, stage
        if stage == 3:
            deepspeed_disk.keep_gradients_in_memory(self._zero)

    def stepped(self) -> Iterator[torch.Tensor]:
        """The tensors that the optimizer inside updates; one that lies on a disk is in memory until the next is given,
        and state that it has got by then goes to the disk with it."""
        if self._stage == 3:
            yield from deepspeed_disk.brought_in(self._zero)
            return
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def held(self, parameter: torch.nn.Parameter) -> HeldState:
        """Float32 weight and moments of a trained parameter."""
        place = self._place(parameter)
        if place is None:
            return HeldState({}, 0, 0)
        state = self._optimizer.state.get(place.tensor, {})
        moments = {name: tensor for name, tensor in state.items() if tensor.shape == place.tensor.shape}
        tensors = {MAIN: place.tensor, **moments}
        if self._stage == 3:
            tensors = deepspeed_disk.readable(self._zero, place.tensor, tensors)
        tensors = {name: self._run(tensor, place) for name, tensor in tensors.items()}
        return HeldState(tensors, place.start, place.end)

    def gradient(self, parameter: torch.nn.Parameter) -> HeldState:
        """The gradient of a trained parameter, under MAIN, as the optimizer inside, which must keep it, saw it."""
        place = self._place(parameter)
        if place is None or place.tensor not in self._optimizer.kept:
            return HeldState({}, 0, 0)
        return HeldState({MAIN: self._run(self._optimizer.kept[place.tensor], place)}, place.start, place.end)

    def weight(self, parameter: torch.nn.Parameter) -> HeldState:
        """The parameter itself, in the model's precision, under MAIN: with ZeRO 3 this process's run of it."""
        if self._stage < 3:
            return HeldState({MAIN: parameter.detach().view(-1)}, 0, parameter.numel())
        start, end = own_run(parameter)
        return HeldState({MAIN: parameter.ds_tensor.detach().view(-1)[: end - start]}, start, end)

    def gathered(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """The whole parameter (of this tensor-parallel rank) that ZeRO 3 keeps on every process because it is small;
        None when it keeps none."""
        if self._stage == 3 and parameter.numel() == parameter.ds_numel:
            return parameter.detach()
        return None

    def after_loading(self) -> None:
        """Forget copies of weights that were loaded over; see to it that what was loaded is on the disk."""
        if self._stage == 3:
            for parameter in self._zero.module.parameters():
                parameter.ds_secondary_tensor = None
            deepspeed_disk.write_through(self._zero)

    def shape(self, parameter: torch.nn.Parameter) -> torch.Size:
        """Of this tensor-parallel rank's part of a parameter; ZeRO 3 leaves nothing of it in the parameter."""
        return parameter.ds_shape if self._stage == 3 else parameter.shape

    @property
    def sharded(self) -> bool:
        """Whether a trained parameter's state is split over the processes that hold the same parameters."""
        return self._stage > 0

    @property
    def weights_sharded(self) -> bool:
        """Whether the parameters themselves are."""
        return self._stage == 3

    def _place(self, parameter: torch.nn.Parameter) -> _Place | None:
        if not self.shape(parameter).numel():  # is in no optimizer group
            return None
        if self._stage == 0:
            return _Place(parameter, 0, 0, parameter.numel())
        if self._stage == 3:
            group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start, end = own_run(parameter)
            return _Place(self._zero.fp32_partitioned_groups_flat[group], offset, start, end)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        own, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
        tensor = self._optimizer.param_groups[mapping.param_group_index]["params"][0]
        return _Place(tensor, flat.start, own.start, own.start + own.numel)

    def _run(self, flat: torch.Tensor, place: _Place) -> torch.Tensor:
        return flat.detach().view(-1)[place.offset : place.offset + place.end - place.start]


def own_run(parameter: torch.nn.Parameter) -> tuple[int, int]:
    """ZeRO 3: which elements of the parameter are this process's; the last process's run may be short or empty."""
    size = parameter.ds_tensor.ds_numel
    start = min(torch.distributed.get_rank(parameter.ds_process_group) * size, parameter.ds_numel)
    return start, min(start + size, parameter.ds_numel)
