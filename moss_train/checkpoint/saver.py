"""Saving while training goes on: all processes of a run write one checkpoint together.

`begin` copies what this process has to save, which is the only time training stands still for it; a thread then writes
the copy into files of its own, and on the main process puts the parts of all processes together. The threads never
communicate: each leaves `part-<rank>.json` beside its files when they are on disk, and the main one waits for these.
Whether a save has succeeded everywhere is agreed on by the main threads, in `settle` (between steps) or `finish`.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_train.checkpoint import files, store
from moss_train.checkpoint.snapshot import Snapshot
from moss_train.checkpoint.tensor_files import FILE_BYTES, write_part
from moss_train.engines.fit import require_fit
from moss_train.engines.pieces import Piece, Shape
from moss_train.errors import CheckpointError
from moss_train.parallel import phases
from moss_train.parallel.agreement import gather_lists
from moss_train.parallel.groups import rank_and_ranks

_TRIAL = ".tmp-trial"  #: a file that is written to see whether one can be; cleared like an unfinished save
_POLL_S = 0.05  #: how often a thread looks whether the others are done
_GIVEN_UP_S = 5.0  #: that a thread may take to end when its save is given up


@dataclass(frozen=True)
class SaveFigures:
    """One finished save, as this process saw it."""

    step: int
    path: Path
    bytes: int  #: of the tensors: of all processes on the main one, of its own on another
    pause_s: float  #: training stood still for it
    seconds: float  #: from the copy to the end


@dataclass
class _Running:
    """A save that is being written."""

    step: int
    partial: Path  #: the folder it is written into
    bytes: int
    pause_s: float
    began: float
    thread: threading.Thread
    stop: threading.Event  #: set when the save is given up
    error: str | None = None
    path: Path | None = None  #: set on the main process when it is complete
    part_written: bool = False  #: this process's files are on disk
    progress: int = 0  #: grows while something is written


class _GivenUp(Exception):
    """Another process could not write its part, or the stage ends with an exception: ours is of no use."""


class Saver:
    """The saves of one stage. Every process has one and calls its methods at the same steps. Entered, it does not
    outlive an exception.

    directory: of the checkpoints. retain: called with it on the main process after each save, to remove older ones.
    asynchronous: False writes before `begin` returns, from the engine's memory, which needs no room for a copy.
    """

    def __init__(
        self,
        directory: Path,
        retain: Callable[[Path], object] = lambda directory: None,
        asynchronous: bool = True,
        file_bytes: int = FILE_BYTES,
    ):
        self._directory, self._retain = Path(directory), retain
        self._asynchronous, self._file_bytes = asynchronous, file_bytes
        self._rank, self._ranks = rank_and_ranks()
        self._snapshot = Snapshot()
        self._running: _Running | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """With an exception, which may be this process's alone, a running save is given up: nothing of it is written by
        a thread that the stage, or the interpreter, does not know of any more."""
        if kind is not None and self._running is not None:
            self._running.stop.set()
            self._running.thread.join(_GIVEN_UP_S)

    @property
    def busy(self) -> bool:
        """Whether a save is being written; the same on every process."""
        return self._running is not None

    @property
    def pause_s(self) -> float:
        """Seconds for which training stood still for the save that runs; 0 when none does."""
        return self._running.pause_s if self._running is not None else 0.0

    def begin(
        self,
        step: int,
        pieces: Sequence[Piece],
        state: dict[str, Any],
        provenance: dict[str, Any],
        expected: Mapping[str, Shape] | None = None,
    ) -> SaveFigures | None:
        """Save `step`; returns when `pieces` may change again. Collective.

        pieces: what this process saves; those of all processes cover every tensor once. state, provenance: JSON, of
        the main process. expected: name → shape of what the namespaces that occur in it must hold, no more and no less;
        None compares nothing. Gives the figures of the save before when that had to be waited for. CheckpointError, on
        every process, when this save cannot begin or the one before has failed; earlier checkpoints stay intact.
        """
        began = time.perf_counter()
        with phases.phase("save"):
            before = self.finish()
            partial, texts = self._prepare(step, state, provenance)
            copies = self._snapshot.take(pieces) if self._asynchronous else list(pieces)
            size = sum(piece.tensor.nbytes for piece in copies)
            stop = threading.Event()
            thread = threading.Thread(
                target=self._write, args=(copies, texts, expected or {}), name=f"save-{step}", daemon=True
            )
            self._running = _Running(step, partial, size, time.perf_counter() - began, began, thread, stop)
            thread.start()
            if not self._asynchronous:
                self._await(self._own_part_written)
                self._running.pause_s = time.perf_counter() - began
        return before

    def check(self) -> None:
        """Raise CheckpointError, on every process, unless the folder can be written: better now than at the first save.
        Collective."""
        fault = ""
        if self._rank == 0:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                files.replace(self._directory / _TRIAL, b"")
                (self._directory / _TRIAL).unlink()
            except OSError as error:
                fault = store.cannot_write(self._directory, error)
        told = gather_lists([fault] if fault else [])[0]
        if told:
            raise CheckpointError(told[0])

    def settle(self) -> SaveFigures | None:
        """The figures of the save if it has been completed since the last call, without waiting. Collective while a
        save is running. CheckpointError on every process when it has failed on one."""
        running = self._running
        if running is None:
            return None
        failed, complete = self._agreed(running.error is not None, running.path is not None)
        if failed:
            self._fail(running)
        return self._completed(running) if complete else None

    def finish(self) -> SaveFigures | None:
        """Wait until the running save, if there is one, is complete; its figures. Collective. Raises as `settle`."""
        running = self._running
        if running is None:
            return None
        with phases.phase("save"):
            self._await(self._own_part_written)
            if self._agreed(running.error is not None, False)[0]:
                self._fail(running)
            self._await(lambda: not running.thread.is_alive())
            if self._agreed(running.error is not None, False)[0]:
                self._fail(running)
            return self._completed(running)

    def _prepare(self, step: int, state: dict[str, Any], provenance: dict[str, Any]) -> tuple[Path, dict[str, bytes]]:
        """The folder for this save, made by the main process; there, the text files of the checkpoint."""
        texts: dict[str, bytes] = {}
        partial, fault = "", ""
        if self._rank == 0:
            try:
                texts = store.text_files(state, provenance)
                partial = store.begin_directory(self._directory, step).name
            except CheckpointError as error:
                fault = str(error)
            except OSError as error:
                fault = store.cannot_write(self._directory / store.step_name(step), error)
        partial, fault = gather_lists([partial, fault] if self._rank == 0 else [])[0]
        if fault:
            raise CheckpointError(fault)
        return self._directory / partial, texts

    def _write(self, copies: Sequence[Piece], texts: dict[str, bytes], expected: Mapping[str, Shape]) -> None:
        """The thread's work: this process's files, then, on the main process, the whole."""
        running = self._running
        assert running is not None
        partial, published = running.partial, None

        def progress() -> None:
            running.progress += 1
            if running.stop.is_set():
                raise _GivenUp

        try:
            part = write_part(partial, self._rank, copies, self._file_bytes, progress)
            files.sync_directory(partial)
            # The last that is done in the folder: whoever sees this file may rename it.
            files.replace(partial / _part_file(self._rank), json.dumps(part).encode())
            running.part_written = True
            if self._rank == 0:
                parts = self._gathered_parts(partial, progress)
                _require_all(parts, expected)
                published = store.publish(partial, running.step, parts, texts)
                running.bytes = sum(file["bytes"] for part in parts for file in part["files"].values())
                self._retain(self._directory)
                running.path = published
        except _GivenUp:
            pass
        except OSError as error:
            running.error = store.cannot_write(self._directory / store.step_name(running.step), error)
            if published is not None:
                running.error = f"{published} is saved, but what need not be kept cannot be removed ({error})"
        except Exception as error:  # told to every process by `settle` or `finish`
            running.error = f"{self._directory}: the save of step {running.step} failed: {error}"

    def _gathered_parts(self, partial: Path, progress: Callable[[], None]) -> list[dict[str, Any]]:
        """What every process wrote, when all have; their part files are removed, since the index and the manifest hold
        what is in them."""
        names = [_part_file(rank) for rank in range(self._ranks)]
        while not all((partial / name).is_file() for name in names):
            progress()
            time.sleep(_POLL_S)
        parts = [files.read_json(partial / name) for name in names]
        for name in names:
            (partial / name).unlink()
        return parts

    def _own_part_written(self) -> bool:
        running = self._running
        assert running is not None
        return running.part_written or not running.thread.is_alive()

    def _await(self, done: Callable[[], bool]) -> None:
        """Wait, with a sign of life whenever something was written meanwhile."""
        running, seen = self._running, -1
        assert running is not None
        while not done():
            if running.progress != seen:
                seen = running.progress
                phases.beat()
            time.sleep(_POLL_S / 10)

    def _agreed(self, *flags: bool) -> list[bool]:
        """Which flags are set on any process."""
        if self._ranks == 1:
            return list(flags)
        told = gather_lists([list(flags)] if any(flags) else [])
        return [any(own[0][number] for own in told if own) for number in range(len(flags))]

    def _fail(self, running: _Running) -> None:
        running.stop.set()
        running.thread.join()
        self._running = None
        errors = [told[0] for told in gather_lists([running.error] if running.error else []) if told]
        if self._rank == 0:
            store.discard_partial(running.partial)
        raise CheckpointError(errors[0])

    def _completed(self, running: _Running) -> SaveFigures:
        running.thread.join()
        self._running = None
        path = self._directory / store.step_name(running.step)
        return SaveFigures(running.step, path, running.bytes, running.pause_s, time.perf_counter() - running.began)


def _require_all(parts: Sequence[dict[str, Any]], expected: Mapping[str, Shape]) -> None:
    """Raise CheckpointError unless what was written is what was to be: a tensor that nobody took for its own must not
    be missed for the first time when it is needed."""
    namespaces = {name.split("/")[0] for name in expected}
    found = {
        name: tuple(entry["shape"])
        for part in parts
        for name, entry in part["tensors"].items()
        if name.split("/")[0] in namespaces
    }
    require_fit(found, expected, "what the processes saved")


def _part_file(rank: int) -> str:
    return f"part-{rank:05d}.json"
