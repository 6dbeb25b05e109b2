"""Shards read once: each member is looked at, and what is found in a shard is stored when the shard is done."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from moss_train.data.decoding.describe import Described, DescribeJob
from moss_train.data.decoding.job import run_job
from moss_train.data.shards.index_merge import write_partial
from moss_train.data.shards.index_rows import (
    INVALID_KIND,
    KINDS,
    ContentDigest,
    IndexedSample,
    IndexTotals,
    Member,
    ShardFacts,
    write_rows,
)
from moss_train.data.shards.scan import Ranges, scan_shard
from moss_train.data.shards.storage import ShardStore, is_remote
from moss_train.data.shards.transfer import shown
from moss_train.errors import DataError, SampleError
from moss_train.streams.media import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

#: rows that are held as objects while a shard is read
_ROWS_HELD = 8192
#: members that wait for their descriptions; enough for any number of processes, little beside a shard
_AHEAD = 256

Submit = Callable[[DescribeJob], "Future[Described]"]
Asked = tuple[DescribeJob, "Future[Described]"]
#: told of a shard, by its name, that cannot be read to its end
OnFault = Callable[[str, DataError], None]


@dataclass(frozen=True)
class Shard:
    """A shard to be indexed."""

    name: str  #: as the index will name it
    location: str
    partial: Path  #: what is known of it, once it is done
    size: int = 0  #: bytes, when it was opened
    mtime_ns: int | None = None  #: then; None of a remote one


@dataclass(frozen=True)
class Look:
    """How members are looked at."""

    submit: Submit
    store: ShardStore
    max_pixels: int
    tokenizer: str | None  #: its file
    settings: dict[str, Any]  #: on which it depends what is found


def describe_shards(shards: Iterable[Shard], look: Look, on_fault: OnFault | None) -> None:
    """Store what is found in each shard. Members of the next shard are looked at while the last ones are waited for."""
    findings: _Findings | None = None
    for shard, sample in _described(_scanned(shards, look.store, on_fault), look):
        findings = findings or _Findings(shard)
        if sample is not None:
            findings.add(sample)
        else:
            findings.store(look.settings)
            findings = None


def _scanned(
    shards: Iterable[Shard], store: ShardStore, on_fault: OnFault | None
) -> Iterator[tuple[Shard, str, Ranges | None]]:
    """(shard, key, members) of every sample; after the last of a shard, members are None."""
    for shard in shards:
        with store.held(shard.location) as path:
            opened = shard
            try:
                now = path.stat()
                opened = replace(
                    shard, size=now.st_size, mtime_ns=None if is_remote(shard.location) else now.st_mtime_ns
                )
                seen: set[str] = set()
                for key, ranges in scan_shard(path, shown(shard.location)):
                    if key in seen:
                        raise DataError(
                            f"{shown(shard.location)}: key {key!r} stands twice, or its parts do not lie side by side"
                        )
                    seen.add(key)
                    yield opened, key, ranges
            except DataError as error:
                if on_fault is None:
                    raise
                on_fault(shard.name, error)
        yield opened, "", None


def _described(
    scanned: Iterator[tuple[Shard, str, Ranges | None]], look: Look
) -> Iterator[tuple[Shard, IndexedSample | None]]:
    waiting: deque[tuple[Shard, str, Ranges | None, dict[str, Asked]]] = deque()
    members = 0
    for shard, key, ranges in scanned:
        jobs = {name: _job(shard, key, name, place, look) for name, place in (ranges or {}).items()}
        waiting.append((shard, key, ranges, {name: (job, look.submit(job)) for name, job in jobs.items()}))
        members += len(jobs)
        while members > _AHEAD:
            members -= len(waiting[0][3])
            yield _sample(*waiting.popleft(), look.store)
    while waiting:
        yield _sample(*waiting.popleft(), look.store)


def _job(shard: Shard, key: str, member: str, place: tuple[int, int], look: Look) -> DescribeJob:
    extension = member.rpartition(".")[2]
    kind = "json" if member == "json" else "medium" if extension in VIDEO_EXTENSIONS + IMAGE_EXTENSIONS else "other"
    return DescribeJob(key, shard.location, *place, kind, look.max_pixels, look.tokenizer, shard.size)


def _sample(
    shard: Shard, key: str, ranges: Ranges | None, asked: "dict[str, Asked]", store: ShardStore
) -> tuple[Shard, IndexedSample | None]:
    if ranges is None:
        return shard, None
    members: dict[str, Member] = {}
    media: dict[str, Any] = {}
    kind, text_tokens = INVALID_KIND, None
    for name, (job, future) in asked.items():
        try:
            found = future.result()
        except SampleError as error:  # the process that looked at it died, hung or had not enough memory
            found = replace(run_job(replace(job, type="other"), store), fault=error.reason)
        members[name] = Member(*ranges[name], found.digest)
        if name == "json":
            named = (found.schema or "").removeprefix("moss_train/").removesuffix("@1")
            kind, text_tokens = named if named in KINDS else INVALID_KIND, found.text_tokens
        elif job.type == "medium":
            media[name] = found.media or found.fault
    return shard, IndexedSample(key, 0, kind, _modality(media), members, media, text_tokens)


def _modality(media: dict[str, Any]) -> str:
    """What a sample shows; a medium that cannot be read is what its name says."""
    videos = [
        name.endswith(VIDEO_EXTENSIONS) if isinstance(facts, str) else facts.container != "image"
        for name, facts in media.items()
    ]
    return "video" if any(videos) else "image" if videos else "text"


class _Findings:
    """What is found in one shard, until it is stored."""

    def __init__(self, shard: Shard):
        self._shard = shard
        self._digest = ContentDigest()
        self._totals = IndexTotals()
        self._rows: list[IndexedSample] = []
        self._batches: list[pa.RecordBatch] = []
        self._samples = 0

    def add(self, sample: IndexedSample) -> None:
        self._digest.add(sample)
        self._totals.add(IndexTotals.of(sample))
        self._samples += 1
        self._rows.append(sample)
        if len(self._rows) == _ROWS_HELD:
            self._flush()

    def _flush(self) -> None:
        self._batches.append(write_rows(self._rows))
        self._rows = []

    def store(self, settings: dict[str, Any]) -> None:
        self._flush()
        shard = self._shard
        if shard.mtime_ns is not None:
            now = Path(shard.location).stat()
            if (now.st_size, now.st_mtime_ns) != (shard.size, shard.mtime_ns):
                raise DataError(f"{shard.location} was changed while it was indexed: index it again")
        facts = ShardFacts(shard.name, shard.size, shard.mtime_ns, self._digest.contents, self._samples)
        write_partial(shard.partial, facts, self._batches, self._digest, self._totals, settings)
