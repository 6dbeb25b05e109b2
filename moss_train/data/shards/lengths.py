"""How long the streams of a source are, so that batches are planned without reading a sample.

What the order deals in are units: a sample, or one part of a sample that was split. Their lengths are exact: every
sample is compiled once for each index, tokenizer, compiler settings and budget, in processes of their own, and the
table is kept as `lengths-<digest>.arrow` beside the index (where nothing can be written there, in the user's cache
folder). Where augmentations change lengths (`compiler.augment`), the table holds those of every variant too, whose
content depends on the seed of the run.
"""

import fcntl
import hashlib
import json
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moss_train.data.corpus import Corpus
from moss_train.data.decoding.describe import save_tokenizer
from moss_train.data.decoding.job import run_job
from moss_train.data.decoding.pool import DecodePool
from moss_train.data.progress import progress_bar
from moss_train.data.shards.arrow_file import ARROW_ERRORS, open_arrow, write_arrow
from moss_train.data.shards.index import INDEX_NAME
from moss_train.data.shards.measure import Measured, MeasureJob
from moss_train.data.shards.storage import default_cache_dir, is_remote, join
from moss_train.errors import SampleError
from moss_train.streams.config import CompilerConfig
from moss_train.streams.split import RowBudget

LENGTHS_SCHEMA = "moss_train/lengths@1"
#: raised when the compiler begins to give other lengths for the same settings
LENGTHS_VERSION = 1
#: settings of the compiler on which no length depends
LENGTHLESS = (
    "jitter_probability",
    "jitter_shifts",
    "visibility",
    "window",
    "sinks",
    "text_window",
    "text_sinks",
    "positions",
    "train_turn_end_offline",
    "train_turn_end_streams",
    "stale_silence_guard",
    "confirmation_weight",
)
#: those of `compiler.augment`
LENGTHLESS_AUGMENTATIONS = (
    "window_range",
    "sink_range",
    "text_window_range",
    "text_sink_range",
    "keep_silence",
    "keep_silence_within_s",
)
#: samples of one job
_JOB_SAMPLES = 64
#: sources with fewer samples are measured at once, before a process would have started
_FEW_SAMPLES = 256
_COLUMNS = {"sample": pa.int32(), "part": pa.int16(), "tokens": pa.int32(), "frames": pa.int32()}


@dataclass(frozen=True)
class Lengths:
    """Lengths of all units of a source, in the order of the index."""

    samples: np.ndarray  #: int32 [U], sample number of each unit, ascending
    parts: np.ndarray  #: int16 [U], which part of its sample it is
    tokens: np.ndarray  #: int32 [U], text tokens, anchors included
    frames: np.ndarray  #: int32 [U]
    variant_tokens: np.ndarray  #: int32 [U, K], of the K variants; one that cannot be made is the unit itself
    variant_frames: np.ndarray  #: int32 [U, K]
    faults: dict[int, str]  #: sample number → why it does not compile; such a sample has no unit
    digest: str  #: of the settings and of the arrays


def lengths_of(
    corpus: Corpus, budget: RowBudget | None = None, workers: int = 0, progress: bool = False, seed: int = 0
) -> Lengths:
    """The lengths of a source: those that are stored, else they are measured by `workers` processes (0: in this one)
    and stored.

    `budget` splits streams that are longer; without it each sample that compiles has one unit. `seed` is that of the
    run; only variants depend on it. Several processes of a machine that ask at once measure once. Raises DataError for
    shards that cannot be read.
    """
    stored = stored_lengths(corpus, budget, seed)
    if stored is not None:
        return stored
    settings = _settings(corpus, budget, seed)
    with _only_one(settings):
        stored = stored_lengths(corpus, budget, seed)
        if stored is None:
            columns, faults = _measure(corpus, budget, workers, progress, seed)
            stored = _lengths(settings, columns, faults)
            _store(corpus, settings, columns, stored)
    return stored


def stored_lengths(corpus: Corpus, budget: RowBudget | None = None, seed: int = 0) -> Lengths | None:
    """The lengths of a source if they were measured before; a damaged table counts as none."""
    settings, rows = _settings(corpus, budget, seed), _rows(corpus.compiler)
    for folder in _folders(corpus):
        try:
            reader, header = open_arrow(folder / _file_name(settings), rows, LENGTHS_SCHEMA)
            table = reader.read_all()
            table.validate()
            columns = [table.column(name).to_numpy() for name in rows.names]
            lengths = _lengths(settings, columns, {int(number): reason for number, reason in header["faults"]})
            if lengths.digest == header["digest"] and header["settings"] == settings:
                return lengths
        except ARROW_ERRORS:
            continue
    return None


def _rows(compiler: CompilerConfig) -> pa.Schema:
    """The columns of the table."""
    columns = dict(_COLUMNS)
    for variant in range(1, 1 + compiler.augment.measured_variants):
        columns |= {f"tokens_{variant}": pa.int32(), f"frames_{variant}": pa.int32()}
    return pa.schema(list(columns.items()))


def _settings(corpus: Corpus, budget: RowBudget | None, seed: int) -> dict[str, Any]:
    """Everything on which the lengths depend."""
    if corpus.tokenizer is None:
        raise ValueError("this corpus was opened without a tokenizer, so its streams have no lengths")
    compiler = asdict(corpus.compiler)
    augment = compiler.pop("augment")
    variants = None
    if corpus.compiler.augment.measured_variants:
        variants = {name: value for name, value in augment.items() if name not in LENGTHLESS_AUGMENTATIONS}
        variants["seed"] = seed
    return {
        "version": LENGTHS_VERSION,
        "index": corpus.index.fingerprint,
        "facts": corpus.index.facts_digest,
        "tokenizer": corpus.tokenizer.fingerprint,
        "compiler": {name: value for name, value in compiler.items() if name not in LENGTHLESS},
        "variants": variants,
        "budget": asdict(budget) if budget is not None else None,
    }


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _file_name(settings: dict[str, Any]) -> str:
    return f"lengths-{_digest(settings)[:16]}.arrow"


