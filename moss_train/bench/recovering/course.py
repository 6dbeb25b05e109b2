"""The course of a measurement: a run that nobody kills, then the same run killed again and again until it is done."""

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moss_train.bench.recovering.comparing import Comparison, compare_runs
from moss_train.bench.recovering.folder import RunFolder
from moss_train.bench.recovering.job import Job, Plant, warm_up
from moss_train.bench.recovering.killing import Kill, Killed, RunFailed, Timings, strike
from moss_train.bench.recovering.preparing import STAGES, prepared_data, run_overrides
from moss_train.bench.recovering.samples import SampleFigures, compare_samples


@dataclass
class Recovered:
    """What came of a run that was killed."""

    kills: list[Killed] = field(default_factory=list)
    comparison: Comparison = field(default_factory=Comparison)
    samples: SampleFigures = field(default_factory=SampleFigures)
    failures: list[str] = field(default_factory=list)


class Course:
    """Runs of one configuration below a folder, whose earlier runs are removed."""

    def __init__(
        self,
        folder: Path,
        ranks: int,
        steps: int,
        seed: int,
        more: Sequence[str] = (),
        launcher: str = "forked",
        deadline_s: float = 300.0,
    ):
        """steps: of the last stage. more: overrides for all runs. deadline_s: of a run, and of waiting for a kill."""
        self.folder, self.ranks, self.steps, self.seed = folder, ranks, steps, seed
        self.more, self.launcher, self.deadline_s = list(more), launcher, deadline_s
        self.whole = RunFolder(folder / "whole", STAGES)
        self.usual = Timings(0.0, 0.0, 0.0)
        self._packed: Path | None = None

    def run_whole(self) -> Timings:
        """Train without a kill; how long things usually take."""
        self._packed = prepared_data(self.folder)
        shutil.rmtree(self.whole.output, ignore_errors=True)
        if self.launcher == "forked":
            warm_up()
        with self._job(self.whole.output, 0, None) as job:
            while not self.whole.steps(0) and job.alive():
                time.sleep(0.02)
            start = time.monotonic() - job.began
            self._finish(job)
        records = self.whole.records()
        self.usual = Timings(
            start,
            statistics.median(row["metrics"]["step_seconds"] for row in records if "metrics" in row),
            statistics.median(row["seconds"] for row in records if row.get("event") == "checkpoint"),
        )
        return self.usual

    def run_killed(
        self,
        kills: Sequence[Kill],
        say: Callable[[int, Killed], None] = lambda number, killed: None,
        plant: Plant | None = None,
        name: str = "killed",
    ) -> Recovered:
        """The same run, killed as planned and resumed each time, compared with the whole one.

        say: told of each kill. plant: changes the program of each process before it trains.
        """
        folder, found = RunFolder(self.folder / name, STAGES), Recovered()
        shutil.rmtree(folder.output, ignore_errors=True)
        try:
            for number, kill in enumerate(kills):
                mark = folder.mark()
                with self._job(folder.output, number, plant) as job:
                    killed = strike(job, folder, mark, kill, self.usual, self.deadline_s)
                if killed is None:
                    found.failures.append(
                        f"kill {number + 1} of {len(kills)} did not come before the run's end: give it more steps"
                    )
                    break
                found.kills.append(killed)
                found.failures += [f"kill {number + 1}: {fault}" for fault in killed.faults]
                say(number + 1, killed)
            with self._job(folder.output, len(kills), plant) as job:
                self._finish(job)
        except RunFailed as failed:
            found.failures.append(f"after {len(found.kills)} kills: {failed}")
            return found
        found.comparison = compare_runs(self.whole, folder)
        found.samples = compare_samples(self.whole, folder)
        found.failures += found.comparison.differences + found.samples.differences
        return found

    def _job(self, output: Path, number: int, plant: Plant | None) -> Job:
        assert self._packed is not None, "run_whole comes first"
        overrides = [*run_overrides(self._packed, output, self.steps, self.seed), *self.more]
        logs = self.folder / "logs" / f"{output.name}{number:03d}"
        shutil.rmtree(logs, ignore_errors=True)
        return Job(overrides, self.ranks, logs, self.launcher, plant)

    def _finish(self, job: Job) -> None:
        """Wait for the end of a run that must succeed."""
        ranks = range(self.ranks)
        ended = job.wait(ranks, self.deadline_s)
        if not ended or any(job.exit_codes()):
            raise RunFailed(f"the run did not come to its end, exit codes {job.exit_codes()}\n{job.words()}")
