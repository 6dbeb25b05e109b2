"""Jobs of forked ranks: a small run that is saved, and attempts to open or resume what was damaged."""

import contextlib
import io
import os
from pathlib import Path

from moss_train.checkpoint.store import open_together
from moss_train.checkpoint.tensor_files import TensorIndex
from moss_train.cli import main
from moss_train.errors import CheckpointError
from moss_train.parallel import groups
from moss_train.train.compose import compose_run
from moss_train.train.pipeline import run_pipeline


def train(rank: int, ranks: int, overrides: list[str]) -> int:
    """A run, saved by all ranks together."""
    os.environ["WORLD_SIZE"] = str(ranks)
    return run_pipeline(compose_run(overrides))


def open_each(rank: int, ranks: int, folders: list[Path], read: bool = False) -> list[str | None]:
    """Of each checkpoint: why it cannot be opened or, with `read`, why its tensors cannot be read; None: it can."""
    groups.initialize()
    answers: list[str | None] = []
    for folder in folders:
        try:
            reader = open_together(folder)
            if read:
                reader.tensors()
            answers.append(None)
        except CheckpointError as error:
            answers.append(str(error))
    return answers


def resume(rank: int, ranks: int, overrides: list[str]) -> tuple[int, str, int]:
    """`moss-train train`: its exit code, what it wrote on standard error, and how many blocks of tensors it read."""
    os.environ["WORLD_SIZE"] = str(ranks)
    exact, reads = TensorIndex.read, 0

    def counted(index, name, offsets, shape):
        nonlocal reads
        reads += 1
        return exact(index, name, offsets, shape)

    TensorIndex.read = counted
    try:
        with contextlib.redirect_stderr(io.StringIO()) as words, contextlib.redirect_stdout(io.StringIO()):
            code = main(["train", *overrides])
    finally:
        TensorIndex.read = exact
    return code, words.getvalue(), reads