def _folders(corpus: Corpus) -> list[Path]:
    """Where tables of lengths are kept, the best place first."""
    cache = default_cache_dir().parent / "lengths"
    return [cache] if is_remote(corpus.index.location) else [Path(corpus.index.location), cache]


def _lengths(settings: dict[str, Any], columns: list[np.ndarray], faults: dict[int, str]) -> Lengths:
    digest = hashlib.sha256(_digest(settings).encode())
    for column in columns:
        digest.update(np.ascontiguousarray(column).data)
    own, variants = columns[: len(_COLUMNS)], columns[len(_COLUMNS) :]
    units = len(own[0])
    tokens, frames = (
        np.stack(part, axis=1) if part else np.zeros((units, 0), np.int32) for part in (variants[::2], variants[1::2])
    )
    return Lengths(*own, tokens, frames, faults, digest.hexdigest())


def _store(corpus: Corpus, settings: dict[str, Any], columns: list[np.ndarray], lengths: Lengths) -> None:
    header = {
        "schema": LENGTHS_SCHEMA,
        "digest": lengths.digest,
        "settings": settings,
        "faults": list(lengths.faults.items()),
    }
    rows = _rows(corpus.compiler)
    batch = pa.RecordBatch.from_arrays([pa.array(column) for column in columns], schema=rows)
    *others, last = _folders(corpus)
    for folder in others:
        try:
            return write_arrow(folder / _file_name(settings), rows, [batch], header)
        except OSError:
            continue  # a source that may only be read
    last.mkdir(parents=True, exist_ok=True)
    write_arrow(last / _file_name(settings), rows, [batch], header)


@contextmanager
def _only_one(settings: dict[str, Any]) -> Iterator[None]:
    """One process of this machine at a time."""
    path = Path(tempfile.gettempdir()) / f"moss_train-{os.getuid()}-lengths-{_digest(settings)[:16]}.lock"
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        path.unlink(missing_ok=True)  # whoever waits holds the file and finds the lengths stored


def _measure(
    corpus: Corpus, budget: RowBudget | None, workers: int, progress: bool, seed: int
) -> tuple[list[np.ndarray], dict[int, str]]:
    """The columns of the table, and the faults."""
    kinds = [field.type.to_pandas_dtype() for field in _rows(corpus.compiler)]
    columns: list[list[np.ndarray]] = [[] for _ in kinds]
    faults: dict[int, str] = {}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_tokenizer(corpus.tokenizer, scratch / "tokenizer.json")
        if is_remote(corpus.index.location):  # the jobs open the index file, which a small cache may have let go
            stack.enter_context(corpus.store.held(join(corpus.index.location, INDEX_NAME)))
        jobs = _jobs(corpus, budget, str(scratch / "tokenizer.json"), seed)
        pool = None
        if workers and len(corpus) >= _FEW_SAMPLES:
            pool = stack.enter_context(closing(DecodePool.of(corpus.data, workers, corpus.store)))
        for measured in _measured(progress_bar(jobs, f"measuring {corpus.name}", progress), corpus, pool):
            faults |= measured.faults
            units = np.array(measured.units, np.int64).reshape(-1, len(kinds))
            for column, values, kind in zip(columns, units.T, kinds, strict=True):
                column.append(values.astype(kind))
    whole = [np.concatenate([np.zeros(0, kind), *column]) for column, kind in zip(columns, kinds, strict=True)]
    return whole, faults


def _jobs(corpus: Corpus, budget: RowBudget | None, tokenizer: str, seed: int) -> list[MeasureJob]:
    """All samples in runs that lie in one shard."""
    index, jobs = corpus.index, []
    starts = np.flatnonzero(np.diff(index.shard_numbers, prepend=-1)).tolist()
    for start, end in zip(starts, [*starts[1:], len(index)], strict=True):
        shard = int(index.shard_numbers[start])
        for first in range(start, end, _JOB_SAMPLES):
            jobs.append(
                MeasureJob(
                    key=index.key(first),
                    shard=index.shard_location(shard),
                    shard_size=index.shards[shard].size,
                    index=str(index.path),
                    start=first,
                    end=min(first + _JOB_SAMPLES, end),
                    tokenizer=tokenizer,
                    compiler=corpus.compiler,
                    budget=budget,
                    seed=seed,
                )
            )
    return jobs


def _measured(jobs: Iterable[MeasureJob], corpus: Corpus, pool: DecodePool | None) -> Iterator[Measured]:
    """What the jobs give, in their order."""
    if pool is None:
        for job in jobs:
            yield run_job(job, corpus.store)
        return
    waiting: deque[tuple[MeasureJob, Future[Measured]]] = deque()
    for job in jobs:
        waiting.append((job, pool.submit(job)))
        if len(waiting) > 4 * pool.workers:
            yield from _finished(*waiting.popleft(), pool)
    for job, future in waiting:
        yield from _finished(job, future, pool)


def _finished(job: MeasureJob, future: "Future[Measured]", pool: DecodePool) -> Iterator[Measured]:
    """The result of a job. One that ended its process is done again in halves, until the sample to blame is alone."""
    try:
        yield future.result()
    except SampleError as error:
        if job.end - job.start == 1:
            yield Measured([], {job.start: error.reason})
            return
        middle = (job.start + job.end) // 2
        for half in (replace(job, end=middle), replace(job, start=middle)):
            yield from _finished(half, pool.submit(half), pool)
