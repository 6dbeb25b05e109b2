"""The rows of an index: what is known of one sample, and its form in an Arrow table."""

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import get_type_hints

import numpy as np
import pyarrow as pa

from moss_train.data.config import MODALITIES
from moss_train.data.decoding.job import DIGEST_BYTES
from moss_train.data.decoding.probe import MediaProbe

#: of samples whose JSON member is absent, broken or of an unknown schema
INVALID_KIND = "invalid"
KINDS = ("caption", "conversation", "stream", INVALID_KIND)
_ARROW_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def _media_fields() -> list[pa.Field]:
    """One Arrow field for each fact of a medium."""
    hints = get_type_hints(MediaProbe)
    plain = {name: next(t for t in _ARROW_TYPES if hint in (t, t | None)) for name, hint in hints.items()}
    return [pa.field(fact.name, _ARROW_TYPES[plain[fact.name]]) for fact in fields(MediaProbe)]


_MEMBER = pa.struct(
    [("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("digest", pa.binary(DIGEST_BYTES))]
)
_MEDIUM = pa.struct([pa.field("member", pa.string()), pa.field("fault", pa.string()), *_media_fields()])
_CODES = pa.dictionary(pa.int8(), pa.string())
ROWS = pa.schema(
    [
        ("key", pa.string()),
        ("key_hash", pa.uint64()),
        ("shard", pa.int32()),
        ("kind", _CODES),
        ("modality", _CODES),
        ("members", pa.list_(_MEMBER)),
        ("media", pa.list_(_MEDIUM)),
        ("text_tokens", pa.int32()),
    ]
)


@dataclass(frozen=True)
class ShardFacts:
    """One tar as it was when it was indexed."""

    name: str  #: relative to the index, or an absolute location
    size: int  #: bytes
    mtime_ns: int | None  #: None where there is none, of a remote shard
    digest: str  #: of its samples: keys, and names, places and digests of their members
    samples: int


@dataclass(frozen=True)
class Member:
    """One file of a sample: a range of its shard."""

    offset: int
    size: int  #: bytes
    digest: bytes  #: first 16 bytes of its SHA-256


@dataclass(frozen=True)
class IndexedSample:
    """One sample of a source."""

    key: str
    shard: int  #: index into the source's shards
    kind: str  #: one of KINDS
    modality: str  #: "video" when any medium is one, else "image" when any is a still, else "text"
    members: dict[str, Member]  #: member name ("json", "mp4", "0.jpg") → where it lies
    media: dict[str, MediaProbe | str]  #: media member → its facts, or the reason why it cannot be read
    text_tokens: int | None  #: of all its texts; None when they cannot be read or no tokenizer was named


@dataclass
class IndexTotals:
    """Sums over a source."""

    kinds: dict[str, int] = field(default_factory=dict)  #: samples by kind
    modalities: dict[str, int] = field(default_factory=dict)  #: samples by modality
    video_hours: float = 0.0
    unreadable_media: int = 0
    bytes: int = 0  #: of all members
    text_tokens: int = 0

    @staticmethod
    def of(sample: IndexedSample) -> "IndexTotals":
        seconds = [facts.duration_s for facts in sample.media.values() if isinstance(facts, MediaProbe)]
        return IndexTotals(
            {sample.kind: 1},
            {sample.modality: 1},
            sum(seconds) / 3600,
            len(sample.media) - len(seconds),
            sum(member.size for member in sample.members.values()),
            sample.text_tokens or 0,
        )

    def add(self, other: "IndexTotals") -> None:
        for mine, theirs in ((self.kinds, other.kinds), (self.modalities, other.modalities)):
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count
        self.video_hours += other.video_hours
        self.unreadable_media += other.unreadable_media
        self.bytes += other.bytes
        self.text_tokens += other.text_tokens


def key_hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")


def read_row(batch: pa.RecordBatch, row: int) -> IndexedSample:
    """One row of a record batch of the form `ROWS`."""
    entry = {name: batch.column(name)[row].as_py() for name in ROWS.names if name != "key_hash"}
    members = {m["name"]: Member(m["offset"], m["size"], m["digest"]) for m in entry.pop("members")}
    media: dict[str, MediaProbe | str] = {}
    for medium in entry.pop("media"):
        name, fault = medium.pop("member"), medium.pop("fault")
        media[name] = fault if fault is not None else MediaProbe(**medium)
    return IndexedSample(**entry, members=members, media=media)


def write_rows(samples: Sequence[IndexedSample]) -> pa.RecordBatch:
    """The form in which samples are stored, `ROWS`."""
    members = [
        [{"name": name, "offset": m.offset, "size": m.size, "digest": m.digest} for name, m in sample.members.items()]
        for sample in samples
    ]
    media = [
        [
            {"member": name, "fault": facts} if isinstance(facts, str) else {"member": name} | vars(facts)
            for name, facts in sample.media.items()
        ]
        for sample in samples
    ]
    return pa.RecordBatch.from_arrays(
        [
            pa.array([sample.key for sample in samples], pa.string()),
            pa.array([key_hash(sample.key) for sample in samples], pa.uint64()),
            pa.array([sample.shard for sample in samples], pa.int32()),
            coded([KINDS.index(sample.kind) for sample in samples], KINDS),
            coded([MODALITIES.index(sample.modality) for sample in samples], MODALITIES),
            pa.array(members, ROWS.field("members").type),
            pa.array(media, ROWS.field("media").type),
            pa.array([sample.text_tokens for sample in samples], pa.int32()),
        ],
        schema=ROWS,
    )


def coded(codes: Sequence[int] | np.ndarray, names: tuple[str, ...]) -> pa.DictionaryArray:
    """A column of `names`, whatever of them occurs."""
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int8()), pa.array(names, pa.string()))


def planning_digest(shards: np.ndarray, kinds: np.ndarray, modalities: np.ndarray) -> str:
    """SHA-256 of what the order is planned from: int32, int8, int8 [n]."""
    digest = hashlib.sha256()
    for column, dtype in ((shards, "<i4"), (kinds, "i1"), (modalities, "i1")):
        digest.update(np.ascontiguousarray(column, dtype).data)
    return digest.hexdigest()


class ContentDigest:
    """The digests of a shard, sample after sample: of its contents, and of what its media say of themselves."""

    def __init__(self) -> None:
        self._contents, self._facts = hashlib.sha256(), hashlib.sha256()

    def add(self, sample: IndexedSample) -> None:
        self.add_members(sample.key, sample.members)
        media = {n: facts if isinstance(facts, str) else facts.to_json() for n, facts in sample.media.items()}
        self._facts.update(json.dumps([sample.key, sample.kind, sample.modality, media]).encode())

    def add_members(self, key: str, members: dict[str, Member]) -> None:
        self._contents.update(json.dumps([key, *members]).encode())
        for member in members.values():
            self._contents.update(struct.pack("<qq", member.offset, member.size) + member.digest)

    @property
    def contents(self) -> str:
        return self._contents.hexdigest()

    @property
    def facts(self) -> str:
        return self._facts.hexdigest()
