"""The layout: over how many processes each part of the work is split."""

from dataclasses import dataclass

from moss_train.errors import ConfigError


@dataclass
class LayoutConfig:
    """Parallel degrees. The data-parallel degree is what remains of the world size."""

    tp: int = 1
    """Tensor-parallel degree: over how many processes each weight matrix is split."""
    pp: int = 1
    """Pipeline-parallel degree: over how many processes the layers are split."""
    backend: str | None = None
    """torch.distributed backend; null chooses nccl with CUDA and gloo without."""
    timeout_minutes: int = 30
    """How long a collective may wait before the job is given up, in minutes."""

    def validate(self, world_size: int) -> None:
        """Raise ConfigError unless the degrees are legal on `world_size` processes."""
        for name in ("tp", "pp"):
            degree = getattr(self, name)
            if degree != 1:
                raise ConfigError(
                    f"layout.{name}={degree}: this version trains with data parallelism only; set layout.{name}=1"
                )
        if self.backend not in (None, "gloo", "nccl"):
            raise ConfigError(f"layout.backend={self.backend!r}: legal values are null, gloo, nccl")
        if self.timeout_minutes < 1:
            raise ConfigError(f"layout.timeout_minutes={self.timeout_minutes}: must be at least 1")
        if world_size % (self.tp * self.pp):
            raise ConfigError(
                f"layout.tp={self.tp} × layout.pp={self.pp} does not divide the {world_size} processes started"
            )
