"""`samples.jsonl`: what a stage was trained on, one line a step: `{"step": 7, "keys": [["realtime", "clip-3"], …]}`.

The pairs of source and key stand in the order of the global batch, whatever the layout; of a split sample each part is
an entry of its own. Whoever goes on from a checkpoint cuts the file back to its step first, so that the lines are those
of a run that was never interrupted.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from moss_train.errors import DataError

FILE_NAME = "samples.jsonl"


@dataclass(frozen=True)
class ConsumedStep:
    """The samples of one step."""

    step: int
    keys: list[tuple[str, str]]  #: (source, key) of the global batch, samples that were masked included


class SamplesFile:
    """Writes `samples.jsonl` of one stage; for one process. Use as a context manager or call `close()`.

    Args:
        path: the file; its folder is made if need be.
        step: the step that the stage goes on after. Lines of later steps, and one that a crash cut short, are removed.
    """

    def __init__(self, path: Path, step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("a+b")
        self._file.truncate(_end_of(self._file, step))

    def write(self, step: int, keys: Sequence[tuple[str, str]]) -> None:
        """Append a step's line and hand it to the operating system: it survives the end of this process."""
        self._file.write(json.dumps({"step": step, "keys": keys}, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Have the lines on disk. Before a checkpoint is published: it must not outlive the record of its steps."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """May be called twice."""
        self._file.close()

    def __enter__(self) -> "SamplesFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_samples(path: Path) -> list[ConsumedStep]:
    """The steps in order. A last line that a crash cut short is left out; DataError names any other that is no record,
    or whose step does not follow the one before."""
    steps: list[ConsumedStep] = []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = ConsumedStep(record["step"], [(source, key) for source, key in record["keys"]])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} line {number} is no record of a step's samples ({error})") from error
        if steps and step.step != steps[-1].step + 1:
            raise DataError(f"{path} line {number}: step {step.step} stands after step {steps[-1].step}")
        steps.append(step)
    return steps


def _end_of(file: BinaryIO, last_step: int) -> int:
    """Where the lines end that belong to steps up to `last_step`."""
    file.seek(0)
    end = 0
    for line in file:
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > last_step:
                break
        except (ValueError, KeyError, TypeError):
            break
        end += len(line)
    return end
