"""Worker processes that can be killed: decord cannot be interrupted, and a broken file may crash or hang it.

Each process is owned by one thread of the process that started it. The thread has the job's shard made local, hands
over the job, waits for the reply (asleep in the kernel), maps the pictures (`shared.py`) or reads them from the pipe,
and kills the process when the deadline passes. The process's memory is bounded too.
"""

import fcntl
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moss_train.data.config import DataConfig
from moss_train.data.decoding.decode import DecodedArrays
from moss_train.data.decoding.job import Job, Shards
from moss_train.data.decoding.shared import can_map, map_array
from moss_train.errors import ConfigError, DataError, SampleError

#: seconds a worker process may take to start (imports, on a crowded machine)
START_TIMEOUT_S = 180.0
#: seconds that closing waits for threads that may be fetching a shard
_CLOSE_TIMEOUT_S = 5.0
#: what is read at once while a line is expected; pictures that follow it in the same read are copied once more
_LINE_BYTES = 1 << 16
#: what a pipe may hold of the pictures that a process has decoded
_PIPE_BYTES = 1 << 20


class DecodeFailure(SampleError):
    """A sample that a decoder process refused; `exception` names the type of the error raised there."""

    def __init__(self, key: str, reason: str, exception: str):
        super().__init__(key, reason)
        self.exception = exception


class ProcessDied(SampleError):
    """The process that worked on a sample is gone."""


