"""How checkpoints are written."""

from dataclasses import dataclass


@dataclass
class CheckpointConfig:
    """Saving. How often, and which are kept, is each stage's to say."""

    asynchronous: bool = True
    """Training goes on while a checkpoint is written, from a copy in host memory of what this process saves: up to 12
    bytes for each trained parameter it holds. False writes from where the tensors are, while training waits."""
