"""The moments of megatron's optimizer under canonical names, and back into it.

Full tensors of one process: the state of a distributed optimizer, of tensor-parallel shards or of 16-bit weights
has another shape.
"""

from collections.abc import Mapping

import torch
from megatron.core.optimizer import ChainedOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


def moments(optimizer: ChainedOptimizer, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """`optimizer/<name>/<moment>` of every parameter given; zeros before the first step, as Adam starts."""
    states = _states(optimizer)
    return {
        f"optimizer/{name}/{moment}": states[parameter][moment]
        for name, parameter in parameters.items()
        for moment in MOMENTS
    }


@torch.no_grad()
def restore_moments(
    optimizer: ChainedOptimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
    steps: int,
) -> None:
    """Copy moments back in place and set Adam's step count, which the bias correction depends on."""
    states = _states(optimizer)
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            states[parameter][moment].copy_(tensors[f"optimizer/{name}/{moment}"])
    for inner in _inner_optimizers(optimizer):
        for group in inner.param_groups:
            group["step"] = steps


def initialise_moments(optimizer: ChainedOptimizer) -> None:
    """Make Adam's moments now instead of at the first step, so that a state exists from the beginning."""
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)


def _inner_optimizers(optimizer: ChainedOptimizer) -> list[torch.optim.Optimizer]:
    return [part.optimizer for part in optimizer.chained_optimizers]


def _states(optimizer: ChainedOptimizer) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
    return {parameter: state for inner in _inner_optimizers(optimizer) for parameter, state in inner.state.items()}
