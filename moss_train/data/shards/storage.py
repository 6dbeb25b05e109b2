"""Shards wherever they lie: local paths as they are, remote ones fetched whole into a cache on the local disk."""

import logging
import os
import queue
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO

import braceexpand

from moss_train.data.config import DataConfig
from moss_train.data.decoding.job import read_range
from moss_train.data.shards.cache import FileFacts, ShardCache, write_failure
from moss_train.data.shards.transfer import PIPE, Transfer, TransferError, file_system, scrub, shown
from moss_train.errors import DataError

#: transfers that `prefetch` runs at once
PREFETCH_TRANSFERS = 4
#: longest wait between two tries, seconds
LONGEST_WAIT_S = 60.0
#: a try that brought so much more than all before it is progress: the tries are counted anew
PROGRESS_BYTES = 4 << 20
#: how often a file of unknown size makes room for itself
UNSIZED_STEP_BYTES = 64 << 20

_log = logging.getLogger(__name__)


def is_remote(location: str) -> bool:
    """Whether a location is a URL (`https://…`, `s3://…`) or a command (`pipe:…`) and not a local path."""
    return location.startswith(PIPE) or "://" in location


def join(location: str, name: str) -> str:
    """`name` inside the folder `location`; a name that is a whole location itself stays. A query stays at the end."""
    if is_remote(name) or Path(name).is_absolute():
        return name
    if not is_remote(location):
        return str(Path(location) / name)
    if location.startswith(PIPE):
        raise DataError(f"{shown(location)} is a command and holds no files: index its shards with out=<folder>")
    base, question, query = location.partition("?")
    return f"{base.rstrip('/')}/{name}{question}{query}"


def expand(location: str) -> list[str]:
    """The shards that a location names: `{000..123}` counts, `*` is looked up, a folder stands for its `*.tar`.

    Raises DataError when nothing is there, or the server cannot list its files.
    """
    found: list[str] = []
    for name in braceexpand.braceexpand(location):
        if location.startswith(PIPE):
            found.append(name)
        elif is_remote(name):
            found += _expand_remote(name)
        else:
            found += _expand_local(name)
    return found


def _expand_local(name: str) -> list[str]:
    path = Path(name)
    if path.is_file():
        return [name]
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
    else:
        anchor = Path(path.anchor) if path.is_absolute() else Path()
        found = sorted(anchor.glob(str(path.relative_to(anchor))))
    if not found:
        raise DataError(f"{name}: no shards there (*.tar)")
    return [str(path) for path in found]


def _expand_remote(name: str) -> list[str]:
    base = name.partition("?")[0]
    if "*" not in base and base.endswith(".tar"):
        return [name]
    pattern = base if "*" in base else f"{base.rstrip('/')}/*.tar"
    files, path = file_system(pattern)
    try:
        found = sorted(files.glob(path))
    except Exception as error:  # every file system has its own errors
        raise DataError(f"{shown(pattern)} cannot be listed ({scrub(str(error), name)}): {_NAME_THEM}") from None
    if not found:
        raise DataError(f"{shown(pattern)}: no shards there, or the server does not list its files: {_NAME_THEM}")
    return [files.unstrip_protocol(entry) for entry in found]


_NAME_THEM = "name the shards, as in shard-{000000..000123}.tar"


