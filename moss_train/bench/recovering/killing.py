"""Which processes are killed when: drawn from a seed, carried out on a job that trains, and what came of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moss_train.bench.recovering.folder import Place, RunFolder
from moss_train.bench.recovering.job import Job
from moss_train.exit_codes import DONE, PEER_LOST

PROMPTLY_S = 15.0  #: for the processes that were not killed to end
_LOOK_EVERY_S = 0.002


class RunFailed(RuntimeError):
    """A run that did not do what it should; the message holds its last words."""


@dataclass(frozen=True)
class Kill:
    """One planned kill."""

    instant: str  #: "save": while a checkpoint is written; "step": between or in steps; "start": before the first step
    rank: int | None  #: of the only process to be killed; None: all of them at once
    count: int  #: so many saves, or steps, of the job are waited for
    fraction: float  #: then such a part of a save's, a step's or a start's usual time

    @property
    def whom(self) -> str:
        return "all" if self.rank is None else f"rank {self.rank}"


@dataclass(frozen=True)
class Timings:
    """How long things take in a run that nobody kills, seconds."""

    start: float  #: from the launch to the first step
    step: float
    save: float


@dataclass
class Killed:
    """What came of a kill."""

    kill: Kill
    hit: list[int]  #: ranks that lived and were ended by it
    after_s: float  #: since the launch
    reached: Place | None  #: the last step that the job had logged; None: it had taken none
    saving: str | None  #: the unfinished folder that was left where the kill fell into a save
    newest: Place | None  #: the checkpoint to go on from; None: from the beginning
    end_s: float | None = None  #: until the processes that were not killed had ended; None: there were none
    faults: list[str] = field(default_factory=list)


def draw_kills(kills: int, ranks: int, save_every: int, seed: int) -> list[Kill]:
    """A third of them in saves, a sixth in starts, the rest in steps, in random order; of those in saves and in steps
    every second one of one rank alone. Up to four saves, or as many steps, are waited for: some kills fall before the
    job has saved anything, most do not. (One that dies before the processes know each other is its launcher's to
    notice, so starts are killed whole.)"""
    rng = np.random.default_rng(seed)
    saves, starts = -(-kills // 3), kills // 6
    instants = ["save"] * saves + ["start"] * starts + ["step"] * (kills - saves - starts)
    drawn = []
    for number, instant in enumerate(instants):
        alone = ranks > 1 and instant != "start" and number % 2 == 1
        drawn.append(
            Kill(
                instant,
                int(rng.integers(ranks)) if alone else None,
                int(rng.integers(1, 5 if instant == "save" else 4 * save_every + 1)),
                float(rng.random()),
            )
        )
    return [drawn[place] for place in rng.permutation(len(drawn))]


def strike(job: Job, folder: RunFolder, mark: int, kill: Kill, usual: Timings, deadline_s: float) -> Killed | None:
    """Wait for the instant and kill. None when the job came to its end before it.

    mark: of `folder`, from before the launch. RunFailed when the job failed by itself or the instant does not come.
    """
    begin = job.began_wall
    if kill.instant == "start":
        waited = _until(job, lambda: time.monotonic() - job.began >= kill.fraction * usual.start, deadline_s)
    elif kill.instant == "step":
        waited = _until(job, lambda: len(folder.steps(mark)) >= kill.count, deadline_s)
        time.sleep(2 * kill.fraction * usual.step)
    else:
        waited = _until_in_a_save(job, folder, kill, usual, deadline_s)
    if not waited:
        return None
    before = folder.saves(begin)
    struck = time.monotonic()
    hit = job.kill(range(len(job.processes)) if kill.rank is None else [kill.rank])
    if not hit:
        return None
    after = folder.saves(begin)
    saving = next((path.name for path in before if path in after), None)
    killed = Killed(kill, hit, struck - job.began, None, saving, None)
    _end_of_the_others(job, killed, struck)
    killed.reached = next(iter(reversed(folder.steps(mark))), None)
    killed.newest = folder.newest()
    return killed


def _until_in_a_save(job: Job, folder: RunFolder, kill: Kill, usual: Timings, deadline_s: float) -> bool:
    """Wait for as many saves as planned and then for a part of one; when that was over sooner, half as long in the
    next."""
    seen: set[Path] = set()
    awaited, part_s = kill.count, kill.fraction * usual.save

    def enough() -> bool:
        seen.update(folder.saves(job.began_wall))
        return len(seen) >= awaited

    while _until(job, enough, deadline_s):
        time.sleep(part_s)
        if seen.intersection(folder.saves(job.began_wall)):
            return True
        awaited, part_s = len(seen) + 1, part_s / 2
    return False


def _until(job: Job, come: Callable[[], bool], deadline_s: float) -> bool:
    """Wait; False when all processes have ended well before it came."""
    deadline = time.monotonic() + deadline_s
    while not come():
        codes = job.exit_codes()
        if any(code not in (None, DONE) for code in codes):
            job.wait(range(len(codes)), PROMPTLY_S)
            raise RunFailed(f"the run ended by itself, exit codes {job.exit_codes()}\n{job.words()}")
        if all(code == DONE for code in codes):
            return False
        if time.monotonic() > deadline:
            raise RunFailed(f"after {deadline_s:g} s the run had not come as far as the next kill\n{job.words()}")
        time.sleep(_LOOK_EVERY_S)
    return True


def _end_of_the_others(job: Job, killed: Killed, struck: float) -> None:
    """The other processes must end by themselves, promptly, and say why by their exit code."""
    others = [rank for rank in range(len(job.processes)) if rank not in killed.hit]
    if not others:
        return
    ended = job.wait(others, PROMPTLY_S)
    killed.end_s = time.monotonic() - struck
    for rank in others:
        code = job.exit_codes()[rank]
        if not ended and code is None:
            killed.faults.append(f"rank {rank} was still there {PROMPTLY_S:g} s after {killed.kill.whom} was killed")
        elif code not in (PEER_LOST, DONE):
            killed.faults.append(
                f"rank {rank} ended with exit code {code}, not {PEER_LOST}, after {killed.kill.whom} was killed\n"
                + job.words()
            )
    job.kill(job.alive())
