"""The index of a source: where every member of every sample lies, its digest, and the facts of its media.

`index.arrow` stands beside the shards: one Arrow IPC file, uncompressed, read through a memory map, so that opening it
costs what the planning columns cost (the shard, kind and modality of each sample) however many samples there are.
One row a sample, in the order of the shards; every record batch but the last has as many.

The fingerprint covers contents only, never times or paths, so that a copied source keeps the order of the run.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moss_train.data.config import MODALITIES
from moss_train.data.decoding.describe import digest_of_range
from moss_train.data.shards.arrow_file import ARROW_ERRORS, open_arrow, write_arrow
from moss_train.data.shards.index_rows import (
    KINDS,
    ROWS,
    ContentDigest,
    IndexedSample,
    IndexTotals,
    Member,
    ShardFacts,
    key_hash,
    planning_digest,
    read_row,
)
from moss_train.data.shards.scan import scan_shard
from moss_train.data.shards.storage import ShardStore, is_remote, join
from moss_train.data.shards.transfer import shown
from moss_train.errors import DataError

INDEX_NAME = "index.arrow"
INDEX_SCHEMA = "moss_train/index@2"
#: rows of every record batch but the last
BATCH_ROWS = 1 << 16


class SourceIndex:
    """All samples of one source by their number, 0 … n-1 in the order of the shards. Safe to use from many threads."""

    def __init__(self, location: str, path: Path, reader: pa.RecordBatchFileReader, header: dict[str, Any]):
        self.location = location  #: folder or URL
        self.path = path  #: of the index file on this machine
        self.shards = tuple(ShardFacts(**facts) for facts in header["shards"])
        self.fingerprint: str = header["fingerprint"]  #: of the contents
        self.facts_digest: str = header["facts_digest"]  #: of what the media say of themselves, as it was measured
        self.totals = IndexTotals(**header["totals"])
        self.tokenizer: dict[str, Any] | None = header["tokenizer"]  #: that counted `text_tokens`: fingerprint, path
        self._samples: int = header["samples"]
        self._batch_rows: int = header["batch_rows"]
        self._reader = reader
        self._batches: dict[int, pa.RecordBatch] = {}
        columns = self._planning_columns()
        self.shard_numbers, self.kinds, self.modalities = columns  #: int32, int8 (of KINDS), int8 (of MODALITIES), [n]
        if planning_digest(*columns) != header["planning_digest"]:
            raise ValueError("its digest does not fit its columns")

    def __len__(self) -> int:
        return self._samples

    def key(self, number: int) -> str:
        batch, row = self._row(number)
        return batch.column("key")[row].as_py()

    def keys(self, numbers: Sequence[int] | np.ndarray) -> list[str]:
        return [self.key(int(number)) for number in numbers]

    def number(self, key: str) -> int:
        """The number of a sample; KeyError when the source has no such key."""
        hashes, order = self._by_hash
        wanted = np.uint64(key_hash(key))
        for place in range(int(np.searchsorted(hashes, wanted)), len(hashes)):
            if hashes[place] != wanted:
                break
            if self.key(int(order[place])) == key:
                return int(order[place])
        raise KeyError(key)

    def sample(self, number: int) -> IndexedSample:
        """What the index knows of a sample; IndexError when there is no such number."""
        batch, row = self._row(number)
        return read_row(batch, row)

    def samples(self) -> Iterator[IndexedSample]:
        """All of them, in order."""
        return (self.sample(number) for number in range(len(self)))

    def text_tokens(self) -> np.ndarray:
        """int32 [n]: tokens of each sample's texts, -1 where they are unknown."""
        return self._column("text_tokens", lambda column: column.fill_null(-1), np.int32)

    def shard_name(self, number: int) -> str:
        """The shard that holds a sample, as the index names it."""
        return self.shards[self.shard_numbers[number]].name

    def shard_location(self, shard: int) -> str:
        """Path or URL of a shard."""
        return join(self.location, self.shards[shard].name)

    @cached_property
    def _by_hash(self) -> tuple[np.ndarray, np.ndarray]:
        """The hashes of all keys, ascending, and the sample of each."""
        hashes = self._column("key_hash", lambda column: column, np.uint64)
        order = np.argsort(hashes, kind="stable").astype(np.int32)
        return hashes[order], order

    def _planning_columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        for number in range(self._reader.num_record_batches):
            rows, last = self._reader.get_batch(number).num_rows, number == self._reader.num_record_batches - 1
            if rows != self._batch_rows and not (last and 0 < rows <= self._batch_rows):
                raise ValueError(f"record batch {number} has {rows} rows")
        shards = self._column("shard", lambda column: column, np.int32)
        kinds = self._column("kind", lambda column: _codes(column, KINDS), np.int8)
        modalities = self._column("modality", lambda column: _codes(column, MODALITIES), np.int8)
        if len(shards) != self._samples:
            raise ValueError(f"{len(shards)} rows instead of {self._samples}")
        if len(shards) and not 0 <= shards.min() <= shards.max() < len(self.shards):
            raise ValueError("a sample lies in a shard that is not listed")
        return shards, kinds, modalities

    def _column(self, name: str, cast, dtype: type) -> np.ndarray:
        parts = []
        for number in range(self._reader.num_record_batches):
            column = self._reader.get_batch(number).column(name)
            column.validate()
            parts.append(cast(column).to_numpy(zero_copy_only=False).astype(dtype, copy=False))
        return np.concatenate(parts) if parts else np.zeros(0, dtype)

    def _row(self, number: int) -> tuple[pa.RecordBatch, int]:
        """The record batch of a sample and its row there. A batch is checked when it is first used."""
        if not 0 <= number < self._samples:
            raise IndexError(f"no sample {number} among {self._samples}")
        place, row = divmod(int(number), self._batch_rows)
        batch = self._batches.get(place)
        if batch is None:
            try:
                batch = self._reader.get_batch(place)
                # Offsets that lead out of the file would end the process when they are followed.
                batch.validate(full=True)
            except ARROW_ERRORS as error:
                raise DataError(f"{self.path} is damaged ({error}): {remedy_of(self.location)}") from error
            self._batches[place] = batch
        return batch, row


