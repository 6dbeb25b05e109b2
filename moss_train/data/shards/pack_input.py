"""What `data pack` reads: the samples of a staging folder, or of shards that are there already."""

from dataclasses import dataclass
from pathlib import Path

from moss_train.data.shards.scan import scan_shard
from moss_train.data.shards.storage import ShardStore, expand, is_remote
from moss_train.data.shards.transfer import shown
from moss_train.errors import DataError, SampleError
from moss_train.streams.schema import Sample, parse_sample

#: longest base name a plain (USTAR) tar header holds, which every reader of tars understands
LONGEST_NAME = 100


@dataclass(frozen=True)
class Piece:
    """Where the bytes of one member of a sample lie."""

    location: str  #: of a staged file, or of a shard: path or URL
    offset: int  #: bytes
    size: int  #: bytes
    file_size: int  #: bytes of the file or shard
    mtime_ns: int  #: 0 where it is not known

    def read(self, store: ShardStore) -> bytes:
        return store.read(self.location, self.offset, self.size, self.file_size)


#: key → member → piece
Samples = dict[str, dict[str, Piece]]


def find_samples(source: str, store: ShardStore) -> Samples:
    """The samples of a staging folder, or of the shards in a folder or at URLs (see `storage.expand`), by key.

    Raises DataError when there are none, or a shard is damaged.
    """
    folder = Path(source)
    if is_remote(source) or "{" in source or "*" in source:
        samples = _in_shards(expand(source), store)
    elif not folder.is_dir():
        raise DataError(f"{source} is not a staging folder: `moss-train data render` or `data convert` write one")
    elif any(folder.glob("*.tar")):
        samples = _in_shards(expand(source), store)
    else:
        samples = _staged(folder)
    if not samples:
        raise DataError(f"{shown(source)} holds no samples ({{key}}.json with media beside it)")
    return dict(sorted(samples.items()))


def _staged(folder: Path) -> Samples:
    samples: Samples = {}
    for path in sorted(folder.iterdir()):
        # *.jsonl are ledgers and notes of the converters, no parts of samples.
        if not path.is_file() or path.name.startswith(".") or path.suffix == ".jsonl":
            continue
        key, _, member = path.name.partition(".")
        now = path.stat()
        samples.setdefault(key, {})[member.lower()] = Piece(str(path), 0, now.st_size, now.st_size, now.st_mtime_ns)
    return samples


def _in_shards(shards: list[str], store: ShardStore) -> Samples:
    samples: Samples = {}
    for location in shards:
        with store.held(location) as path:
            now = path.stat()
            mtime_ns = 0 if is_remote(location) else now.st_mtime_ns
            for key, members in scan_shard(path, shown(location)):
                if key in samples:
                    raise DataError(f"{shown(location)}: key {key!r} is used twice, or its parts lie apart")
                samples[key] = {
                    name: Piece(location, offset, size, now.st_size, mtime_ns)
                    for name, (offset, size) in members.items()
                }
    return samples


def read_sample(key: str, pieces: dict[str, Piece], store: ShardStore) -> tuple[bytes, Sample]:
    """The JSON of a sample; SampleError when it breaks the schema or lists other media than there are."""
    if "json" not in pieces:
        raise SampleError(key, f"{', '.join(sorted(pieces))} without {key}.json")
    text = pieces["json"].read(store)
    sample = parse_sample(text, key)
    listed = {"json"}
    for medium in sample.media:
        if medium.member not in pieces:
            raise SampleError(key, f"medium {medium.id!r}: {key}.{medium.member} is missing")
        listed.add(medium.member)
    unused = sorted(set(pieces) - listed)
    if unused:
        raise SampleError(key, f"{', '.join(unused)} beside the JSON, which does not list it")
    too_long = [name for name in pieces if len(f"{key}.{name}".encode()) > LONGEST_NAME]
    if too_long:
        raise SampleError(key, f"name {key}.{too_long[0]} is longer than {LONGEST_NAME} bytes")
    return text, sample
