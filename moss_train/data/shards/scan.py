"""Where the members of a tar lie, from its headers alone, with nothing believed that the headers claim.

Read here are plain (USTAR), GNU and PAX archives of plain files, as `tar`, Python's tarfile and webdataset write them.
Python's reader would follow links, sparse files and headers that announce terabytes; this one refuses them by name.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from moss_train.errors import DataError

BLOCK = 512
#: most bytes of a long name or of a PAX header: names are file names, and nothing else of them is used
LONGEST_HEADER = 1 << 16
#: longest name of a member, bytes
LONGEST_NAME = 4096
_REGULAR, _DIRECTORY, _LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = (b"0", b"\0", b"7"), b"5", b"L", b"K", b"x", b"g"
_PAX_RECORD = re.compile(rb"(\d{1,6}) ([^=]+)=")

#: member name → offset and size in the shard, bytes
Ranges = dict[str, tuple[int, int]]


class _Unreadable(Exception):
    """The bytes are no tar; says why."""


def scan_shard(path: Path, name: str | None = None) -> Iterator[tuple[str, Ranges]]:
    """(key, members) of each sample of a tar; `name` stands for it in errors (a URL), else its path.

    Raises DataError when the file is no plain tar, is cut short, holds a member twice, or one that is no plain file
    below the archive's root.
    """
    name = name or str(path)
    current: tuple[str, Ranges] | None = None
    try:
        with path.open("rb") as raw:
            for entry, offset, size in _files(raw, name):
                key, member = split_name(name, entry)
                if current is None or current[0] != key:
                    if current is not None:
                        yield current
                    current = (key, {})
                if member in current[1]:
                    raise DataError(f"{name}: member {entry!r} stands twice")
                current[1][member] = (offset, size)
    except _Unreadable as error:
        raise DataError(f"{name} is no readable tar ({error}): it is cut short, damaged or compressed") from error
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror or error}") from error
    if current is not None:
        yield current


def split_name(shard: str, entry: str) -> tuple[str, str]:
    """`dir/key.0.mp4` → ("dir/key", "0.mp4"), as webdataset splits names. Raises DataError for any other name."""
    folder, _, base = entry.rpartition("/")
    stem, dot, member = base.partition(".")
    if entry.startswith("/") or ".." in entry.split("/"):
        raise DataError(f"{shard}: member {entry!r} is no plain file below the root of the archive")
    if not stem or not dot or not member:
        raise DataError(f"{shard}: member {entry!r} is not named key.extension")
    return f"{folder}/{stem}" if folder else stem, member.lower()


def _files(raw: BinaryIO, shard: str) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every plain file of a tar, up to its end marker."""
    total = os.fstat(raw.fileno()).st_size
    long_name, pax, place, global_pax = None, {}, 0, {}
    while True:
        raw.seek(place)
        block = raw.read(BLOCK)
        if len(block) < BLOCK:
            if place == 0:
                raise _Unreadable("it holds no header" if block else "it is empty")
            raise DataError(f"{shard} is cut short: the end marker of the tar is missing; write it again")
        if not block.strip(b"\0"):
            _check_end(raw, shard, place)
            return
        kind, name, size = _header(block)
        place += BLOCK
        if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
            if size > LONGEST_HEADER:
                raise DataError(f"{shard}: a header of {size} bytes at {place}, the limit is {LONGEST_HEADER}")
            data = raw.read(size)
            if len(data) < size:
                raise DataError(f"{shard} is cut short: a header ends after the file; write it again")
            if kind == _LONG_NAME:
                long_name = _text(data.partition(b"\0")[0])
            elif kind == _PAX:
                pax = _pax(data)
            elif kind == _PAX_GLOBAL:
                global_pax |= _pax(data)
            place += _padded(size)
            continue
        known = global_pax | pax
        name = known.get("path") or long_name or name
        if "size" in known:
            size = _decimal(known["size"])
        if kind == _DIRECTORY and not size:
            long_name, pax = None, {}
            continue
        if len(name.encode(errors="surrogateescape")) > LONGEST_NAME:
            raise DataError(f"{shard}: member {name[:80]!r}… has a name of more than {LONGEST_NAME} bytes")
        if kind not in _REGULAR or any(key.startswith("GNU.sparse.") for key in known):
            raise DataError(f"{shard}: member {name!r} is no plain file below the root of the archive")
        if place + size > total:
            raise DataError(
                f"{shard} is cut short: member {name!r} ends after the file ({size} bytes at {place}, of {total}); "
                "write it again"
            )
        yield name, place, size
        place += _padded(size)
        long_name, pax = None, {}


def _check_end(raw: BinaryIO, shard: str, place: int) -> None:
    """DataError when more than zeros follow the end marker: members would be lost without a word."""
    while rest := raw.read(1 << 20):
        if rest.strip(b"\0"):
            raise DataError(
                f"{shard} goes on behind the end marker at byte {place}: it is damaged there, or archives were joined "
                "(`cat`); write it again"
            )


def _header(block: bytes) -> tuple[bytes, str, int]:
    """(type, name, size) of a header block."""
    # Counted with the checksum's own field as blanks.
    claimed, counted = _number(block[148:156]), sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if claimed != counted:
        raise _Unreadable("a header has a wrong checksum")
    name = _text(block[:100].partition(b"\0")[0])
    if block[257:263] == b"ustar\0":
        prefix = _text(block[345:500].partition(b"\0")[0])
        name = f"{prefix}/{name}" if prefix else name
    kind = block[156:157]
    # Archives older than POSIX mark directories by their name alone.
    return (_DIRECTORY if kind == b"\0" and name.endswith("/") else kind), name, _number(block[124:136])


def _number(field: bytes) -> int:
    """An octal number, or GNU's binary one, which begins with a set bit."""
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise _Unreadable("a header has a negative number")
        return int.from_bytes(field[1:], "big")
    text = field.strip(b" \0")
    if text and not re.fullmatch(rb"[0-7]+", text):
        raise _Unreadable("a header has a number that is none")
    return int(text, 8) if text else 0


def _decimal(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise _Unreadable(f"a PAX header gives the size {text[:20]!r}")
    return int(text)


def _pax(data: bytes) -> dict[str, str]:
    """The records `length key=value` of a PAX header."""
    records, place = {}, 0
    data = data.rstrip(b"\0")
    while place < len(data):
        found = _PAX_RECORD.match(data, place)
        end = place + int(found[1]) if found else 0
        if not found or end <= found.end() or end > len(data) or data[end - 1 : end] != b"\n":
            raise _Unreadable("a PAX header is malformed")
        records[_text(found[2])] = _text(data[found.end() : end - 1])
        place = end
    return records


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _Unreadable(f"a name is no UTF-8: {raw[:40]!r}") from error


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
