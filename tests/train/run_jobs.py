"""Whole runs as jobs of forked ranks (`bench.equivalence.ranks`)."""

import os
import signal
from pathlib import Path

import torch

from moss_train.checkpoint.store import latest, load_checkpoint
from moss_train.engines.megatron import MegatronEngine
from moss_train.report.metrics_file import FILE_NAME, read_metrics
from moss_train.train.compose import compose_run
from moss_train.train.pipeline import run_pipeline


def train(rank: int, ranks: int, overrides: list[str], stop_at: int | None = None) -> int:
    """A job: a run as torchrun would start it, and what `run_pipeline` returned. The last rank gets SIGTERM in its
    `stop_at`-th step."""
    os.environ |= {"WORLD_SIZE": str(ranks)}
    step, taken = MegatronEngine.train_step, 0

    def stopping(engine, *arguments):
        nonlocal taken
        taken += 1
        if taken == stop_at and rank == ranks - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(engine, *arguments)

    MegatronEngine.train_step = stopping
    try:
        return run_pipeline(compose_run(overrides))
    finally:
        MegatronEngine.train_step = step


def newest(output: Path, stage: str = "realtime"):
    """The stage's newest checkpoint, read."""
    return load_checkpoint(latest(output / stage / "checkpoints"))


def rows(output: Path) -> dict[tuple[str, int], dict[str, float]]:
    """(stage, step) → metrics; of a step that was taken twice the later ones."""
    return {(row.stage, row.step): row.metrics for row in read_metrics(output / FILE_NAME)}


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Between two checkpoints' weights, relative to each tensor's largest entry. Each process has random states."""
    names = [{name for name in tensors if not name.startswith("random/")} for tensors in (ours, theirs)]
    assert names[0] == names[1]
    weights = [(ours[name], theirs[name]) for name in ours if name.startswith("model/") and ours[name].numel()]
    return max(float((own - other).abs().max() / other.abs().max().clamp(min=1e-3)) for own, other in weights)
