"""`data pack`: a staging folder of samples becomes a folder of webdataset tar shards with their index."""

import json
from dataclasses import dataclass
from pathlib import Path

import webdataset

from moss_train.data.progress import progress_bar
from moss_train.data.shards.index import INDEX_NAME
from moss_train.data.shards.index_build import build_index
from moss_train.data.shards.staging import check_target, staged_folder
from moss_train.errors import ConfigError, DataError, SampleError
from moss_train.streams.schema import parse_sample

#: samples that `data pack` left out, one JSON line each with key, reason and exception
REJECTED_NAME = "quarantine.jsonl"
#: longest base name a plain (USTAR) tar header holds, which every reader of tars understands
LONGEST_NAME = 100


@dataclass
class PackOptions:
    """Options of `data pack`."""

    source: str
    """Staging folder: `{key}.json` with its media `{key}.mp4`, `{key}.0.jpg`, … side by side."""
    out: str
    """Folder to make: `shard-000000.tar …`, `index.arrow`, and `quarantine.jsonl` when samples were left out."""
    shard_mb: int = 256
    """Size at which the next shard is begun, in MB; 256 to 1000 suits shared file systems."""
    overwrite: bool = False
    """Replace `out` when it exists."""

    def validate(self) -> None:
        if self.shard_mb < 1:
            raise ConfigError(f"shard_mb={self.shard_mb} must be at least 1")


def pack_command(options: PackOptions) -> int:
    """Pack a staging folder; prints what was written and what was left out."""
    packed, rejected = pack(Path(options.source), Path(options.out), options.shard_mb, options.overwrite, progress=True)
    for error in rejected[:10]:
        print(f"left out {error.key}: {error.reason}")
    if len(rejected) > 10:
        print(f"… and {len(rejected) - 10} more")
    ledger = f", {len(rejected)} left out ({options.out}/{REJECTED_NAME})" if rejected else ""
    print(f"packed {packed} samples into {options.out}{ledger}")
    return 0


def pack(
    source: Path, out: Path, shard_mb: int = 256, overwrite: bool = False, progress: bool = False
) -> tuple[int, list[SampleError]]:
    """Write the shards and the index of `source` to `out`; returns (samples packed, samples left out).

    A sample that breaks the schema or lacks a medium is left out and recorded; one whose medium does not decode is
    packed, and the index says so. `out` appears complete or not at all.
    Raises DataError when `out` exists or no sample is left.
    """
    keys = _staged_keys(source)
    check_target(out, INDEX_NAME, "data pack", overwrite)
    with staged_folder(out) as partial:
        rejected: list[SampleError] = []
        packed = 0
        pattern = str(partial).replace("%", "%%") + "/shard-%06d.tar"
        # Fixed owner and time: the same samples make the same bytes, hence the same fingerprint.
        with webdataset.ShardWriter(
            pattern, maxcount=10**9, maxsize=shard_mb * 1_000_000, verbose=0, encoder=False, mtime=0
        ) as writer:
            for key, members in progress_bar(sorted(keys.items()), f"packing {source.name}", progress):
                try:
                    writer.write({"__key__": key} | _read_members(key, members))
                    packed += 1
                except SampleError as error:
                    rejected.append(error)
        if not packed:
            first = f"; the first: {rejected[0]}" if rejected else ""
            raise DataError(f"{source} holds no sample that can be packed ({len(rejected)} left out{first})")
        if rejected:
            _write_rejected(partial / REJECTED_NAME, rejected)
        build_index(partial, progress=progress)
    return packed, rejected


def _staged_keys(source: Path) -> dict[str, dict[str, Path]]:
    """key → member → file of a staging folder."""
    if not source.is_dir():
        raise DataError(f"{source} is not a staging folder: `moss-train data render` or `data convert` write one")
    keys: dict[str, dict[str, Path]] = {}
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        key, _, member = path.name.partition(".")
        if path.suffix == ".jsonl":
            continue  # ledgers and notes of the converters, no parts of samples
        keys.setdefault(key, {})[member.lower()] = path
    if not keys:
        raise DataError(f"{source} holds no samples ({{key}}.json with media beside it)")
    return keys


def _read_members(key: str, files: dict[str, Path]) -> dict[str, bytes]:
    """The JSON and exactly the media that it lists; SampleError when the sample is not whole."""
    if "json" not in files:
        raise SampleError(key, f"{', '.join(sorted(files))} without {key}.json")
    text = files["json"].read_bytes()
    sample = parse_sample(text, key)
    members = {"json": text}
    for medium in sample.media:
        if medium.member not in files:
            raise SampleError(key, f"medium {medium.id!r}: {key}.{medium.member} is missing")
        members[medium.member] = files[medium.member].read_bytes()
    unused = sorted(set(files) - set(members))
    if unused:
        raise SampleError(key, f"{', '.join(unused)} beside the JSON, which does not list it")
    too_long = [name for name in members if len(f"{key}.{name}".encode()) > LONGEST_NAME]
    if too_long:
        raise SampleError(key, f"name {key}.{too_long[0]} is longer than {LONGEST_NAME} bytes")
    return members


def _write_rejected(path: Path, rejected: list[SampleError]) -> None:
    with path.open("w", encoding="utf-8") as out:
        for error in rejected:
            entry = {"key": error.key, "reason": error.reason, "exception": type(error).__name__}
            out.write(json.dumps(entry, ensure_ascii=False) + "\n")
