"""`data index`: shards, wherever they lie, are read once and get their index.

What is found in a shard is stored as soon as the shard is done (`.index-partial/`), so that an indexing that was
stopped goes on where it was; each member is looked at by a process that can be killed, so that a file over which FFmpeg
hangs or crashes costs one medium.
"""

import fcntl
import hashlib
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from moss_train.data.config import DataConfig
from moss_train.data.decoding.describe import Described, DescribeJob, save_tokenizer
from moss_train.data.decoding.job import run_job
from moss_train.data.decoding.pool import DecodePool
from moss_train.data.progress import progress_bar
from moss_train.data.shards.arrow_file import ARROW_ERRORS
from moss_train.data.shards.describe_shards import Look, OnFault, Shard, Submit, describe_shards
from moss_train.data.shards.index import INDEX_NAME, SourceIndex, load_index, shard_files
from moss_train.data.shards.index_merge import merge_partials, read_partial
from moss_train.data.shards.storage import ShardStore, expand, is_remote
from moss_train.data.shards.transfer import shown
from moss_train.errors import DataError
from moss_train.streams.tokenizer import StreamTokenizer

PARTIAL_FOLDER = ".index-partial"
#: remote shards that are fetched before they are needed
_SHARDS_AHEAD = 2


def build_index(
    location: str | Path,
    out: str | Path | None = None,
    workers: int = 0,
    progress: bool = False,
    tokenizer: StreamTokenizer | None = None,
    data: DataConfig | None = None,
    store: ShardStore | None = None,
    on_fault: OnFault | None = None,
) -> SourceIndex:
    """Read every shard of `location` (see `storage.expand`) once and write their index, beside them or to `out`.

    Members are looked at by `workers` processes, or in this one, where a file over which FFmpeg crashes or hangs takes
    everything with it. `tokenizer` counts the texts' tokens. `data` bounds time, memory and pixels and says how remote
    shards are fetched, which `store` does when it is given. `on_fault` makes the index one of what can be read.

    Raises DataError for damaged tars, doubled keys and parts of a sample that do not lie together.
    """
    location, data = str(location), data or DataConfig()
    folder = _folder_of(location, out)
    shards = _shards_of(location, folder, beside=out is None)
    if not shards:
        raise DataError(f"{shown(location)}: no shards there")
    settings = {"max_pixels": data.max_frame_pixels, "tokenizer": tokenizer.fingerprint if tokenizer else None}
    with ExitStack() as stack:
        stack.enter_context(_alone(folder / PARTIAL_FOLDER))
        if store is None:
            store = stack.enter_context(closing(ShardStore.of(data)))
        submit: Submit = partial(_describe_here, store=store)
        if workers:
            submit = stack.enter_context(closing(DecodePool.of(data, workers, store))).submit
        look = Look(submit, store, data.max_frame_pixels, _tokenizer_file(tokenizer, folder), settings)
        todo = [shard for shard in shards if not _is_done(shard, settings)]
        for shard in todo[:_SHARDS_AHEAD]:
            store.prefetch(shard.location)
        bar = progress_bar(todo, f"indexing {shown(location).rstrip('/').rpartition('/')[2]}", progress)
        describe_shards(_fetched_ahead(bar, todo, store), look, on_fault)
        names = {"fingerprint": tokenizer.fingerprint} if tokenizer else None
        merge_partials([shard.partial for shard in shards], folder / INDEX_NAME, names, on_fault)
        shutil.rmtree(folder / PARTIAL_FOLDER)
    return load_index(folder)


@contextmanager
def _alone(partials: Path) -> Iterator[None]:
    """The folder of what was found, for this process alone. Raises DataError when another one uses it."""
    partials.mkdir(parents=True, exist_ok=True)
    with (partials / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{partials.parent} is being indexed by another process: wait for it") from error
        yield


def _folder_of(location: str, out: str | Path | None) -> Path:
    """Where the index goes."""
    if out is not None:
        return Path(out)
    if is_remote(location) or not Path(location).is_dir():
        if not is_remote(location) and "{" not in location and "*" not in location:
            shard_files(Path(location))
        raise DataError(f"{shown(location)} is no folder in which an index can be written: give out=<folder>")
    return Path(location)


def _shards_of(location: str, folder: Path, beside: bool) -> list[Shard]:
    if beside:
        found = [(path.name, str(path)) for path in shard_files(folder)]
    else:
        found = [(name, name) if is_remote(name) else (str(Path(name).resolve()),) * 2 for name in expand(location)]
    return [
        Shard(name, place, folder / PARTIAL_FOLDER / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.arrow")
        for name, place in found
    ]


def _tokenizer_file(tokenizer: StreamTokenizer | None, folder: Path) -> str | None:
    """A file from which the processes that look at members read the tokenizer."""
    if tokenizer is None:
        return None
    path = folder / PARTIAL_FOLDER / f"tokenizer-{tokenizer.fingerprint}.json"
    save_tokenizer(tokenizer, path)
    return str(path)


def _fetched_ahead(shards: Iterable[Shard], todo: list[Shard], store: ShardStore) -> Iterator[Shard]:
    """The shards, each of them while the next ones are fetched."""
    for number, shard in enumerate(shards):
        if number + _SHARDS_AHEAD < len(todo):
            store.prefetch(todo[number + _SHARDS_AHEAD].location)
        yield shard


def _describe_here(job: DescribeJob, store: ShardStore) -> "Future[Described]":
    future: Future[Described] = Future()
    try:
        future.set_result(run_job(job, store))
    except Exception as error:  # whatever it is belongs to whoever asks for the result
        future.set_exception(error)
    return future


def _is_done(shard: Shard, settings: dict[str, Any]) -> bool:
    """Whether an earlier run has finished a shard, and it has not changed since; a remote one is not asked."""
    try:
        _, header = read_partial(shard.partial)
    except ARROW_ERRORS:
        return False
    facts = header["shard"]
    if not is_remote(shard.location):
        now = Path(shard.location).stat()
        if (facts["size"], facts["mtime_ns"]) != (now.st_size, now.st_mtime_ns):
            return False
    return facts["name"] == shard.name and header["settings"] == settings
