"""How much is trained in verbs that compare layouts: options that they share, and the work that follows from them."""

from dataclasses import dataclass
from typing import Any

from moss_train.bench.one_layout import Shape, Work
from moss_train.errors import ConfigError
from moss_train.model.config import ModelConfig, RecomputeConfig
from moss_train.parallel.config import LayoutConfig


@dataclass
class WorkOptions:
    """The global batch, what is trained on it, and how often."""

    steps: int = 2
    """Timed steps of each layout; as many of one process are timed before and after it."""
    trainable: str = "all"
    """What is trained: a preset of parameter groups."""
    microbatches: int = 4
    """Microbatches of the global batch; data-parallel processes share them, a pipeline fills up with them."""
    frames: int = 2
    """Frames of a microbatch."""
    tokens_a_frame: int = 16
    """Text tokens for each frame."""

    def validate(self) -> None:
        """Raise ConfigError for the first field that cannot be."""
        for name in ("steps", "microbatches", "tokens_a_frame"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.frames < 0:
            raise ConfigError(f"frames={self.frames}: must be at least 0")

    def require_even(self, name: str, layout: LayoutConfig) -> None:
        """Raise ConfigError unless the microbatches can be dealt out evenly in the layout called `name`."""
        share = layout.dp or 1
        multiple = share * (layout.pp if layout.vpp > 1 else 1)
        if self.microbatches % multiple:
            raise ConfigError(f"microbatches={self.microbatches}: {name} needs a multiple of {multiple}")

    def work(self, model: ModelConfig, layout: LayoutConfig, recompute: RecomputeConfig, **engine: Any) -> Work:
        """What each process of `layout` does. `engine`: fields of `Work` that say which engine, and how it is set."""
        shape = Shape(rows=1, frames=self.frames, tokens_a_frame=self.tokens_a_frame)
        return Work(model, layout, (shape,) * self.microbatches, recompute, self.trainable, **engine)
