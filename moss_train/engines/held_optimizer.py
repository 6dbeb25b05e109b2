"""Optimizers that can be told not to step, for an engine that calls them itself.

DeepSpeed's `step` cannot be left out: it also clears gradients and counters. With the optimizer inside it held, what it
does leaves weights and optimizer state as they were.
"""

from collections.abc import Iterable
from typing import Any

import torch

from moss_train.engines.config import OptimConfig
from moss_train.engines.optimizer_state import MOMENTS


class HeldOptimizer:
    """Mixed into an optimizer. `held`: steps do nothing."""

    held = False
    #: whether the gradients of a step are kept until the next one, as they were when it was taken
    keep_gradients = False

    def step(self, closure: Any = None) -> None:
        """See torch.optim.Optimizer.step."""
        if self.keep_gradients:
            for tensor in self.stepped():
                if tensor.grad is not None:
                    self.kept[tensor] = tensor.grad.detach().float().clone()
        if not self.held:
            super().step(closure)

    @property
    def kept(self) -> dict[torch.Tensor, torch.Tensor]:
        """The gradients kept, by the tensor that was stepped."""
        if not hasattr(self, "_kept"):
            self._kept: dict[torch.Tensor, torch.Tensor] = {}
        return self._kept

    def stepped(self) -> Iterable[torch.Tensor]:
        """The tensors that the next step would update."""
        return [tensor for group in self.param_groups for tensor in group["params"]]


class HeldAdamW(HeldOptimizer, torch.optim.AdamW):
    """AdamW with decoupled decay, whose step count belongs to the tensor: ZeRO-3 steps one group of tensors after
    another, so a count of the whole group would run ahead."""

    def initialise(self, tensors: Iterable[torch.Tensor]) -> None:
        """Make the moments now instead of at the first step, so that a state exists from the beginning."""
        for tensor in tensors:
            # The fused kernel reads the count where the tensor lies; the other ways count on the host.
            device = tensor.device if self.defaults["fused"] else "cpu"
            moments = {moment: torch.zeros_like(tensor) for moment in MOMENTS}
            self.state[tensor] = {"step": torch.zeros((), dtype=torch.float32, device=device), **moments}

    def set_step_count(self, steps: int) -> None:
        """Set the step count, which the bias correction depends on."""
        for state in self.state.values():
            state["step"].fill_(steps)


class HeldSGD(HeldOptimizer, torch.optim.SGD):
    """Without momentum, so without state."""

    def initialise(self, tensors: Iterable[torch.Tensor]) -> None:
        """Nothing to make."""

    def set_step_count(self, steps: int) -> None:
        """Nothing counts."""


def held_optimizer(optim: OptimConfig, param_groups: list[dict[str, Any]], fused: bool) -> HeldAdamW | HeldSGD:
    """The optimizer that `optim` names over `param_groups`, each with its own weight_decay.

    fused: AdamW in one kernel, which needs no room for intermediate results as large as what is stepped.
    """
    if optim.name == "sgd":
        return HeldSGD(param_groups, lr=optim.lr)
    return HeldAdamW(param_groups, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, fused=fused)
