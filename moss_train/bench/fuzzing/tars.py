"""Tars whose headers lie: names that escape, links, devices, absurd sizes, members doubled or out of place."""

import gzip
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from moss_train.bench.fuzzing.media import mutate

_BLOCK = 512
_NAMES = (
    b"../../escape.json", b"/tmp/escape.json", b"a/../../b.json", b"..", b"", b"k", b"k.", b".json", b"\xff\xfe.json",
    b"C:\\x.json", b"a/b/c.json", b"k.json/../../x.mp4", b"k .json", b"\x01\x02.mp4", b"x" * 100, b"./k.json",
    b"~/.profile.json", b"k.JSON", b"%s%n.json", b"k.json\x00../../x",
)  # fmt: skip
#: hard and symbolic link, devices, folder, FIFO, contiguous, unknown, GNU's long names and sparse, PAX headers
_TYPES = b"123456 7 Z L K S x g D M V".replace(b" ", b"")
_SIZES = (
    b"77777777777\x00", b"00000000001\x00", b"-0000000001\x00", b"99999999999\x00", b"            ",
    b"\x80" + b"\xff" * 11, b"\xff" * 12, b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7,
    b"\x80" + bytes(7) + b"\x40\x00\x00\x00", b"00000000000\x00",
)  # fmt: skip
_PAX_RECORDS = (
    b"size=99999999999999", b"size=-1", b"size=x", b"path=../../escape.json", b"path=/etc/x.json", b"path=",
    b"linkpath=/", b"GNU.sparse.major=1", b"GNU.sparse.map=0,1,999999999999,1", b"GNU.sparse.size=99999999999999",
    b"hdrcharset=BINARY", b"mtime=NaN", b"uid=1e99", b"path=\xff\xfe.json", b"GNU.sparse.realsize=999999999999999",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One member as it is written: the header's fields need not fit the body."""

    name: bytes
    body: bytes
    type: bytes = b"0"
    size: bytes | None = None  #: the field of 12 bytes; None: what the body has
    link: bytes = b""

    def pack(self) -> bytes:
        size = b"%011o\x00" % len(self.body) if self.size is None else self.size
        header = self.name[:100].ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size[:12].ljust(12, b"\0")
        header += b"00000000000\0" + b" " * 8 + self.type + self.link[:100].ljust(100, b"\0") + b"ustar\x0000"
        header = header.ljust(_BLOCK, b"\0")
        checksum = b"%06o\0 " % sum(header)
        return header[:148] + checksum + header[156:] + self.body + bytes(-len(self.body) % _BLOCK)


def tar_of(entries: list[Entry]) -> bytes:
    """The entries, one after the other, and the end marker."""
    return b"".join(entry.pack() for entry in entries) + bytes(2 * _BLOCK)


def hostile_tar(entries: list[Entry], rng: np.random.Generator) -> tuple[bytes, str]:
    """A tar of the entries after one mutation, and the mutation's name."""
    changes = list(_CHANGES.items())
    name, change = changes[rng.integers(len(changes))]
    changed = change(list(entries), rng)
    if isinstance(changed, tuple):
        return changed[0], f"{name} {changed[1]}"
    return (changed if isinstance(changed, bytes) else tar_of(changed)), name


def _at(entries: list[Entry], rng: np.random.Generator) -> int:
    return int(rng.integers(len(entries)))


def _field(name: str, values: tuple[bytes, ...]) -> Callable:
    def change(entries: list[Entry], rng: np.random.Generator) -> tuple[bytes, str]:
        place, value = _at(entries, rng), values[rng.integers(len(values))]
        entries[place] = replace(entries[place], **{name: value, "link": b"../../etc/passwd"})
        return tar_of(entries), repr(value)

    return change


def _pax(entries: list[Entry], rng: np.random.Generator) -> tuple[bytes, str]:
    record = b" " + _PAX_RECORDS[rng.integers(len(_PAX_RECORDS))] + b"\n"
    length = len(record) + 1
    while len(str(length)) + len(record) != length:
        length += 1
    claimed = length if rng.random() < 0.7 else int(rng.choice([0, 1, 10**9, -1, 5]))
    body = b"%d" % claimed + record
    size = None if rng.random() < 0.8 else _SIZES[rng.integers(len(_SIZES))]
    entries.insert(_at(entries, rng), Entry(b"pax", body, b"x" if rng.random() < 0.7 else b"g", size))
    return tar_of(entries), repr(body)


def _long_name(entries: list[Entry], rng: np.random.Generator) -> list[Entry]:
    body = rng.choice([b"../../x.json", b"y/" * 3000 + b"z.json", b"k.json", b""])
    size = None if rng.random() < 0.6 else _SIZES[rng.integers(len(_SIZES))]
    entries.insert(_at(entries, rng), Entry(b"././@LongLink", bytes(body), b"L", size))
    return entries


def _swap_bodies(entries: list[Entry], rng: np.random.Generator) -> list[Entry]:
    a, b = _at(entries, rng), _at(entries, rng)
    entries[a], entries[b] = replace(entries[a], body=entries[b].body), replace(entries[b], body=entries[a].body)
    return entries


def _shuffle(entries: list[Entry], rng: np.random.Generator) -> list[Entry]:
    return [entries[place] for place in rng.permutation(len(entries))]


def _double(entries: list[Entry], rng: np.random.Generator) -> list[Entry]:
    return [*entries, entries[_at(entries, rng)]]


def _zero_header(entries: list[Entry], rng: np.random.Generator) -> bytes:
    place = _at(entries, rng)
    start = sum(len(entry.pack()) for entry in entries[:place])
    data = tar_of(entries)
    return data[:start] + bytes(_BLOCK) + data[start + _BLOCK :]


_CHANGES: dict[str, Callable] = {
    "bytes": lambda entries, rng: mutate(tar_of(entries), rng),
    "header bits": lambda entries, rng: _header_bits(entries, rng),
    "name": _field("name", _NAMES),
    "size": _field("size", _SIZES),
    "type": _field("type", tuple(bytes([code]) for code in _TYPES)),
    "pax": _pax,
    "long name": _long_name,
    "swapped bodies": _swap_bodies,
    "shuffled members": _shuffle,
    "doubled member": _double,
    "zeroed header": _zero_header,
    "gzip": lambda entries, rng: gzip.compress(tar_of(entries) + bytes(int(rng.integers(0, 50_000_000))), 1),
    "two tars": lambda entries, rng: tar_of(entries) + tar_of([replace(e, name=b"z" + e.name) for e in entries]),
    "garbage first": lambda entries, rng: rng.bytes(_BLOCK) + tar_of(entries),
    "many members": lambda entries, rng: entries + [Entry(b"m%d.txt" % n, b"") for n in range(300)],
    "truncated": lambda entries, rng: tar_of(entries)[: int(rng.integers(1, 40)) * _BLOCK],
}


def _header_bits(entries: list[Entry], rng: np.random.Generator) -> bytes:
    """One bit of one header, with or without a checksum that fits."""
    place = _at(entries, rng)
    start = sum(len(entry.pack()) for entry in entries[:place])
    data = bytearray(tar_of(entries))
    data[start + int(rng.integers(345))] ^= 1 << int(rng.integers(8))
    if rng.random() < 0.6:
        header = data[start : start + 148] + b" " * 8 + data[start + 156 : start + _BLOCK]
        struct.pack_into("8s", data, start + 148, b"%06o\0 " % sum(header))
    return bytes(data)
