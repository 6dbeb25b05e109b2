"""A folder of fetched shards, shared by the processes of a node: a size limit, and the least recently used go first.

An entry is a file `<digest>-<name>` beside `<digest>-<name>.json`, which holds its size and what identifies this
version of it; while it is being fetched they are called `<digest>-<name>.partial` and `….partial.json`. Whoever
fetches holds an exclusive lock on the partial file, whoever reads may hold a shared one on the file; what is locked is
not evicted. A file that is evicted or replaced while somebody has it open stays readable for him until he closes it.
All locks are `flock`s, so they end with the process that holds them.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qsl, urlencode, urlunsplit

from moss_train.data.shards.transfer import PIPE, shown, urlsplit
from moss_train.errors import DataError

PARTIAL = ".partial"
FACTS = ".json"
_ENTRY = re.compile(r"[0-9a-f]{20}-")
_LOCK_POLL_S = 0.05
#: parameters of a signed address that change from one signature of the same file to the next
_SIGNING = re.compile(
    r"(?i)x-(amz|goog)-.*|awsaccesskeyid|signature|expires|key-pair-id|policy|token"
    r"|sig|se|st|sp|sv|sr|spr|skoid|sktid|skt|ske|sks|skv"
)


@dataclass(frozen=True)
class FileFacts:
    """What is known of the file that an entry holds, or will hold."""

    size: int | None  #: bytes of the whole file; None while nobody has said
    validator: str | None  #: names this version of it (an ETag, a date)


class ShardCache:
    """The folder; every method may be called by many threads and processes at once."""

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder = folder
        self._limit = limit_bytes

    def path(self, location: str) -> Path:
        """Where the file of a location lies, or will lie; the same for every signature of the same address."""
        name = re.sub(r"[^\w.-]", "_", shown(location).partition("?")[0].rstrip("/").rpartition("/")[2])[-80:]
        return self.folder / f"{hashlib.sha256(_identity(location).encode()).hexdigest()[:20]}-{name}"

    @contextmanager
    def held(self, path: Path, size: int | None) -> Iterator[bool]:
        """Keep the file from being evicted while the block runs; False when there is no file (of this size).

        Marks it as used just now.
        """
        with open_locked(path, fcntl.LOCK_SH) as file:
            there = file is not None and (size is None or os.fstat(file.fileno()).st_size == size)
            if there:
                with suppress(PermissionError):  # another user's copy: usable, but its use is not marked
                    os.utime(file.fileno())
            yield there

    def facts(self, path: Path, partial: bool = False) -> FileFacts:
        """What was noted of the file at `path`, or of its partial one; empty facts when nothing was, or is legible."""
        name = _beside(path, PARTIAL) if partial else path
        try:
            entry = json.loads(_beside(name, FACTS).read_bytes())
            return FileFacts(entry["size"], entry["validator"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return FileFacts(None, None)

    @contextmanager
    def writing(self, path: Path, stopped: threading.Event) -> Iterator[BinaryIO | None]:
        """The partial file of `path`, locked against every other writer, positioned at its end.

        Waits for whoever else writes it; None when `stopped` is set meanwhile. The block ends with `finish`, with
        `discard`, or leaves the file for a later try.
        """
        self._make_folder()
        partial = _beside(path, PARTIAL)
        while not stopped.is_set():
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            with os.fdopen(descriptor, "r+b", buffering=0) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    stopped.wait(_LOCK_POLL_S)
                    continue
                if not _still_named(file, partial):
                    continue  # the one we waited for has finished it
                file.seek(0, os.SEEK_END)
                yield file
                return
        yield None

    def begin(self, path: Path, facts: FileFacts, have: int, what: str) -> None:
        """Note what is coming and make room for it; `have` of its bytes are in the partial file already.

        Raises DataError when the file is larger than the cache may be.
        """
        if facts.size is not None and facts.size > self._limit:
            raise DataError(
                f"{what} has {facts.size / 1e9:.3f} GB, more than data.cache_gb={self._limit / 1e9:g}: raise that"
            )
        with self._folder_lock():
            self._evict(max((facts.size or 0) - have, 0))
            temporary = self.folder / ".facts"  # one at a time: we hold the folder's lock
            temporary.write_text(json.dumps({"size": facts.size, "validator": facts.validator}))
            temporary.replace(_beside(path, PARTIAL + FACTS))

    def finish(self, path: Path) -> None:
        """The partial file is whole: it gets its name. The caller holds its lock."""
        partial = _beside(path, PARTIAL)
        with self._folder_lock():
            os.utime(partial)
            partial.replace(path)
            # In this order: facts of an older version beside the new file cost a transfer, the reverse would be wrong.
            _beside(partial, FACTS).replace(_beside(path, FACTS))
            self._evict(0)

    def discard(self, path: Path) -> None:
        """Remove the partial file; the caller holds its lock."""
        _beside(path, PARTIAL).unlink(missing_ok=True)
        _beside(path, PARTIAL + FACTS).unlink(missing_ok=True)

    def make_room(self, size: int) -> None:
        """Evict until `size` more bytes fit, for a file whose size nobody has said."""
        with self._folder_lock():
            self._evict(size)

    def _evict(self, needed: int) -> None:
        """Remove least recently used files until `needed` more bytes fit; what somebody holds stays."""
        used, files = needed, []
        for name in os.listdir(self.folder):
            if not _ENTRY.match(name) or name.endswith(FACTS):
                continue
            try:
                state = os.stat(self.folder / name)
            except FileNotFoundError:
                continue  # discarded since the folder was listed
            size = state.st_size
            if name.endswith(PARTIAL):  # room was made for all of it
                size = max(size, self.facts(self.folder / name.removesuffix(PARTIAL), partial=True).size or 0)
            used += size
            files.append((state.st_mtime_ns, name, size))
        for _, name, size in sorted(files):
            if used <= self._limit:
                return
            if self._remove(self.folder / name):
                used -= size

    def _remove(self, path: Path) -> bool:
        """Unlink a file nobody holds, and its facts; False when somebody does."""
        with open_locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as file:
            if file is None:
                return False
            path.unlink()
            _beside(path, FACTS).unlink(missing_ok=True)
            return True

    @contextmanager
    def _folder_lock(self) -> Iterator[None]:
        with (self.folder / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"the folder of fetched shards, {self.folder}, cannot be made ({error.strerror}): set data.cache_dir"
            ) from error


def write_failure(error: OSError, folder: Path, what: str) -> DataError:
    """The error of a disk that took no more, with the remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"no space is left in {folder} for {what}: free some, lower data.cache_gb, "
            "or set data.cache_dir to a larger disk"
        )
    return DataError(f"{folder} does not take {what} ({error.strerror or error}): set data.cache_dir to another folder")


@contextmanager
def open_locked(path: Path, mode: int) -> Iterator[BinaryIO | None]:
    """The file at `path` with an flock on it; None when there is none, or the lock is not to be had at once."""
    while True:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            yield None
            return
        with file:
            try:
                fcntl.flock(file, mode)
            except BlockingIOError:
                yield None
                return
            if not _still_named(file, path):
                continue  # evicted or replaced while we waited
            yield file
            return


def _still_named(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _identity(location: str) -> str:
    """The location without what does not choose the file: user, password, signatures."""
    if "://" not in location or location.startswith(PIPE):
        return location
    parts = urlsplit(location)
    query = urlencode([(k, v) for k, v in parse_qsl(parts.query, True) if not _SIGNING.fullmatch(k)])
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, query, ""))