class DecodePool:
    """`workers` worker processes, started when the first job comes."""

    def __init__(self, workers: int, timeout_s: float, memory_mb: int | None = None, store: Shards | None = None):
        """timeout_s: deadline of a job once its shard is local. memory_mb: bound of each process, MiB; None: no bound.
        store: makes remote shards local; None where all are."""
        if workers < 1:
            raise ValueError("a pool needs at least one worker")
        self.workers = workers
        self._jobs: queue.SimpleQueue[tuple[Job, Future] | None] = queue.SimpleQueue()
        self._timeout_s = timeout_s
        self._memory_mb = memory_mb
        self._store = store
        self._processes: dict[int, _WorkerProcess] = {}
        self._closing = False
        self._threads = [
            threading.Thread(target=self._serve, args=(number,), name=f"decode-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def of(data: DataConfig, workers: int, store: Shards | None = None) -> "DecodePool":
        """A pool with the deadline and the memory of `data`."""
        return DecodePool(workers, data.decode_timeout_s, data.decode_memory_mb, store)

    def submit(self, job: Job) -> "Future[Any]":
        """What a job gives: the pictures of a DecodeJob, for one. Jobs are begun in the order of submission.

        The future raises SampleError or DataError.
        """
        if self._closing:
            raise RuntimeError("the decode pool is closed")
        if self._store is not None:
            self._store.prefetch(job.shard, job.shard_size)
        future: Future[Any] = Future()
        self._jobs.put((job, future))
        if self._closing and all(not thread.is_alive() for thread in self._threads):
            future.cancel()  # nobody is left to do it
        return future

    def close(self) -> None:
        """Cancel what waits, end the processes and wait for their threads. May be called twice.

        A thread that waits for a shard ends with the store that fetches it.
        """
        self._closing = True
        for _ in self._threads:
            self._jobs.put(None)
        for process in list(self._processes.values()):
            process.kill()
        for thread in self._threads:
            thread.join(None if self._store is None else _CLOSE_TIMEOUT_S)
        # What another thread has submitted meanwhile would never be done.
        while not self._jobs.empty():
            if (task := self._jobs.get()) is not None:
                task[1].cancel()

    def _serve(self, number: int) -> None:
        while (task := self._jobs.get()) is not None:
            job, future = task
            if self._closing:
                future.cancel()
                continue
            if not future.set_running_or_notify_cancel():
                continue
            try:
                store = self._store
                with nullcontext(job.shard) if store is None else store.held(job.shard, job.shard_size) as path:
                    future.set_result(self._do(number, replace(job, shard=str(path))))
            except BaseException as error:  # whatever it is belongs to whoever waits for the result
                if number in self._processes and not self._processes[number].usable:
                    self._processes.pop(number).end()
                future.set_exception(error)
        if number in self._processes:
            self._processes.pop(number).end()

    def _do(self, number: int, job: Job) -> Any:
        """The job's result. A process that dies over it may have been ended by others (for memory, by somebody), so it
        is tried once more in a new one."""
        try:
            return self._process(number).do(job, self._timeout_s)
        except ProcessDied:
            self._processes.pop(number).end()
            if self._closing:
                raise
        return self._process(number).do(job, self._timeout_s)

    def _process(self, number: int) -> "_WorkerProcess":
        if number not in self._processes:
            self._processes[number] = _WorkerProcess(self._memory_mb)
        if self._closing:  # `close` may have looked before it was there
            self._processes[number].kill()
        return self._processes[number]


class _WorkerProcess:
    """One worker process and the pipe to it."""

    def __init__(self, memory_mb: int | None) -> None:
        package_root = str(Path(__file__).resolve().parents[3])
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moss_train.data.decoding.worker", *([] if memory_mb is None else [str(memory_mb)])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            # A Ctrl-C at the terminal is for the training process, which then ends us by closing the pipe.
            start_new_session=True,
        )
        _widen(self._process.stdout.fileno())
        self.usable = True
        self._unread = b""
        self._shared = False
        self._deadline: float | None = None  #: None: the process has not been heard of

    def do(self, job: Job, timeout_s: float) -> Any:
        """Run one job; raises SampleError, also when the process dies, misses the deadline or talks nonsense over it.

        Raises DataError when the process does not start, which is no fault of the sample.
        """
        if self._deadline is None:
            self._await_start()
        try:
            self._deadline = time.monotonic() + timeout_s
            entry = {"kind": job.KIND, "job": job.to_json(), "shared": self._shared}
            self._process.stdin.write(json.dumps(entry).encode() + b"\n")
            self._process.stdin.flush()
            return self._read_reply(job)
        except TimeoutError as error:
            self.usable = False
            raise SampleError(job.key, f"{job.WHAT} took longer than {timeout_s:g} s (decode_timeout_s)") from error
        except (EOFError, BrokenPipeError) as error:
            self.usable = False
            code = self._process.wait()
            raise ProcessDied(job.key, f"the process died over {job.WHAT} (exit code {code})") from error
        except (ValueError, TypeError, KeyError) as error:
            # Nobody knows where the next reply would begin.
            self.usable = False
            raise SampleError(job.key, "the worker process gave a reply that cannot be read") from error

    def _await_start(self) -> None:
        """Wait until the process is ready; DataError when it never is: its imports fail, or the machine is too busy."""
        self._deadline = time.monotonic() + START_TIMEOUT_S
        try:
            line = self._read_line()
        except TimeoutError as error:
            self.usable = False
            raise DataError(f"a worker process did not start within {START_TIMEOUT_S:g} s") from error
        except EOFError as error:
            self.usable = False
            raise DataError(
                f"a worker process could not start (exit code {self._process.wait()}); its own message stands above"
            ) from error
        try:
            descriptor = json.loads(line)["ready"]
        except (ValueError, TypeError, KeyError) as error:
            self.usable = False
            raise DataError(f"a worker process started with {line[:80]!r} instead of being ready") from error
        # Where one process may not open another's memory, pictures go through the pipe.
        self._shared = descriptor is not None and can_map(self._process.pid, descriptor)

    def _read_reply(self, job: Job) -> Any:
        header = json.loads(self._read_line())
        if "failed" in header:
            raise _error_of(header, job.key)
        if "result" in header:
            return job.result(header["result"])
        if "descriptor" in header:
            try:
                frames = map_array(self._process.pid, header["descriptor"], header["shape"])
            except OSError as error:  # it has just died
                raise ValueError("the pictures' memory is gone") from error
        else:
            frames = np.empty(header["shape"], np.uint8)
            self._read_into(memoryview(frames.reshape(-1)))
        return DecodedArrays(frames, header["backend"], np.array(header["times_s"]), header["note"])

    def kill(self) -> None:
        self.usable = False
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Kill it and close the pipes; for the thread that reads from them."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what was to be written is of no use any more
                pipe.close()

    def _read_line(self) -> bytes:
        while b"\n" not in self._unread:
            room = bytearray(_LINE_BYTES)
            self._unread += room[: self._read_some(memoryview(room))]
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _read_into(self, room: memoryview) -> None:
        """Fill `room`: pictures go where they are to stay without a copy between."""
        have = min(len(self._unread), len(room))
        room[:have], self._unread = self._unread[:have], self._unread[have:]
        while have < len(room):
            have += self._read_some(room[have:])

    def _read_some(self, room: memoryview) -> int:
        descriptor = self._process.stdout.fileno()
        left = self._deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            raise TimeoutError
        count = os.readv(descriptor, [room])
        if not count:
            raise EOFError
        return count


def _widen(descriptor: int) -> None:
    """Let a pipe hold more, so that the two processes take turns less often. Not every system can."""
    with suppress(AttributeError, OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _error_of(header: dict, key: str) -> Exception:
    if header["failed"] == "sample":
        return DecodeFailure(key, header["reason"], header["exception"])
    return (DataError if header["failed"] == "data" else ConfigError)(header["reason"])
