"""A training run as a job of real processes, each of which can be killed alone.

`forked`: forked from a server that has imported everything (multiprocessing's, which has no threads and no process
groups), since imports take longer than a short run. `processes`: one `python -m moss_train train` a rank, in the
environment that torchrun would give it.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

LAUNCHERS = ("forked", "processes")
PRELOADED = ["moss_train.train.command", "moss_train.train.pipeline", "hydra._internal.hydra"]
_DEATH_S = 20.0  #: for the kernel to end a killed process

#: Changes the program in a process before it trains, given the rank: how tests plant faults.
Plant = Callable[[int], None]


def warm_up() -> None:
    """Let the server import everything, so that the first forked job begins as soon as later ones."""
    process = _server().Process(target=_nothing)
    process.start()
    process.join()


class Process(Protocol):
    """One rank."""

    pid: int

    def exit_code(self) -> int | None:
        """None while it lives; minus the signal that ended it."""


class Job:
    """`ranks` processes that run `moss-train train`. As a context manager it leaves none behind."""

    def __init__(
        self, overrides: Sequence[str], ranks: int, logs: Path, launcher: str = "forked", plant: Plant | None = None
    ):
        """logs: folder for what the processes print, `rank0.txt` …, made when it does not exist."""
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = [logs / f"rank{rank}.txt" for rank in range(ranks)]
        self.began, self.began_wall = time.monotonic(), time.time()
        port = _free_port()
        start = _Forked if launcher == "forked" else _Spawned
        self.processes: list[Process] = [
            start(list(overrides), _environment(rank, ranks, port), log, plant) for rank, log in enumerate(self._logs)
        ]

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill(self.alive())

    def alive(self) -> list[int]:
        """The ranks whose processes live."""
        return [rank for rank, process in enumerate(self.processes) if process.exit_code() is None]

    def kill(self, ranks: Sequence[int]) -> list[int]:
        """SIGKILL these ranks at once; those whose processes ended by it and not by themselves just before."""
        for rank in ranks:
            if self.processes[rank].exit_code() is None:
                os.kill(self.processes[rank].pid, signal.SIGKILL)
        self.wait(ranks, _DEATH_S)
        return [rank for rank in ranks if self.processes[rank].exit_code() == -signal.SIGKILL]

    def wait(self, ranks: Sequence[int], seconds: float) -> bool:
        """Wait until all these ranks have ended; False when they have not within so many seconds."""
        deadline = time.monotonic() + seconds
        while any(self.processes[rank].exit_code() is None for rank in ranks):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def exit_codes(self) -> list[int | None]:
        """By rank; None for a process that lives."""
        return [process.exit_code() for process in self.processes]

    def words(self, lines: int = 15) -> str:
        """The last lines that each process printed."""
        told = [log.read_text(encoding="utf-8", errors="replace").splitlines() for log in self._logs if log.exists()]
        return "\n".join(f"rank {rank}:\n" + "\n".join(own[-lines:]) for rank, own in enumerate(told))


class _Forked:
    """A process forked from the server."""

    def __init__(self, overrides: list[str], environment: dict[str, str], log: Path, plant: Plant | None):
        self._process = _server().Process(target=_train, args=(overrides, environment, str(log), plant))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def exit_code(self) -> int | None:
        return self._process.exitcode


class _Spawned:
    """A Python of its own."""

    def __init__(self, overrides: list[str], environment: dict[str, str], log: Path, plant: Plant | None):
        if plant is not None:
            raise ValueError("faults are planted in forked processes alone")
        with log.open("ab") as file:
            command = [sys.executable, "-m", "moss_train", "train", *overrides]
            self._process = subprocess.Popen(command, env=os.environ | environment, stdout=file, stderr=file)
        self.pid = self._process.pid

    def exit_code(self) -> int | None:
        return self._process.poll()


def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _nothing() -> None:
    pass


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a worker; one thread, and the CPU also where there is a GPU."""
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    if ranks == 1:
        return own
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return own | place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _train(overrides: list[str], environment: dict[str, str], log: str, plant: Plant | None) -> None:
    """What a forked process does: `moss-train train`, its words in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(environment)
    import torch

    from moss_train.errors import MossTrainError
    from moss_train.exit_codes import MISTAKE
    from moss_train.train.command import train_command

    torch.set_num_threads(1)
    if plant is not None:
        plant(int(environment.get("RANK", 0)))
    try:
        sys.exit(train_command(overrides))
    except MossTrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(MISTAKE)
