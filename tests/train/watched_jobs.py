"""Jobs of real processes that begin as torchrun's workers do, and whose exit codes and last words can be read.

They are forked from a server that has imported everything, which a process of its own would need seconds for.
"""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PRELOADED = ["moss_train.train.pipeline", "moss_train.train.stage", "moss_train.cli", "hydra._internal.hydra"]

#: ended with a report after a few seconds instead of a minute
IMPATIENT = ["watchdog.stall_s=3", "watchdog.start_s=60"]


class Job:
    """`ranks` processes that run `moss-train train`; each may be given something to go wrong."""

    def __init__(
        self,
        overrides: list[str],
        folder: Path,
        ranks: int = 2,
        mischief: Callable[[int], None] | None = None,
    ):
        """`mischief(rank)` is called in each process before it trains: a function of a module, to change the program
        with."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.folder, self.began = folder, time.monotonic()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [
            context.Process(target=_begin, args=(rank, ranks, port, overrides, folder / f"rank{rank}", mischief))
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def pid(self, rank: int) -> int:
        return self.processes[rank].pid

    def wait_until(self, come: Callable[[], bool], seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while not come():
            assert any(process.is_alive() for process in self.processes), self.words()
            assert time.monotonic() < deadline, self.words()
            time.sleep(0.05)

    def exit_codes(self, seconds: float, ranks: list[int] | None = None) -> list[int | None]:
        """Of these ranks, within so many seconds."""
        deadline = time.monotonic() + seconds
        chosen = [self.processes[rank] for rank in ranks or range(len(self.processes))]
        for process in chosen:
            process.join(max(0.0, deadline - time.monotonic()))
        assert all(process.exitcode is not None for process in chosen), self.words()
        return [process.exitcode for process in chosen]

    def words(self) -> str:
        """What all processes wrote on standard error."""
        return "".join(self.words_of(rank) for rank in range(len(self.processes)))

    def words_of(self, rank: int) -> str:
        path = self.folder / f"rank{rank}"
        return path.read_text() if path.exists() else ""


def _begin(
    rank: int, ranks: int, port: int, overrides: list[str], words: Path, mischief: Callable[[int], None] | None
) -> None:
    descriptor = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # multiprocessing's children keep the server's; a worker has its own.
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    import torch

    torch.set_num_threads(1)
    if mischief is not None:
        mischief(rank)
    from moss_train.cli import main

    sys.exit(main(["train", *overrides]))


def endless(small: list[str], folder: Path, ranks: int = 2, mischief=None, more: Sequence[str] = ()) -> Job:
    """A job of one stage that does not end by itself."""
    endless_stage = ["~stages.realtime", "stages.align.steps=100000", "stages.*.save_every=0", "stages.*.log_every=1"]
    return Job([*small, *IMPATIENT, *endless_stage, f"output_dir={folder / 'run'}", *more], folder, ranks, mischief)


def training(job: Job, step: int = 4) -> Callable[[], bool]:
    """Whether a job has taken so many steps."""
    metrics = job.folder / "run" / "metrics.jsonl"
    return lambda: metrics.is_file() and f'"step": {step}' in metrics.read_text()
