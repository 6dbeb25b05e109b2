"""The index of a source: where every member of every sample lies, and the facts of its media.

`index.jsonl` stands beside the shards. Its first line is a header with the shards (name, size, modification time,
SHA-256), the number of samples and the fingerprint; then one line a sample, in the order of the shards. The
fingerprint covers contents only, never times or paths, so that a copied source keeps the order of the run.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_train.data.decoding.job import read_range
from moss_train.data.decoding.probe import MediaProbe, probe_media
from moss_train.data.progress import progress_bar
from moss_train.errors import DataError, SampleError
from moss_train.streams.media import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from moss_train.streams.schema import SAMPLE_TYPES

INDEX_NAME = "index.jsonl"
INDEX_SCHEMA = "moss_train/index@1"
INVALID_KIND = "invalid"  #: of samples whose JSON member is absent, broken or of an unknown schema


@dataclass(frozen=True)
class ShardFacts:
    """One tar file as it was when it was indexed."""

    name: str
    size: int  #: bytes
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class IndexedSample:
    """One sample of a source."""

    key: str
    shard: int  #: index into the source's shards
    kind: str  #: "caption", "conversation", "stream" or INVALID_KIND
    members: dict[str, tuple[int, int]]  #: member name ("json", "mp4", "0.jpg") → offset and size in the shard, bytes
    media: dict[str, MediaProbe | str]  #: media member → its facts, or the reason why it cannot be read


@dataclass(frozen=True)
class SourceIndex:
    """All samples of one folder of shards."""

    folder: Path
    shards: tuple[ShardFacts, ...]
    samples: tuple[IndexedSample, ...]
    fingerprint: str

    def shard_path(self, sample: IndexedSample) -> Path:
        return self.folder / self.shards[sample.shard].name


@dataclass
class IndexOptions:
    """Options of `data index`."""

    path: str
    """Folder that holds `*.tar`; `index.jsonl` is written beside them."""


def index_command(options: IndexOptions) -> int:
    """Scan the shards of a folder and write their index."""
    index = build_index(Path(options.path), progress=True)
    write_index(index)
    kinds: dict[str, int] = {}
    for sample in index.samples:
        kinds[sample.kind] = kinds.get(sample.kind, 0) + 1
    print(
        f"indexed {len(index.samples)} samples ({', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))}) "
        f"in {len(index.shards)} shards: {index.folder / INDEX_NAME}"
    )
    return 0


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


def build_index(folder: Path, progress: bool = False) -> SourceIndex:
    """Read every shard once. Raises DataError for damaged tars, doubled keys and parts that do not lie together."""
    paths = shard_files(folder)
    shards: list[ShardFacts] = []
    samples: list[IndexedSample] = []
    seen: dict[str, str] = {}
    for number, path in enumerate(progress_bar(paths, f"indexing {folder.name}", progress)):
        before = path.stat()
        for key, members in scan_shard(path):
            if key in seen:
                raise DataError(f"{path}: key {key!r} is in {seen[key]} too (or its parts do not lie side by side)")
            seen[key] = path.name
            samples.append(describe_sample(path, number, key, members))
        shards.append(ShardFacts(path.name, before.st_size, before.st_mtime_ns, file_sha256(path)))
    return SourceIndex(folder, tuple(shards), tuple(samples), _fingerprint(shards, samples))


def scan_shard(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, member → (offset, size)) of each sample of a tar, from its headers alone.

    Raises DataError when the file is no plain tar, is cut short, or holds a member that is no plain file below the
    archive's root.
    """
    size = path.stat().st_size
    current: tuple[str, dict[str, tuple[int, int]]] | None = None
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                if entry.isdir():
                    continue
                key, member = _split_name(path, entry)
                if entry.offset_data + entry.size > size:
                    raise DataError(f"{path} is cut short: member {entry.name!r} ends after the file; write it again")
                if current is None or current[0] != key:
                    if current is not None:
                        yield current
                    current = (key, {})
                if member in current[1]:
                    raise DataError(f"{path}: member {entry.name!r} stands twice")
                current[1][member] = (entry.offset_data, entry.size)
            end = tar.offset
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(f"{path} is no readable tar ({error}): it is cut short, damaged or compressed") from error
    with path.open("rb") as raw:
        raw.seek(end)
        if not raw.read(512).count(0) == 512:
            raise DataError(f"{path} is cut short: the end marker of the tar is missing; write it again")
    if current is not None:
        yield current


def _split_name(path: Path, entry: tarfile.TarInfo) -> tuple[str, str]:
    """`dir/key.0.mp4` → ("dir/key", "0.mp4"), as webdataset splits names."""
    folder, _, base = entry.name.rpartition("/")
    stem, dot, member = base.partition(".")
    if not entry.isreg() or entry.name.startswith("/") or ".." in entry.name.split("/"):
        raise DataError(f"{path}: member {entry.name!r} is no plain file below the root of the archive")
    if not stem or not dot or not member:
        raise DataError(f"{path}: member {entry.name!r} is not named key.extension")
    return f"{folder}/{stem}" if folder else stem, member.lower()


