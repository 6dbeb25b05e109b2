"""A run's folder as it can be seen from outside while the run goes on: steps taken, saves under way, checkpoints."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_train.checkpoint.store import latest, step_directories
from moss_train.report.metrics_file import FILE_NAME

_PARTIAL = ".tmp-step_"  #: and the step, and what no other save has


@dataclass(frozen=True)
class Place:
    """A step of a stage."""

    stage: str
    step: int

    def __str__(self) -> str:
        return f"{self.stage} {self.step}"


class RunFolder:
    """`output` of a run of these stages, in their order."""

    def __init__(self, output: Path, stages: tuple[str, ...]):
        self.output, self.stages = output, stages
        self._metrics = output / FILE_NAME

    def mark(self) -> int:
        """A place in the metrics from which `records` reads."""
        return self._metrics.stat().st_size if self._metrics.is_file() else 0

    def records(self, mark: int = 0) -> list[dict[str, Any]]:
        """Rows and events of the metrics since `mark`; a line that is being written, or was cut, is left out."""
        if not self._metrics.is_file():
            return []
        with self._metrics.open("rb") as file:
            file.seek(mark)
            lines = file.read().split(b"\n")[:-1]
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def steps(self, mark: int) -> list[Place]:
        """Steps logged since `mark`."""
        return [Place(row["stage"], row["step"]) for row in self.records(mark) if "metrics" in row]

    def saves(self, since: float) -> list[Path]:
        """Folders of unfinished saves that were written to after `since` (seconds of the clock on the wall)."""
        found = []
        for stage in self.stages:
            directory = self.output / stage / "checkpoints"
            try:
                entries = list(directory.iterdir())
            except FileNotFoundError:
                continue
            for entry in entries:
                try:
                    if entry.name.startswith(_PARTIAL) and entry.stat().st_mtime >= since:
                        found.append(entry)
                except FileNotFoundError:  # complete meanwhile
                    continue
        return found

    def newest(self) -> Place | None:
        """The checkpoint from which a run would go on, of the last stage that has one."""
        for stage in reversed(self.stages):
            found = latest(self.output / stage / "checkpoints")
            if found is not None:
                return Place(stage, int(found.name.rpartition("_")[2]))
        return None

    def checkpoints(self, stage: str) -> dict[int, Path]:
        """Step → directory of the stage's checkpoints."""
        return step_directories(self.output / stage / "checkpoints")
