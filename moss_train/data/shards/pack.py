"""`data pack`: a staging folder of samples, or shards, become a folder of webdataset tar shards with their index."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from moss_train.data.progress import progress_bar
from moss_train.data.shards.index import INDEX_NAME
from moss_train.data.shards.index_build import build_index
from moss_train.data.shards.pack_input import Samples, find_samples, read_sample
from moss_train.data.shards.staging import check_target, staged_folder
from moss_train.data.shards.storage import ShardStore
from moss_train.data.shards.transcode import TranscodeConfig
from moss_train.data.shards.transcoder import Clip, Transcoder, TranscodeSummary, shows_other_moments
from moss_train.data.shards.transfer import shown
from moss_train.errors import ConfigError, DataError, SampleError

#: samples that `data pack` left out, one JSON line each with key, reason and exception
REJECTED_NAME = "quarantine.jsonl"


@dataclass
class PackOptions:
    """Options of `data pack`."""

    source: str
    """Staging folder: `{key}.json` with its media `{key}.mp4`, `{key}.0.jpg`, … side by side; or shards: a folder of
    `*.tar`, or paths and URLs with counts and patterns as `data index` takes them."""
    out: str
    """Folder to make: `shard-000000.tar …`, `index.arrow`, and `quarantine.jsonl` when samples were left out."""
    shard_mb: int = 256
    """Size at which the next shard is begun, in MB; 256 to 1000 suits shared file systems."""
    overwrite: bool = False
    """Replace `out` when it exists."""
    workers: int = 0
    """Processes that look into media and transcode; 0: one for each core."""
    transcode: TranscodeConfig = field(default_factory=TranscodeConfig)
    """Clips are rewritten when `transcode.fps` is given."""
    cache_dir: str | None = None
    """Folder where remote shards are kept; null: `moss_train/shards` in the user's cache folder."""
    cache_gb: float = 100.0
    """Size limit of that folder in GB (10⁹ bytes)."""
    remote_retries: int = 5
    """How often a failed transfer is tried again."""
    remote_timeout_s: float = 60.0
    """A transfer that brings no byte for so long has failed; seconds."""

    def validate(self) -> None:
        if self.shard_mb < 1:
            raise ConfigError(f"shard_mb={self.shard_mb} must be at least 1")
        if self.workers < 0:
            raise ConfigError(f"workers={self.workers} must not be negative")
        if self.cache_gb <= 0 or self.remote_timeout_s <= 0 or self.remote_retries < 0:
            raise ConfigError("cache_gb and remote_timeout_s must be above 0, remote_retries at least 0")
        self.transcode.validate()


def pack_command(options: PackOptions) -> int:
    """Pack a staging folder, or pack shards anew; prints what was written and what was left out.

    With `transcode.fps=…` the clips are rewritten, so that decoding them costs a fraction; stopped while it
    does that, the same command goes on where it was.
    """
    transcode = options.transcode if options.transcode.fps is not None else None
    workers = options.workers or os.cpu_count() or 1
    out = Path(options.out)
    with closing(
        ShardStore(options.cache_dir, options.cache_gb, options.remote_retries, options.remote_timeout_s)
    ) as store:
        packed = pack(options.source, out, options.shard_mb, options.overwrite, True, transcode, workers, store)
    if packed.transcoded is not None:
        print("\n".join(packed.transcoded.lines()))
    for error in packed.rejected[:10]:
        print(f"left out {error.key}: {error.reason}")
    if len(packed.rejected) > 10:
        print(f"… and {len(packed.rejected) - 10} more")
    ledger = f", {len(packed.rejected)} left out ({options.out}/{REJECTED_NAME})" if packed.rejected else ""
    print(f"packed {packed.samples} samples into {options.out}{ledger}")
    return 0


class Packed(NamedTuple):
    """What `pack` did."""

    samples: int  #: samples packed
    rejected: list[SampleError]  #: samples left out
    transcoded: TranscodeSummary | None = None