def describe_sample(path: Path, number: int, key: str, members: dict[str, tuple[int, int]]) -> IndexedSample:
    """The index entry of a sample; looks into its JSON for the kind and into its media for their facts."""
    kind = INVALID_KIND
    if "json" in members:
        kind = _kind_of(read_range(path, *members["json"]))
    media: dict[str, MediaProbe | str] = {}
    for member, (offset, size) in members.items():
        if member.rpartition(".")[2] not in VIDEO_EXTENSIONS + IMAGE_EXTENSIONS:
            continue
        try:
            media[member] = probe_media(read_range(path, offset, size), key)
        except SampleError as error:
            media[member] = error.reason
    return IndexedSample(key, number, kind, members, media)


def _kind_of(text: bytes) -> str:
    """The sample's kind by its schema name alone; whether the JSON is right is for the reader to find."""
    try:
        name = json.loads(text).get("schema")
    except (ValueError, AttributeError, RecursionError):
        return INVALID_KIND
    return name.partition("/")[2].partition("@")[0] if isinstance(name, str) and name in SAMPLE_TYPES else INVALID_KIND


def file_sha256(path: Path) -> str:
    with path.open("rb") as raw:
        return hashlib.file_digest(raw, "sha256").hexdigest()


def _sample_line(sample: IndexedSample) -> str:
    media = {name: facts if isinstance(facts, str) else facts.to_json() for name, facts in sample.media.items()}
    return json.dumps(
        {"key": sample.key, "shard": sample.shard, "kind": sample.kind, "members": sample.members, "media": media},
        separators=(",", ":"),
    )


def _fingerprint(shards: list[ShardFacts], samples: list[IndexedSample]) -> str:
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.name}\0{shard.size}\0{shard.sha256}\n".encode())
    for sample in samples:
        digest.update(_sample_line(sample).encode() + b"\n")
    return digest.hexdigest()


def write_index(index: SourceIndex) -> Path:
    """Write `index.jsonl` beside the shards; the file appears complete or not at all."""
    header = {
        "schema": INDEX_SCHEMA,
        "samples": len(index.samples),
        "fingerprint": index.fingerprint,
        "shards": [vars(shard) for shard in index.shards],
    }
    path = index.folder / INDEX_NAME
    temporary = path.with_name(f"{INDEX_NAME}.{os.getpid()}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as out:
            out.write(json.dumps(header, separators=(",", ":")) + "\n")
            out.writelines(_sample_line(sample) + "\n" for sample in index.samples)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_index(folder: str | Path) -> SourceIndex:
    """The index of a source, after checking that it belongs to the shards that lie there.

    A shard whose size and modification time are unchanged is trusted; one with another time is compared by checksum.
    Raises DataError for a missing or damaged index, a missing shard and an index that is stale.
    """
    folder = Path(folder)
    path = folder / INDEX_NAME
    remedy = f"run `moss-train data index path={folder}`"
    if not path.is_file():
        shard_files(folder)
        raise DataError(f"{path} is missing: {remedy}")
    try:
        with path.open(encoding="utf-8") as lines:
            header = json.loads(next(lines))
            if header.get("schema") != INDEX_SCHEMA:
                raise DataError(f"{path} has schema {header.get('schema')!r}, not {INDEX_SCHEMA!r}: {remedy}")
            shards = [ShardFacts(**entry) for entry in header["shards"]]
            samples = [_read_sample(json.loads(line)) for line in lines]
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}): {remedy}") from error
    if len(samples) != header["samples"] or _fingerprint(shards, samples) != header["fingerprint"]:
        raise DataError(f"{path} is damaged (its fingerprint does not fit its lines): {remedy}")
    _check_fresh(folder, shards, remedy)
    return SourceIndex(folder, tuple(shards), tuple(samples), header["fingerprint"])


def _read_sample(entry: dict[str, Any]) -> IndexedSample:
    return IndexedSample(
        key=entry["key"],
        shard=entry["shard"],
        kind=entry["kind"],
        members={name: (offset, size) for name, (offset, size) in entry["members"].items()},
        media={n: facts if isinstance(facts, str) else MediaProbe(**facts) for n, facts in entry["media"].items()},
    )


def _check_fresh(folder: Path, shards: list[ShardFacts], remedy: str) -> None:
    for shard in shards:
        path = folder / shard.name
        if not path.is_file():
            raise DataError(f"shard {path} is missing: bring it back, or if it is gone for good, {remedy}")
        now = path.stat()
        if now.st_size != shard.size:
            raise DataError(
                f"{path} has {now.st_size} bytes, its index says {shard.size}: if the new one is right, {remedy}"
            )
        if now.st_mtime_ns != shard.mtime_ns and file_sha256(path) != shard.sha256:
            raise DataError(f"{path} is not the file that was indexed (checksum): if the new one is right, {remedy}")
    unknown = sorted({path.name for path in folder.glob("*.tar")} - {shard.name for shard in shards})
    if unknown:
        raise DataError(f"{folder / unknown[0]} is not in the index: {remedy}")
