"""The learning rate of every step, a pure function of the step: nothing to save, nothing to restore."""

import math

from moss_train.engines.config import OptimConfig


class LearningRate:
    """Warm-up to the peak, then decay to the floor, the same curve for every parameter group.

    Step t (from 0) of W warm-up steps runs at (t+1)/W of the peak, so no step is spent at rate 0; the peak is
    reached at step W−1 and the floor would be reached at step `total_steps`, one past the last.
    """

    def __init__(self, optim: OptimConfig, total_steps: int):
        if total_steps < 1:
            raise ValueError(f"total_steps={total_steps}: must be at least 1")
        self.optim = optim
        self.total_steps = total_steps
        steps = math.ceil(optim.warmup_fraction * total_steps) if optim.warmup_steps is None else optim.warmup_steps
        self.warmup_steps = min(steps, total_steps)

    def factor(self, step: int) -> float:
        """The share of a group's peak rate at which step `step` runs, between 0 and 1."""
        if step < self.warmup_steps:
            return self._rise(step)
        floor = self.optim.min_lr / self.optim.lr if self.optim.lr else 0.0
        left = (self.total_steps - step) / max(1, self.total_steps - self.warmup_steps)
        return floor + (1.0 - floor) * self._remaining(max(0.0, left))

    def rate(self, group: str, step: int) -> float:
        """The learning rate of a parameter group at step `step`."""
        return self.optim.group_lr.get(group, self.optim.lr) * self.factor(step)

    def _rise(self, step: int) -> float:
        if self.optim.warmup == "logarithmic":
            # deepspeed.runtime.lr_schedules.WarmupLR over W+1 steps without the first, whose rate is 0.
            return math.log(step + 2) / math.log(self.warmup_steps + 1)
        return (step + 1) / self.warmup_steps

    def _remaining(self, left: float) -> float:
        """The decay curve over the share of the decay that is still ahead: 1 at its begin, 0 at its end."""
        if self.optim.schedule == "constant":
            return 1.0
        if self.optim.schedule == "cosine":
            return (1.0 - math.cos(math.pi * left)) / 2
        return left
