"""Forked processes that run one job after another, in process groups made anew for each.

Importing torch and megatron-core takes seconds, a job a fraction of one. So one process imports everything once
(multiprocessing's fork server, which holds no threads and no process groups) and forks the ranks; they stay for many
jobs, and one that failed or hangs is replaced.
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

#: imported by the fork server, so that no rank has to
PRELOADED = ["moss_train.bench.equivalence.training", "moss_train.bench.equivalence.reference"]
#: Environment of the ranks: one thread each, and the CPU also where there is a GPU.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
_STACK_LINES = 12  #: of a hanging rank's innermost calls
_DUMP_S = 1.0  #: a hanging rank's time to write its stack
_PATIENCE_S = 60.0  #: beyond the deadline
#: A process is replaced after so many jobs: of each one's process groups a few threads stay, which wake up now and
#: then, and hundreds of them slow all down.
_JOBS_OF_A_PROCESS = 12
_START_S = 600.0  #: for the first imports, on a machine that is busy with other things


class JobError(RuntimeError):
    """A job that raised, hung or lost a rank; the message says which rank, and where it was."""


@dataclass
class _Rank:
    """One forked process, and where it leaves its stack when it is asked for it."""

    process: Any
    connection: Connection
    stack: Path
    jobs: int = 0  #: done or begun

    @property
    def is_fresh(self) -> bool:
        """Whether it can do another job."""
        return self.process.is_alive() and self.jobs < _JOBS_OF_A_PROCESS


@dataclass
class _Order:
    """What a rank is told to do."""

    function: Callable
    arguments: tuple
    rank: int
    ranks: int
    store: str
    timeout_s: float


class Ranks:
    """Up to `size` processes. Use as a context manager; one job at a time.

    A job is a function that every rank calls as `function(rank, ranks, *arguments)` with torch.distributed
    initialised (gloo); what it returns must be picklable, as must its arguments. Functions are found by their module
    and name.
    """

    def __init__(self, size: int = 8):
        self.size = size
        self._folder = Path(tempfile.mkdtemp(prefix="moss_ranks_"))
        self._ranks: dict[int, _Rank] = {}
        self._jobs = self._forked = 0
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes. May be called twice."""
        for number in list(self._ranks):
            self._end(number)
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, ranks: int, function: Callable, *arguments: Any, deadline_s: float = 120.0) -> list[Any]:
        """What each rank returned. JobError with the first failing rank's traceback, or, when `deadline_s` seconds
        were not enough, with what the ranks were doing."""
        self.start(ranks, function, *arguments, deadline_s=deadline_s)
        return self.finish()

    def start(self, ranks: int, function: Callable, *arguments: Any, deadline_s: float = 120.0) -> None:
        """Begin a job; `finish` gives its results."""
        if not 1 <= ranks <= self.size:
            raise ValueError(f"ranks={ranks}: these are {self.size} processes")
        self._running = ranks
        if not all(rank.is_fresh for rank in self._ranks.values()):
            # All together: what a process counts (its watchdog's boards) must be alike on all of them.
            for number in list(self._ranks):
                self._end(number)
        new = [number for number in range(ranks) if number not in self._ranks]
        for number in new:
            self._ranks[number] = self._fork(number)
        for number in new:
            if not self._ranks[number].connection.poll(_START_S):
                self._end_all()
                raise JobError(f"rank {number} did not start within {_START_S:g} s")
            self._ranks[number].connection.recv()
        self._jobs += 1
        self._deadline_s = deadline_s
        self._ends = time.monotonic() + deadline_s
        store = str(self._folder / f"store{self._jobs}")
        for number in range(ranks):
            # The ranks wait longer for each other, so that it is the deadline that ends a hang.
            order = _Order(function, arguments, number, ranks, store, deadline_s + _PATIENCE_S)
            self._ranks[number].connection.send(order)
            self._ranks[number].jobs += 1

    def finish(self) -> list[Any]:
        """Wait for the job that was started."""
        results: dict[int, Any] = {}
        waiting = {self._ranks[number].connection: number for number in range(self._running)}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, self._ends - time.monotonic()))
            if not ready:
                self._give_up(f"took longer than {self._deadline_s:g} s", sorted(waiting.values()))
            failures = {}
            for connection in ready:
                number = waiting.pop(connection)
                succeeded, value = _receive(connection)
                if succeeded:
                    results[number] = value
                else:
                    failures[number] = value
            if failures:
                self._fail(failures, waiting)
        return [results[number] for number in range(self._running)]

    def _fail(self, failures: dict[int, str], others: dict[Connection, int]) -> None:
        """One rank's failure breaks the connections of the others, which may be told of earlier: the one to read is the
        first that is not a broken connection."""
        patience = time.monotonic() + _PATIENCE_S
        while others and all(map(_is_consequence, failures.values())):
            ready = wait(list(others), timeout=max(0.0, patience - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                number = others.pop(connection)
                succeeded, value = _receive(connection)
                if not succeeded:
                    failures[number] = value
        self._end_all()
        causes = [number for number in failures if not _is_consequence(failures[number])] or list(failures)
        told = "\n".join(f"rank {number}:\n{failures[number]}" for number in sorted(causes)[:2])
        raise JobError(f"a job failed on rank {', '.join(map(str, sorted(causes)))}\n{told}")

    def _give_up(self, why: str, numbers: list[int]) -> None:
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._ranks[number].process.pid, signal.SIGUSR1)
        time.sleep(_DUMP_S)
        stacks = []
        for number in numbers:
            lines = self._ranks[number].stack.read_text().splitlines()
            stacks.append(f"rank {number}:\n" + "\n".join(lines[:_STACK_LINES]))
        self._end_all()
        raise JobError(f"a job {why}; still running: rank {', '.join(map(str, numbers))}\n" + "\n".join(stacks))

    def _fork(self, number: int) -> _Rank:
        self._forked += 1
        ours, theirs = self._context.Pipe()
        stack = self._folder / f"stack{self._forked}"
        process = self._context.Process(target=_serve, args=(theirs, str(stack)), daemon=True)
        saved = {name: os.environ.get(name) for name in _ENVIRONMENT}
        os.environ.update(_ENVIRONMENT)  # read by the fork server when it starts, with the first rank
        try:
            process.start()
        finally:
            for name, value in saved.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        theirs.close()
        return _Rank(process, ours, stack)

    def _end_all(self) -> None:
        for number in range(self._running):
            self._end(number)

    def _end(self, number: int) -> None:
        rank = self._ranks.pop(number)
        rank.process.kill()
        rank.process.join()
        rank.connection.close()


def _receive(connection: Connection) -> tuple[bool, Any]:
    """Whether a rank succeeded, and what it returned, or its traceback."""
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        return False, "the process ended"


def _is_consequence(text: str) -> bool:
    last = text.strip().splitlines()[-1]
    return "Connection closed by peer" in last or "Connection reset by peer" in last or "Broken pipe" in last


def _serve(connection: Connection, stack: str) -> None:
    """Run jobs until the other end of the connection is gone."""
    import torch

    torch.set_num_threads(1)
    stack_file = open(stack, "w")  # noqa: SIM115 (stays open for the signal)
    faulthandler.register(signal.SIGUSR1, stack_file, all_threads=False)
    # What was imported stays: it need not be gone through when the process groups of a job are collected.
    gc.collect()
    gc.freeze()
    connection.send(None)  # ready
    while True:
        try:
            order = connection.recv()
        except EOFError:
            return
        except Exception:
            connection.send((False, traceback.format_exc()))
            return
        _obey(order, connection)


def _obey(order: _Order, connection: Connection) -> None:
    """Do one job. Success is told when its process groups are gone, failure at once, before they break for others."""
    import torch.distributed as dist

    from moss_train.parallel import groups

    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{order.store}",
            rank=order.rank,
            world_size=order.ranks,
            timeout=timedelta(seconds=order.timeout_s),
        )
        dist.barrier()  # a rank with little to do would be gone before a slow one has connected to it
        result = order.function(order.rank, order.ranks, *order.arguments)
        groups.shutdown()
        if dist.is_initialized():
            dist.destroy_process_group()
        connection.send((True, result))
    except Exception:
        connection.send((False, traceback.format_exc()))