def _codes(column: pa.DictionaryArray, names: tuple[str, ...]) -> pa.Array:
    column.dictionary.validate(full=True)
    if tuple(column.dictionary.to_pylist()) != names:
        raise ValueError(f"its kinds or modalities are not {names}")
    codes = column.indices
    if codes.null_count:
        raise ValueError("a kind or modality is missing")
    return codes


def fingerprint_of(shards: Iterable[ShardFacts]) -> str:
    """Of the contents of all shards: their names without folders, sizes and digests."""
    entries = [[_file_name(shard.name), shard.size, shard.digest] for shard in shards]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _file_name(name: str) -> str:
    """A shard's name without folders and, of a URL, without the query, which may be a signature of the day."""
    return (name.partition("?")[0] if is_remote(name) else name).rpartition("/")[2]


def facts_digest_of(shards: Sequence[str]) -> str:
    """Of what the media of all shards say of themselves, from the digests of the shards."""
    return hashlib.sha256(json.dumps(list(shards)).encode()).hexdigest()


def write_index(
    path: Path,
    shards: Sequence[ShardFacts],
    batches: Iterable[pa.RecordBatch],
    totals: IndexTotals,
    facts_digests: Sequence[str],
    planning: str,
    tokenizer: dict[str, Any] | None = None,
) -> None:
    """Write an index file; it appears complete or not at all.

    `batches` are those of the file, of the form `ROWS`, `BATCH_ROWS` rows in each but the last; `facts_digests` of the
    shards; `planning` the `planning_digest` of all rows.
    """
    header = {
        "schema": INDEX_SCHEMA,
        "samples": sum(shard.samples for shard in shards),
        "batch_rows": BATCH_ROWS,
        "fingerprint": fingerprint_of(shards),
        "facts_digest": facts_digest_of(facts_digests),
        "planning_digest": planning,
        "totals": asdict(totals),
        "tokenizer": tokenizer,
        "shards": [vars(shard) for shard in shards],
    }
    write_arrow(path, ROWS, batches, header)