def pack(
    source: str | Path,
    out: Path,
    shard_mb: int = 256,
    overwrite: bool = False,
    progress: bool = False,
    transcode: TranscodeConfig | None = None,
    workers: int = 0,
    store: ShardStore | None = None,
) -> Packed:
    """Write the samples of `source` (see `find_samples`), by key, as shards with their index to the folder `out`.

    A sample that breaks the schema or lacks a medium is left out and recorded; one whose medium does not decode is
    packed, and the index says so, but left out when clips are to be transcoded. `workers` processes look into the media
    and transcode; 0: this one does. `store` fetches remote shards. `out` appears complete or not at all.
    Raises DataError when `out` exists or no sample is left.
    """
    store = store or ShardStore()
    check_target(out, INDEX_NAME, "data pack", overwrite)
    samples = find_samples(str(source), store)
    rejected: list[SampleError] = []
    transcoder = None
    if transcode is not None:
        transcoder = Transcoder(transcode, out, store, workers)
        transcoder.run(_clips(samples, store), progress)
    with staged_folder(out) as partial:
        names = progress_bar(list(samples), f"packing {shown(str(source)).rstrip('/').rpartition('/')[2]}", progress)
        count = _write_shards(partial, _contents(samples, names, store, transcoder, rejected), shard_mb)
        if not count:
            first = f"; the first: {rejected[0]}" if rejected else ""
            raise DataError(
                f"{shown(str(source))} holds no sample that can be packed ({len(rejected)} left out{first})"
            )
        if rejected:
            _write_rejected(partial / REJECTED_NAME, rejected)
        build_index(partial, workers=workers, progress=progress)
    if transcoder is not None:
        transcoder.clean_up()
    return Packed(count, rejected, transcoder.summary if transcoder is not None else None)


def _clips(samples: Samples, store: ShardStore) -> list[Clip]:
    """The videos of the samples that can be packed."""
    clips: list[Clip] = []
    for key, pieces in samples.items():
        try:
            _, sample = read_sample(key, pieces, store)
        except SampleError:
            continue  # reported when the shards are written
        clips += [(key, medium.member, pieces[medium.member]) for medium in sample.media if medium.kind == "video"]
    return clips


def _contents(
    samples: Samples, keys: Iterable[str], store: ShardStore, transcoder: Transcoder | None, rejected: list[SampleError]
) -> Iterator[dict[str, str | bytes]]:
    """What webdataset writes of each sample; samples that cannot be packed go to `rejected`."""
    for key in keys:
        pieces = samples[key]
        try:
            text, sample = read_sample(key, pieces, store)
            members: dict[str, str | bytes] = {"__key__": key, "json": text}
            for medium in sample.media:
                piece = pieces[medium.member]
                members[medium.member] = piece.read(store) if transcoder is None else transcoder.read(key, piece)
        except SampleError as error:
            rejected.append(error)
            continue
        if transcoder is not None:
            transcoder.summary.off_grid += shows_other_moments(sample, transcoder.summary.config.fps)
        yield members


def _write_shards(folder: Path, contents: Iterable[dict[str, str | bytes]], shard_mb: int) -> int:
    """Write tars and return the number of samples. The same samples make the same bytes: owner and time are fixed."""
    import webdataset  # here, since it brings torch, for which transcoding need not wait

    count = 0
    pattern = str(folder).replace("%", "%%") + "/shard-%06d.tar"
    with webdataset.ShardWriter(
        pattern, maxcount=10**9, maxsize=shard_mb * 1_000_000, verbose=0, encoder=False, mtime=0
    ) as writer:
        for members in contents:
            writer.write(members)
            count += 1
    return count


def _write_rejected(path: Path, rejected: list[SampleError]) -> None:
    with path.open("w", encoding="utf-8") as out:
        for error in rejected:
            entry = {"key": error.key, "reason": error.reason, "exception": type(error).__name__}
            out.write(json.dumps(entry, ensure_ascii=False) + "\n")
