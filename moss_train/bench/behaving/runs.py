"""One run of `bench behaviour`: the real-time stage trained in a process of its own, then scored on held-out streams.

What is finished stands in `runs.jsonl`, one line a run, and is not done again.
"""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_train.bench.behaving.variants import SHARED, VARIANTS, Variant
from moss_train.errors import DataError
from moss_train.train.compose import compose_run, resolved_dict

STAGES_BEFORE = ("align", "temporal", "sft")
LAST = "realtime"


@dataclass(frozen=True)
class Place:
    """Where everything lies."""

    out: Path
    overrides: tuple[str, ...]  #: of every training
    threads: int  #: of each process
    limit_s: float  #: seconds that one training may take

    @property
    def record(self) -> Path:
        return self.out / "runs.jsonl"

    @property
    def clips(self) -> Path:
        """What tells the packed clips from others."""
        return self.out / "data" / "render.json"

    def data(self, source: str) -> Path:
        return self.out / "data" / source

    def folder(self, seed: int, name: str) -> Path:
        return self.out / f"seed{seed}" / name


@dataclass(frozen=True)
class Run:
    """A variant with a seed of weights, order and augmentations; `variant` None: the stages that all share."""

    seed: int
    variant: Variant | None

    @property
    def name(self) -> str:
        return SHARED if self.variant is None else self.variant.name

    def command(self, place: Place) -> list[str]:
        """What trains it; [] when nothing is trained."""
        common = [
            "train", "recipe=quickstart", f"seed={self.seed}", f"data_root={place.data('train')}",
            f"output_dir={place.folder(self.seed, self.name)}", "tracking.wandb=disabled", "stages.*.save_every=0",
            "precision=auto",
            # `eval` scores it afterwards, outside the time that a training may take.
            "evaluate.source=null", "evaluate.offline_source=null",
        ]  # fmt: skip
        if self.variant is None:
            return [*common, f"~stages.{LAST}", *place.overrides]
        if not self.variant.trains:
            return []
        return [
            *common,
            *(f"~stages.{name}" for name in STAGES_BEFORE),
            f"stages.{LAST}.init={place.folder(self.seed, SHARED)}",
            f"stages.{LAST}.data.sources.{LAST}.path={place.data('train/' + self.variant.source)}",
            *place.overrides,
            *self.variant.overrides,
        ]

    def digest(self, place: Place) -> str:
        """Changes when the run would be another: other clips, another recipe, other stages before it."""
        command = self.command(place)
        settings = _settings(tuple(command[1:])) if command else None
        before = "" if self.variant is None else Run(self.seed, None).digest(place)
        clips = place.clips.read_text(encoding="utf-8") if place.clips.is_file() else ""
        return hashlib.sha256(json.dumps([self.name, settings, before, clips]).encode()).hexdigest()[:12]


@functools.lru_cache(maxsize=512)
def _settings(overrides: tuple[str, ...]) -> dict[str, Any]:
    """The configuration of a training, composed once in this process: that takes a second, and digests ask again and
    again for the same ones."""
    return resolved_dict(compose_run(list(overrides)))


def finished(place: Place) -> dict[tuple[int, str], dict[str, Any]]:
    """The lines of the record that belong to runs as they would be made now."""
    done: dict[tuple[int, str], dict[str, Any]] = {}
    if place.record.is_file():
        for line in place.record.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the line that a kill cut off
            variant = VARIANTS.get(row["variant"])
            if variant is None and row["variant"] != SHARED:
                continue
            if row["digest"] == Run(row["seed"], variant).digest(place):
                done[row["seed"], row["variant"]] = row
    return done


def carry_out(runs: Sequence[Run], place: Place, at_once: int, say: Any) -> dict[tuple[int, str], dict[str, Any]]:
    """All runs, `at_once` at a time, those of the record left out; (seed, variant) → line of the record.

    Raises DataError when a run fails: the others that are under way are finished and kept.
    """
    done = finished(place)
    for group in ([run for run in runs if run.variant is None], [run for run in runs if run.variant is not None]):
        waiting = [run for run in group if (run.seed, run.name) not in done]
        with ThreadPoolExecutor(at_once) as pool:
            futures = [pool.submit(_carry_out, run, place, run.digest(place)) for run in waiting]
            try:
                for future in as_completed(futures):
                    row = future.result()
                    done[row["seed"], row["variant"]] = row
                    _note(row, place.record)
                    say(row)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    return done


def _note(row: dict[str, Any], record: Path) -> None:
    """Add a line, which does not go on a line that a kill has cut off."""
    cut = record.is_file() and record.stat().st_size > 0 and not record.read_bytes().endswith(b"\n")
    with record.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut else "") + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _begin(folder: Path, digest: str) -> None:
    """Go on with what the same run began, and remove what another one left."""
    mark = folder / "digest"
    if folder.is_dir() and not (mark.is_file() and mark.read_text(encoding="utf-8") == digest):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(digest, encoding="utf-8")


def _carry_out(run: Run, place: Place, digest: str) -> dict[str, Any]:
    folder = place.folder(run.seed, run.name)
    command = run.command(place)
    began = time.monotonic()
    if command:
        _begin(folder, digest)
        _moss_train(command, place, folder, place.limit_s if run.variant is not None else None)
    row: dict[str, Any] = {"seed": run.seed, "variant": run.name, "digest": digest}
    row["training_s"] = round(time.monotonic() - began, 1)
    if run.variant is None:
        return row
    checkpoint = folder if command else place.folder(run.seed, SHARED)
    _moss_train(
        ["eval", f"ckpt={checkpoint}", f"data={place.data('heldout/realtime')}", f"out={folder / 'evaluation'}",
         f"offline_data={place.data('heldout/sft')}", "pictures=0"],
        place, folder, None,
    )  # fmt: skip
    report = json.loads((folder / "evaluation" / "report.json").read_text(encoding="utf-8"))
    return row | {"figures": report["figures"]}


def _moss_train(arguments: list[str], place: Place, folder: Path, limit_s: float | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{arguments[0]}.txt"
    environment = os.environ | {"OMP_NUM_THREADS": str(place.threads)}
    with log.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                [sys.executable, "-m", "moss_train", *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=limit_s,
            ).returncode
        except subprocess.TimeoutExpired:
            raise DataError(
                f"{folder.name} took longer than limit_s={limit_s:.0f}: raise it, or train fewer steps "
                "(overrides=[stages.realtime.steps=…])"
            ) from None
    if code:
        lines = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise DataError(f"{folder} ended with exit code {code}; the end of {log}:\n{lines}")