def load_index(location: str | Path, store: ShardStore | None = None) -> SourceIndex:
    """The index of a source, after checking that it belongs to the shards that lie there.

    A shard whose size and modification time are unchanged is trusted; one with another time is read and compared by
    its digest. Remote shards are checked when they are read. Raises DataError for a missing or damaged index, a
    missing shard and an index that is stale.
    """
    location, remedy = str(location), remedy_of(location)
    if is_remote(location):
        try:
            path = (store or ShardStore()).local(join(location, INDEX_NAME))
        except DataError as error:
            raise DataError(f"{error}; for shards without an index, {remedy}") from error
    else:
        path = Path(location) / INDEX_NAME
        if not path.is_file():
            shard_files(Path(location))
            raise DataError(f"{path} is missing: {remedy}")
    index = open_index(path, location)
    if not is_remote(location):
        _check_fresh(Path(location), index.shards, remedy)
    return index


def open_index(path: Path, location: str) -> SourceIndex:
    """An index file, whatever has become of the shards at `location`. Raises DataError when it is damaged."""
    try:
        reader, header = open_arrow(path, ROWS, INDEX_SCHEMA)
        index = SourceIndex(location, path, reader, header)
    except ARROW_ERRORS as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}): {remedy_of(location)}") from error
    if fingerprint_of(index.shards) != index.fingerprint:
        raise DataError(f"{path} is damaged (its fingerprint does not fit its shards): {remedy_of(location)}")
    return index


def remedy_of(location: str | Path) -> str:
    """What to do about an index that is missing, damaged or stale."""
    where = " out=<folder>" if is_remote(str(location)) else ""
    return f"run `moss-train data index path={shown(str(location))}{where}`"


def shard_files(folder: Path) -> list[Path]:
    """The tar files of a source, by name; DataError when there are none."""
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder of shards: pack one with `moss-train data pack source=… out={folder}`"
        )
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise DataError(f"{folder} holds no *.tar: pack one with `moss-train data pack source=… out={folder}`")
    return shards


def contents_of_shard(path: Path) -> str:
    """The digest of a shard's contents, from all its bytes. Raises DataError when it is no readable tar."""
    digest = ContentDigest()
    with path.open("rb") as raw:
        for key, ranges in scan_shard(path):
            digest.add_members(key, {n: Member(o, s, digest_of_range(raw, o, s)) for n, (o, s) in ranges.items()})
    return digest.contents


def _check_fresh(folder: Path, shards: Sequence[ShardFacts], remedy: str) -> None:
    for shard in shards:
        if is_remote(shard.name):
            continue
        path = folder / shard.name
        if not path.is_file():
            raise DataError(f"shard {path} is missing: bring it back, or if it is gone for good, {remedy}")
        now = path.stat()
        if now.st_size != shard.size:
            raise DataError(
                f"{path} has {now.st_size} bytes, its index says {shard.size}: if the new one is right, {remedy}"
            )
        if now.st_mtime_ns != shard.mtime_ns and contents_of_shard(path) != shard.digest:
            raise DataError(f"{path} is not the file that was indexed (checksum): if the new one is right, {remedy}")
    known = {(folder / shard.name).resolve() for shard in shards if not is_remote(shard.name)}
    unknown = sorted(path for path in folder.glob("*.tar") if path.resolve() not in known)
    if unknown:
        raise DataError(f"{unknown[0]} is not in the index: {remedy}")
