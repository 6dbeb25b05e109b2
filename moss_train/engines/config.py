"""The optimizer, its learning-rate schedule, and which engine runs them."""

import math
from dataclasses import dataclass, field
from typing import Any

from moss_train.errors import ConfigError
from moss_train.model.config import RecomputeConfig

ENGINES = ("megatron", "deepspeed")
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("linear", "cosine", "constant")
WARMUPS = ("linear", "logarithmic")


@dataclass
class EngineConfig:
    """Which engine trains."""

    name: str = "megatron"
    """megatron: megatron-core's DDP, optimizer and schedules. deepspeed: ZeRO 0 to 3 (layout.zero) around the same
    model, with pipeline stages 0 and 1. See docs/engines.md."""
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    """What the backward pass computes again to save memory."""
    overlap_grad_reduce: bool = False
    """Sum gradients over data-parallel processes bucket by bucket while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass goes on; needs layout.zero=1 and overlap_grad_reduce."""
    loss_scale: float | None = None
    """precision=fp16 alone: a constant by which the loss is multiplied before the backward pass; null adapts it."""
    initial_loss_scale: float = 65536.0
    """precision=fp16 alone: where the adapted scale starts. A step that overflows is not taken and halves it, but for
    the first one after each doubling; 1,000 steps that do not overflow double it."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """name=deepspeed alone: further fields of DeepSpeed's JSON, such as `zero_optimization.offload_optimizer.device`.
    What follows from other fields of ours cannot be set here."""

    def validate(self) -> None:
        """Raise ConfigError for the first field that cannot be."""
        if self.name not in ENGINES:
            raise ConfigError(f"engine.name={self.name!r}: legal values are {', '.join(ENGINES)}")
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ConfigError("engine.overlap_param_gather=true: needs engine.overlap_grad_reduce=true")
        for name, value in (("loss_scale", self.loss_scale), ("initial_loss_scale", self.initial_loss_scale)):
            if value is not None and not 1.0 <= value < math.inf:
                raise ConfigError(f"engine.{name}={value}: must be a number of at least 1")
        try:
            self.recompute.validate()
        except ConfigError as error:
            raise ConfigError(f"engine.{error}") from error


@dataclass
class OptimConfig:
    """The optimizer and its learning rate. The defaults are what the reference's offline SFT amounts to."""

    name: str = "adamw"
    """adamw, or sgd (without momentum; for comparisons, since it keeps no state)."""
    lr: float = 1e-5
    """Peak learning rate of every parameter group that `group_lr` does not name."""
    group_lr: dict[str, float] = field(default_factory=dict)
    """Peak learning rate by parameter group (`model/groups.py`). An explicit 0.0 keeps a group's weights where they
    are but gives it gradients and optimizer state; a group that shall have neither is left out of `trainable`."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay, for a group at `lr`; other groups end in the same proportion."""
    warmup_fraction: float = 0.1
    """Part of the stage's steps over which the rate rises; rounded up to whole steps. The reference's value."""
    warmup_steps: int | None = None
    """Steps over which the rate rises; null takes `warmup_fraction`."""
    warmup: str = "linear"
    """Shape of the rise: linear, or logarithmic (DeepSpeed's default, under which the reference was trained)."""
    schedule: str = "linear"
    """Decay after the rise: linear (what the reference effectively used), cosine, or constant."""
    weight_decay: float = 0.0
    """Decoupled weight decay, for matrices only: never for norms, biases and gates. The reference uses none."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of Adam's two moments; the reference's values."""
    eps: float = 1e-8
    """Added to Adam's denominator; the reference's value."""
    clip: float = 1.0
    """Largest norm of the whole gradient; larger ones are scaled down to it. 0 is off. The reference's value."""

    def validate(self) -> None:
        """Raise ConfigError for the first field that cannot be. Names of groups are checked with the model."""
        if self.name not in OPTIMIZERS:
            raise ConfigError(f"optim.name={self.name!r}: legal values are {', '.join(OPTIMIZERS)}")
        at_least_zero = {"lr": self.lr, "min_lr": self.min_lr, "weight_decay": self.weight_decay, "clip": self.clip}
        at_least_zero |= {f"group_lr.{name}": rate for name, rate in self.group_lr.items()}
        for name, value in at_least_zero.items():
            if not 0.0 <= value < math.inf:
                raise ConfigError(f"optim.{name}={value}: must be a number of at least 0")
        if self.min_lr > self.lr:
            raise ConfigError(f"optim.min_lr={self.min_lr}: must not be above optim.lr={self.lr}")
        if not 0.0 <= self.warmup_fraction <= 1.0:
            raise ConfigError(f"optim.warmup_fraction={self.warmup_fraction}: must lie between 0 and 1")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ConfigError(f"optim.warmup_steps={self.warmup_steps}: must be at least 0, or null for the fraction")
        if self.warmup not in WARMUPS:
            raise ConfigError(f"optim.warmup={self.warmup!r}: legal values are {', '.join(WARMUPS)}")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"optim.schedule={self.schedule!r}: legal values are {', '.join(SCHEDULES)}")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"optim.betas={list(self.betas)}: must be two numbers from 0 up to but not including 1")
        if not 0.0 < self.eps < math.inf:
            raise ConfigError(f"optim.eps={self.eps}: must be above 0")
