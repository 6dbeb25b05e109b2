"""Bytes of a remote file as they come: http(s), whatever else fsspec reads, and the output of a `pipe:` command.

One thread reads, another takes what it read and waits no longer than the stall timeout for it, so that a library that
hangs costs one try. Messages never hold what is secret in an address: users, passwords, queries, words of a command.
"""

import asyncio
import os
import queue
import re
import signal
import subprocess
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import SplitResult, urlunsplit

from moss_train.errors import ConfigError
from moss_train.redact import redact

PIPE = "pipe:"
CHUNK_BYTES = 1 << 20
#: what one request asks of an object store
BLOCK_BYTES = 4 << 20
#: chunks that may wait between the two threads
_QUEUED = 8
_POLL_S = 0.2
#: answers of a server that a later try may not bring again; every other 4xx is final
_TEMPORARY_STATUS = (408, 425, 429)
_ADDRESS = re.compile(r"[a-zA-Z][\w+.-]*://[^\s'\"<>)]+")


@dataclass(frozen=True)
class Head:
    """What is known before the first byte."""

    start: int = 0  #: byte of the file at which the transfer begins; 0 where it could not go on from the asked one
    total: int | None = None  #: size of the whole file, if the other side says
    validator: str | None = None  #: changes when the file does (an ETag, a date); None where nothing says
    unchanged: bool = False  #: nothing will come: the file is the one that the asked validator names


class TransferError(Exception):
    """A try that failed; the message holds no secrets. `final`: trying again would not help."""

    def __init__(self, reason: str, final: bool = False):
        super().__init__(reason)
        self.final = final


def shown(location: str) -> str:
    """A location as it may be printed: without user and password, query, and the inner words of a command."""
    if location.startswith(PIPE):
        words = location[len(PIPE) :].split()
        if not words:
            return location
        last = [_shown_address(word.strip("'\"")) for word in words[1:] if "/" in word and not word.startswith("-")]
        return " ".join([f"{PIPE}{words[0]}", "…", *last[-1:]]) if len(words) > 1 else f"{PIPE}{words[0]}"
    return _shown_address(location)


def _shown_address(location: str) -> str:
    if "://" not in location:
        path, question, _ = location.partition("?")
        return f"{redact(path)}?…" if question else str(redact(path))
    parts = urlsplit(location)
    address = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return f"{address}?…" if parts.query else address


def scrub(text: str, location: str) -> str:
    """One line of an error about `location` without the secrets of the location."""
    text = " ".join(text.replace(location, shown(location)).split())
    for secret in _secrets(location):
        text = text.replace(secret, "…")
    return str(redact(_ADDRESS.sub(lambda match: _shown_address(match[0]), text)))[:300]


def urlsplit(address: str) -> SplitResult:
    """The parts of an address; ConfigError, without its text, when it is none."""
    try:
        return urllib.parse.urlsplit(address)
    except ValueError:
        raise ConfigError(f"{address.partition('://')[0]}://… is no valid address") from None


def _secrets(location: str) -> list[str]:
    """What may not be repeated: longest first, so that no part of one is left over."""
    if location.startswith(PIPE):
        visible = shown(location)
        words = [word.strip("'\"") for word in location[len(PIPE) :].split()[1:]]
        secrets = [word for word in words if len(word) >= 6 and word not in visible]
    else:
        parts = urlsplit(location)
        user = parts.netloc.rpartition("@")[0]
        secrets = [user, *user.split(":", 1), parts.query, *(p.partition("=")[2] for p in parts.query.split("&"))]
    return sorted({secret for secret in secrets if len(secret) >= 3}, key=len, reverse=True)


class Transfer:
    """One try to read `location` from byte `have` on.

    `head` is known once the constructor returns. Raises TransferError there and while the chunks are read, for a
    failure of any kind and when no byte came for `timeout_s` seconds. `stopped` ends the wait early.
    """

    def __init__(
        self, location: str, have: int, validator: str | None, timeout_s: float, stopped: threading.Event | None = None
    ):
        self._location = location
        self._timeout_s = timeout_s
        self._stopped = stopped or threading.Event()
        self._abandoned = False
        self._at_abort: list[Callable[[], None]] = []
        self._queue: queue.Queue[Head | bytes | Exception | None] = queue.Queue(_QUEUED)
        source = _read_pipe if location.startswith(PIPE) else _read_http if _is_http(location) else _read_fsspec
        pieces = source(location, have, validator, timeout_s, self._at_abort)
        threading.Thread(target=self._pump, args=(pieces,), name="shard-transfer", daemon=True).start()
        head = self._next()
        if not isinstance(head, Head):
            raise TransferError("nothing came", final=False)
        self.head = head

    def chunks(self) -> Iterator[bytes]:
        """The bytes from `head.start` to the end of the file."""
        while (piece := self._next()) is not None:
            yield piece

    def close(self) -> None:
        """Give the transfer up, or its resources back; may be called twice."""
        self._abandoned = True
        for abort in self._at_abort:
            abort()
        while True:  # the reading thread may wait for room in the queue
            try:
                self._queue.get_nowait()
            except queue.Empty:
                return

    def _pump(self, pieces: Iterator[Head | bytes]) -> None:
        end: Exception | None = None
        try:
            for piece in pieces:
                self._queue.put(piece)
                if self._abandoned:
                    break
        except Exception as error:  # libraries raise what they like; whoever waits for the bytes must hear of it
            end = error
        finally:
            pieces.close()
        if not self._abandoned:
            self._queue.put(end)

    def _next(self) -> "Head | bytes | None":
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                piece = self._queue.get(timeout=min(_POLL_S, self._timeout_s))
                break
            except queue.Empty:
                if self._stopped.is_set():
                    self.close()
                    raise TransferError("the store was closed", final=True) from None
                if time.monotonic() >= deadline:
                    self.close()
                    raise TransferError(f"no byte came for {self._timeout_s:g} s") from None
        if isinstance(piece, Exception):
            self.close()
            raise _failure(piece, self._location) from None
        return piece


