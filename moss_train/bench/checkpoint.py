"""`moss-train bench checkpoint`: what saving and loading cost, beside torch.save and a plain copy of the same bytes.

One process, a real model and optimizer in training. Every round measures each way once, one after the other, so that a
disk that is slow for a while is slow for all; medians are compared.
"""

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from moss_train.bench.one_layout import Shape, Work, prepare
from moss_train.bench.parallel import model_of
from moss_train.checkpoint import files
from moss_train.checkpoint.saver import Saver
from moss_train.checkpoint.store import open_checkpoint
from moss_train.engines.memory import ResidentSet
from moss_train.engines.protocol import Engine
from moss_train.errors import ConfigError
from moss_train.parallel import groups
from moss_train.parallel.config import LayoutConfig

PAUSE_RATIO = 0.15  #: most
VERSUS_COPY = 0.5  #: least, saving and loading


@dataclass
class CheckpointOptions:
    """How much is saved, and how often."""

    rounds: int = 5
    """Rounds that are measured, after one to warm up: the first save also allocates what later ones reuse."""
    model: str = "bench"
    """Sizes, a file of recipes/model; a checkpoint is about twelve bytes a parameter."""
    folder: str | None = None
    """Where to write; null takes a temporary folder. The file system matters: give one like the run's."""

    def validate(self) -> None:
        """Raise ConfigError for the first field that cannot be."""
        if self.rounds < 1:
            raise ConfigError(f"rounds={self.rounds}: must be at least 1")


@dataclass
class Round:
    """Seconds of each way."""

    pause: float  #: training stood still for our save
    save: float  #: our save, from the copy to the rename
    step_beside: float  #: a training step while a save is written
    step: float  #: a training step otherwise
    torch_save: float  #: torch.save and fsync
    copy_synced: float  #: copying the checkpoint's files, each fsynced
    copy: float  #: copying them, not synced
    load: float  #: verifying every byte and filling model and optimizer


def measure_round(engine: Engine, saver: Saver, step: Callable[[], object], folder: Path, number: int) -> Round:
    """One round; what it wrote is removed."""
    saver.begin(number, engine.pieces(), {"engine": engine.metadata()}, {})
    pause = saver.pause_s
    step_beside = _seconds(step)
    saved = saver.finish()
    assert saved is not None
    tensors = {piece.name: piece.tensor for piece in engine.pieces()}
    torch_save = _seconds(lambda: _torch_save(tensors, folder / "torch.pt"))
    copies = folder / "copies"
    copy_synced = _seconds(lambda: _copy(saved.path, copies, synced=True))
    shutil.rmtree(copies)
    copy = _seconds(lambda: _copy(saved.path, copies, synced=False))
    shutil.rmtree(copies)
    (folder / "torch.pt").unlink()
    files.forget_verified(saved.path)
    load = _seconds(lambda: engine.load(open_checkpoint(saved.path), engine.metadata()))
    shutil.rmtree(saved.path)
    return Round(pause, saved.seconds, step_beside, _seconds(step), torch_save, copy_synced, copy, load)


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _torch_save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(tensors, path)
    files.sync_file(path)


def _copy(source: Path, target: Path, synced: bool) -> None:
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        if synced:
            files.sync_file(target / path.name)


def checkpoint_figures(options: CheckpointOptions) -> dict:
    """The result in the form of design §7."""
    folder = Path(tempfile.mkdtemp(prefix="moss_checkpoint_", dir=options.folder))
    groups.initialize(LayoutConfig())
    try:
        engine, batches, _ = prepare(Work(model_of(options.model), LayoutConfig(), (Shape(frames=1),)), steps=10**6)

        def step() -> object:
            return engine.train_step(batches)

        step()
        saver = Saver(folder / "checkpoints")
        with ResidentSet() as resident:
            pass
        before = resident.peak
        with ResidentSet() as resident:
            saver.begin(0, engine.pieces(), {"engine": engine.metadata()}, {})
            first = saver.finish()
        assert first is not None
        extra = resident.peak - before
        shutil.rmtree(first.path)
        rounds = [measure_round(engine, saver, step, folder, number) for number in range(1, options.rounds + 1)]
    finally:
        groups.shutdown()
        shutil.rmtree(folder, ignore_errors=True)

    def median(name: str) -> float:
        return statistics.median(getattr(one, name) for one in rounds)

    figures = {
        "pause_ratio": median("pause") / median("torch_save"),
        "save_vs_copy": median("copy_synced") / median("save"),
        "load_vs_copy": median("copy") / median("load"),
        "extra_memory_mb": extra / 1e6,
        "checkpoint_mb": first.bytes / 1e6,
        "pause_s": median("pause"),
        "first_pause_s": first.pause_s,
        "save_s": median("save"),
        "load_s": median("load"),
        "torch_save_s": median("torch_save"),
        "copy_s": median("copy"),
        "copy_synced_s": median("copy_synced"),
        "step_ratio_beside_save": median("step_beside") / median("step"),
    }
    bars = (("pause_ratio", -PAUSE_RATIO), ("save_vs_copy", VERSUS_COPY), ("load_vs_copy", VERSUS_COPY))
    failures = [
        f"{name} is {figures[name]:.3g}, {'more' if bar < 0 else 'less'} than {abs(bar):g}"
        for name, bar in bars
        if (figures[name] > -bar if bar < 0 else figures[name] < bar)
    ]
    return {"name": "bench checkpoint", "ok": not failures, "figures": figures, "failures": failures}


def checkpoint_command(options: CheckpointOptions) -> int:
    """Save and load a model in training, beside torch.save and a plain copy of the same bytes.

    pause_ratio: how long training stands still for a save, relative to torch.save with fsync. save_vs_copy,
    load_vs_copy: bytes a second relative to copying the checkpoint's files (with fsync for saving). Loading verifies
    every checksum. Prints a table and one JSON line.
    """
    result = checkpoint_figures(options)
    table = Table(title="checkpoints: one process")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in result["figures"].items():
        table.add_row(name, f"{value:,.3f}")
    Console().print(table)
    print(json.dumps(result))
    return 0 if result["ok"] else 1
