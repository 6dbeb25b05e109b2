"""Where megatron's optimizers keep the float32 weight and the moments of a parameter, whichever of them it is.

The plain optimizers hold whole tensors (of this tensor-parallel rank); the distributed one holds, flat, the part of
each parameter that falls in this process's shard of the gradient buffer, which may be none of it.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

MAIN = "main"  #: the float32 weight that is updated; a 16-bit parameter is its rounded copy
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class HeldState:
    """What of one parameter's state this process holds: elements [start, end) of the flat parameter."""

    tensors: dict[str, torch.Tensor]  #: MAIN and those of MOMENTS that the optimizer keeps, flat or shaped
    start: int
    end: int


def held_state(optimizer: ChainedOptimizer, parameter: torch.nn.Parameter) -> HeldState:
    """The state of a trained parameter on this process; empty when its shard is elsewhere."""
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer):
            if parameter not in part.model_param_gbuf_map:
                continue
            found = part._get_main_param_and_optimizer_states(parameter)
            place = part._get_model_param_range_map(parameter)["param"]
            return HeldState(_known(found["param"], found), place.start, place.end)
        main = getattr(parameter, "main_param", None)
        main = parameter if main is None else main
        return HeldState(_known(main, part.optimizer.state.get(main, {})), 0, parameter.numel())
    return HeldState({}, 0, 0)


def initialise_moments(optimizer: ChainedOptimizer) -> None:
    """Make Adam's moments now instead of at the first step, so that a state exists from the beginning."""
    for part in optimizer.chained_optimizers:
        if part.init_state_fn is not None and part.optimizer is not None:
            part.init_state_fn(part.optimizer, part.config)


def set_step_count(optimizer: ChainedOptimizer, steps: int) -> None:
    """Set Adam's step count, which the bias correction depends on."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            group["step"] = steps


@torch.no_grad()
def whole_over_replicas(
    name: str, optimizer: ChainedOptimizer, parameter: torch.nn.Parameter, group: dist.ProcessGroup
) -> torch.Tensor:
    """State tensor `name` of a parameter, float32, shaped like the parameter of this tensor-parallel rank.

    Collective over `group`, the processes among which a distributed optimizer's shards are spread.
    """
    held = held_state(optimizer, parameter)
    if is_distributed(optimizer):
        return assembled(held.tensors.get(name), held, parameter, group)
    return held.tensors[name].detach().view(parameter.shape)


@torch.no_grad()
def assembled(
    part: torch.Tensor | None, held: HeldState, parameter: torch.nn.Parameter, group: dist.ProcessGroup
) -> torch.Tensor:
    """The parameter-shaped float32 tensor whose elements [held.start, held.end) are `part` on this process and whose
    others are on the other processes of `group`."""
    flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if part is not None:
        flat[held.start : held.end] = part.reshape(-1).float()
    if group.size() > 1:
        dist.all_reduce(flat, group=group)
    return flat.view(parameter.shape)


def is_distributed(optimizer: ChainedOptimizer) -> bool:
    """Whether state is sharded over the processes that hold the same parameters."""
    return isinstance(optimizer.chained_optimizers[0], DistributedOptimizer)


def _known(main: torch.Tensor, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {MAIN: main} | {moment: state[moment] for moment in MOMENTS if moment in state}