class ShardStore:
    """Local copies of shards. One object serves all threads of a process; processes of a node share `cache_dir`."""

    def __init__(
        self,
        cache_dir: str | None = None,
        cache_gb: float = 100.0,
        retries: int = 5,
        timeout_s: float = 60.0,
        sleep: Callable[[float], object] | None = None,
    ):
        """`cache_gb`: limit of the folder in 10⁹ bytes. `retries`: tries after the first, 1, 2, 4, … seconds apart.

        `timeout_s`: a try that brings no byte for so long has failed. `sleep`: how to wait between tries.
        """
        folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
        self.cache = ShardCache(folder, int(cache_gb * 1e9))
        self._retries = retries
        self._timeout_s = timeout_s
        self._closed = threading.Event()
        self._sleep = sleep if sleep is not None else self._closed.wait
        self._lock = threading.Lock()
        self._current: set[str] = set()  # locations whose copy this process has fetched or compared with the original
        self._pending: dict[str, Future[None]] = {}
        self._wanted: queue.SimpleQueue[tuple[str, int | None, Future[None]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    @staticmethod
    def of(data: DataConfig) -> "ShardStore":
        return ShardStore(data.cache_dir, data.cache_gb, data.remote_retries, data.remote_timeout_s)

    def local(self, location: str, size: int | None = None) -> Path:
        """A local file with the bytes of `location`: itself when it is local, else its copy, fetched if need be.

        `size` in bytes, if it is known: a file of another size is an error. Without it, a copy that is there already is
        compared with the original once per store. The copy may be evicted later: use `held` while it must stay, or ask
        again when it is gone.
        Raises DataError after the last try, naming location, tries and the last failure.
        """
        with self.held(location, size) as path:
            return path

    @contextmanager
    def held(self, location: str, size: int | None = None) -> Iterator[Path]:
        """`local`, and the copy is not evicted while the block runs."""
        if not is_remote(location):
            yield Path(location)
            return
        path = self.cache.path(location)
        while True:
            if size is not None or location in self._current:
                with self.cache.held(path, size) as there:
                    if there:
                        yield path
                        return
            self._await_fetch(location, size)

    def read(self, location: str, offset: int, size: int, total: int | None = None) -> bytes:
        """`size` bytes of a shard from `offset` on; `total` is the shard's size, if known. DataError as in `local`."""
        with self.held(location, total) as path:
            return read_range(path, offset, size)

    def prefetch(self, location: str, size: int | None = None) -> None:
        """Begin to fetch in the background; the `local` that wants the file tries again what failed."""
        if not is_remote(location) or self._closed.is_set():
            return
        with self._lock:
            if location in self._pending:
                return
            with self.cache.held(self.cache.path(location), size) as there:
                if there and (size is not None or location in self._current):
                    return
            future: Future[None] = Future()
            self._pending[location] = future
            self._wanted.put((location, size, future))
            if len(self._threads) < PREFETCH_TRANSFERS:
                thread = threading.Thread(target=self._serve, name="shard-prefetch", daemon=True)
                self._threads.append(thread)
                thread.start()

    def close(self) -> None:
        """End all transfers; what they have fetched so far stays for the next run. May be called twice."""
        self._closed.set()
        for _ in self._threads:
            self._wanted.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while (task := self._wanted.get()) is not None:
            location, size, future = task
            if not future.set_running_or_notify_cancel():
                continue  # whoever needed it at once fetches it himself
            try:
                self._fetch(location, size)
                future.set_result(None)
            except Exception as error:  # for the `local` that waits
                future.set_exception(error)
                continue
            with self._lock:
                self._pending.pop(location, None)

    def _await_fetch(self, location: str, size: int | None) -> None:
        """Fetch, unless the background is at it: then wait for that. What failed there, perhaps long ago, is tried
        again."""
        with self._lock:
            future = self._pending.pop(location, None)
        if future is None or future.cancel() or future.exception() is not None:
            self._fetch(location, size)

    def _fetch(self, location: str, size: int | None) -> None:
        """Bring the file into the cache, with as many tries as are granted."""
        path = self.cache.path(location)
        failures, furthest = 0, 0
        while True:
            reached = 0
            try:
                with self.cache.writing(path, self._closed) as partial:
                    if partial is None:
                        raise TransferError("the store was closed", final=True)
                    try:
                        self._try(location, size, path, partial)
                    except BaseException:
                        reached = os.fstat(partial.fileno()).st_size
                        if reached == 0:
                            self.cache.discard(path)
                        raise
                self._current.add(location)
                return
            except OSError as error:
                raise write_failure(error, self.cache.folder, shown(location)) from error
            except TransferError as error:
                if reached >= furthest + PROGRESS_BYTES:
                    failures, furthest = 0, reached
                failures += 1
                if error.final:
                    raise DataError(f"{shown(location)} cannot be fetched: {error}") from None
                if failures > self._retries:
                    raise DataError(
                        f"{shown(location)} cannot be fetched: {failures} tries failed, the last: {error}"
                    ) from None
                # Not all at the same moment, where many processes wait for one server.
                wait = min(2.0 ** (failures - 1), LONGEST_WAIT_S) * random.uniform(1.0, 1.25)
                _log.warning("%s: %s; try %d follows in %.0f s", shown(location), error, failures + 1, wait)
                self._sleep(wait)

    def _try(self, location: str, size: int | None, path: Path, partial: BinaryIO) -> None:
        """One transfer into the locked partial file; it gets its name when it is whole."""
        there = path.stat().st_size if path.exists() else None
        if there is not None and there == size:
            self.cache.discard(path)  # another process was faster
            return
        noted, have = self.cache.facts(path, partial=True), partial.tell()
        if noted.validator is None or noted.size is None:
            have = 0  # nobody can say whether the rest would belong to it
        if have and have == noted.size and size in (None, have):
            self.cache.finish(path)  # a process ended before it could
            return
        validator = noted.validator if have else None
        if not have and there is not None and size is None:
            validator = self.cache.facts(path).validator
        with closing(Transfer(location, have, validator, self._timeout_s, self._closed)) as transfer:
            head = transfer.head
            if head.unchanged:
                self.cache.discard(path)
                return
            total = head.total if head.total is not None else size
            if size is not None and total != size:
                self.cache.discard(path)
                raise TransferError(f"it has {total} bytes, not {size}: index the source again", final=True)
            partial.truncate(head.start)
            partial.seek(head.start)
            self.cache.begin(path, FileFacts(total, head.validator), head.start, shown(location))
            self._write(transfer, head.start, total, partial)
        self.cache.finish(path)

    def _write(self, transfer: Transfer, received: int, total: int | None, partial: BinaryIO) -> None:
        """Append what comes; raises TransferError unless it is `total` bytes at the end."""
        room = received
        for chunk in transfer.chunks():
            received += len(chunk)
            if total is not None and received > total:
                partial.truncate(0)
                raise TransferError(f"more than its {total} bytes came")
            if total is None and received > room:
                self.cache.make_room(UNSIZED_STEP_BYTES)
                room = received + UNSIZED_STEP_BYTES
            _write_all(partial, chunk)
        if total is not None and received < total:
            raise TransferError(f"it ended after {received} of {total} bytes")


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def default_cache_dir() -> Path:
    """`moss_train/shards` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moss_train" / "shards"