def _failure(error: Exception, location: str) -> Exception:
    if isinstance(error, (TransferError, ConfigError)):
        return error
    if isinstance(error, FileNotFoundError):
        return TransferError("there is no such file", final=True)
    if isinstance(error, PermissionError):
        return TransferError(f"access is denied ({scrub(str(error), location)})", final=True)
    if "credential" in type(error).__name__.lower():  # botocore's, google-auth's and others have no common base
        reason = scrub(str(error), location)
        return TransferError(f"{reason}: set them as fsspec's file system for it reads them", final=True)
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return TransferError("no byte came in time")
    return TransferError(scrub(f"{type(error).__name__}: {error}", location))


def _is_http(location: str) -> bool:
    return location.startswith(("http://", "https://"))


@lru_cache(maxsize=4)
def _http_file_system(timeout_s: float):
    """fsspec's file system of web servers; its settings (headers, certificates) come from fsspec's configuration."""
    import aiohttp
    import fsspec

    # The total may take as long as it takes: only silence ends a transfer. trust_env: proxies of the environment.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
    options = fsspec.config.conf.get("http", {}).get("client_kwargs", {})
    client = {"trust_env": True, "timeout": timeout} | options
    return fsspec.filesystem("http", client_kwargs=client, skip_instance_cache=True)


def _read_http(
    location: str, have: int, validator: str | None, timeout_s: float, at_abort: list[Callable[[], None]]
) -> Iterator[Head | bytes]:
    from fsspec.asyn import sync

    files = _http_file_system(timeout_s)
    options = dict(files.kwargs)
    # A compressed answer would have another size, and a part of it could not be joined to another part.
    headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
    if validator is not None and have:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    elif validator is not None:
        headers["If-None-Match" if validator.startswith('"') else "If-Modified-Since"] = validator
    session = sync(files.loop, files.set_session)

    async def ask():
        return await session.get(files.encode_url(location), headers=headers, **options)

    response = sync(files.loop, ask)
    if response.status == 416 and "Range" in headers:  # the file is shorter now
        response.close()
        del headers["Range"], headers["If-Range"]
        response = sync(files.loop, ask)
    try:
        if response.status == 304:
            yield Head(unchanged=True)
            return
        if response.status not in (200, 206):
            final = 400 <= response.status < 500 and response.status not in _TEMPORARY_STATUS
            raise TransferError(scrub(f"HTTP {response.status} {response.reason or ''}", location), final)
        yield _http_head(response, have)
        while chunk := sync(files.loop, response.content.read, CHUNK_BYTES):
            yield chunk
    finally:
        files.loop.call_soon_threadsafe(response.close)


def _http_head(response, have: int) -> Head:
    tag, date = response.headers.get("ETag"), response.headers.get("Last-Modified")
    validator = tag if tag is not None and tag.startswith('"') else date
    length = response.headers.get("Content-Length")
    if response.status == 200:
        return Head(0, int(length) if length is not None else None, validator)
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if span is None or int(span[1]) != have:
        raise TransferError(f"the server sent another range than bytes {have} to the end")
    return Head(have, int(span[2]) if span[2] != "*" else None, validator)


def _read_fsspec(
    location: str, have: int, validator: str | None, timeout_s: float, at_abort: list[Callable[[], None]]
) -> Iterator[Head | bytes]:
    files, path = file_system(location)
    files.invalidate_cache()  # what a listing said earlier need not hold now
    facts = files.info(path)
    total = facts.get("size")
    if facts.get("type") == "directory" or total is None:
        raise TransferError("it is no file of a known size", final=True)
    now = files.ukey(path)
    if validator is not None and not have and validator == now:
        yield Head(unchanged=True)
        return
    start = have if have and validator == now and have <= total else 0
    yield Head(start, total, now)
    while start < total:
        block = files.cat_file(path, start=start, end=min(start + BLOCK_BYTES, total))
        if not block:
            raise TransferError(f"it ended after {start} of {total} bytes")
        start += len(block)
        yield block


def file_system(location: str):
    """fsspec's (file system, path) of a URL; ConfigError when no package reads its scheme."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(location)
    except (ImportError, ValueError) as error:
        scheme = location.partition("://")[0]
        reason = scrub(str(error), location)
        raise ConfigError(f"{shown(location)}: fsspec cannot read {scheme}:// here ({reason})") from None


def _read_pipe(
    location: str, have: int, validator: str | None, timeout_s: float, at_abort: list[Callable[[], None]]
) -> Iterator[Head | bytes]:
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(
            location[len(PIPE) :],
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=messages,
            start_new_session=True,  # a group of its own, so that all that the command started can be ended
        )
        at_abort.append(lambda: _end(process))
        try:
            yield Head()
            while chunk := os.read(process.stdout.fileno(), CHUNK_BYTES):
                yield chunk
            code = process.wait()
        finally:
            _end(process)
            process.stdout.close()
        if code != 0:
            messages.seek(0)
            said = messages.read(100_000).decode(errors="replace").strip().splitlines()
            raise TransferError(scrub(f"the command ended with code {code}: {said[-1] if said else ''}", location))


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it ended by itself meanwhile
        process.wait()
