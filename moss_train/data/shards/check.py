"""`data check`: is every sample of a packed source whole, well formed, decodable and true to its media?

Everything is looked at again: each member's bytes against their digest, the rows of the index against its fingerprint,
the samples against their schema and their media, the pictures by decoding them.
"""

import json
import os
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from moss_train.data.config import DataConfig
from moss_train.data.corpus import Corpus
from moss_train.data.decoding.decode import DecodedArrays
from moss_train.data.decoding.describe import DescribeJob
from moss_train.data.decoding.pool import DecodePool
from moss_train.data.decoding.probe import MediaProbe
from moss_train.data.progress import progress_bar
from moss_train.data.shards.index import SourceIndex, facts_digest_of, load_index
from moss_train.data.shards.index_build import build_index
from moss_train.data.shards.index_rows import ContentDigest, IndexedSample
from moss_train.data.shards.storage import ShardStore
from moss_train.errors import ConfigError, DataError, SampleError
from moss_train.streams.compiled import FrameRequest
from moss_train.streams.config import CompilerConfig, TokenizerConfig
from moss_train.streams.schema import Sample
from moss_train.streams.split import RowBudget
from moss_train.streams.tokenizer import load_tokenizer

DECODE_MODES = ("none", "ends", "all")
#: how far a listed duration may be from the medium's own: containers round to a frame
DURATION_SLACK_S = 0.25
#: samples whose members are read and decoded ahead of the one that is reported next
_AHEAD = 32


@dataclass
class CheckOptions:
    """Options of `data check`."""

    path: str
    """Folder or URL of shards; need not have been packed by us, and may lack an index."""
    ledger: str | None = None
    """A quarantine ledger: only the samples that it lists are checked, and it is said which of them are fine now."""
    decode: str | None = None
    """`none`; `ends`: the first, middle and last picture of every medium; `all`: every picture that training shows.
    Null: `all` of what a ledger lists, else `ends`."""
    show: int = 20
    """Problems to list; all are counted."""
    workers: int = 0
    """Processes that read and decode; one that crashes or hangs over a file is replaced. 0: one for each core."""
    decode_timeout_s: float = 60.0
    """How long one of them may take over one medium; seconds."""
    decode_memory_mb: int = 8192
    """Most memory of one of them, in MiB."""
    pack_text_tokens: int | None = None
    """With `pack_frames`: the budget that cuts long streams (`data.over_budget=split`), so that they are no problem;
    null: streams have to fit whole."""
    pack_frames: int | None = None
    """See `pack_text_tokens`."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Every sample is compiled, with this tokenizer."""
    compiler: CompilerConfig = field(default_factory=CompilerConfig)
    """Frame rate and limits under which the samples are compiled."""

    def validate(self) -> None:
        if self.decode not in (None, *DECODE_MODES):
            raise ConfigError(f"decode={self.decode!r} is not one of {', '.join(DECODE_MODES)}")
        if self.workers < 0:
            raise ConfigError(f"workers={self.workers} must not be negative")
        self.budget()
        self.tokenizer.validate()
        self.compiler.validate()

    def budget(self) -> RowBudget | None:
        return RowBudget.of(self.pack_text_tokens, self.pack_frames)

    def data(self) -> DataConfig:
        """The settings of decoding: by the reader that reports damaged pictures."""
        return DataConfig(
            decoder="pyav", decode_timeout_s=self.decode_timeout_s, decode_memory_mb=self.decode_memory_mb
        )


@dataclass(frozen=True)
class Problem:
    """One fault of a source; `key` is empty when it is the shard's or the index's."""

    shard: str
    key: str
    what: str


@dataclass
class CheckResult:
    """What was found."""

    problems: list[Problem] = field(default_factory=list)
    totals: Counter[str] = field(default_factory=Counter)  #: shards, samples, tokens, frames, seconds
    kinds: Counter[str] = field(default_factory=Counter)  #: samples by kind
    media: Counter[str] = field(default_factory=Counter)  #: media by container and codec
    readers: Counter[str] = field(default_factory=Counter)  #: media by the reader that decoded them
    notes: Counter[str] = field(default_factory=Counter)  #: why decord was passed over
    fine: dict[str, str] = field(default_factory=dict)  #: of a ledger: key → its reason, of samples without a problem

    def on_fault(self, shard: str, error: DataError) -> None:
        self.problems.append(Problem(shard.rpartition("/")[2], "", str(error)))

    def table(self) -> list[tuple[str, float]]:
        """(label, figure) of every line that is printed."""
        rows = list(self.totals.items())
        for title, figures in (("", self.kinds), ("", self.media), ("decoded by ", self.readers), ("", self.notes)):
            rows += [(f"  {title}{name}", count) for name, count in sorted(figures.items())]
        return [*rows, ("problems", len(self.problems))]


def check_command(options: CheckOptions) -> int:
    """Validate a source of shards, or with ledger=… what was quarantined of it; exit code 1 when there is any problem.

    Example: moss-train data check path=data/realtime ledger=outputs/run/realtime/quarantine.jsonl
    """
    result = check_source(options, progress=True)
    for label, value in result.table():
        print(f"{label:<46}{value:>12.1f}" if isinstance(value, float) else f"{label:<46}{value:>12}")
    for key, reason in result.fine.items():
        print(f"  fine now: {key} (was: {reason})")
    for problem in result.problems[: options.show]:
        print(f"  {problem.shard}  {problem.key or '-'}  {problem.what}")
    if len(result.problems) > options.show:
        print(f"  … and {len(result.problems) - options.show} more (show=… lists more)")
    return 1 if result.problems else 0


def check_source(options: CheckOptions, progress: bool = False) -> CheckResult:
    """Check every shard and every sample. Raises DataError only when there is no shard at all, or no ledger."""
    result, data = CheckResult(), options.data()
    workers = options.workers or os.cpu_count() or 1
    name = options.path.rstrip("/").rpartition("/")[2]
    listed = _read_ledger(Path(options.ledger)) if options.ledger is not None else None
    with ExitStack() as stack:
        store = stack.enter_context(closing(ShardStore.of(data)))
        try:
            index = load_index(options.path, store)
            if listed is None:
                _check_index(index, name, result)
        except DataError as error:
            result.problems.append(Problem(name, "", str(error)))
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            index = build_index(options.path, scratch, workers, progress, None, data, store, result.on_fault)
        corpus = Corpus(name, index, load_tokenizer(options.tokenizer), options.compiler, 64, data, store)
        pool = stack.enter_context(closing(DecodePool.of(data, workers, store)))
        numbers: Iterable[int] = range(len(index))
        if listed is not None:
            own = {key: reason for key, (fingerprint, reason) in listed.items() if fingerprint == index.fingerprint}
            if len(own) < len(listed):
                result.totals["listed of other data"] = len(listed) - len(own)
            numbers = [number for key in own if (number := _find(index, key)) is not None]
            result.totals["listed samples"] = len(own)
        else:
            result.totals["shards"] = len(index.shards)
        result.totals["samples"] = len(numbers)
        how = _How(options.decode or ("ends" if listed is None else "all"), options.budget(), pool)
        for checked in _checked(corpus, progress_bar(numbers, f"checking {name}", progress), how):
            checked.report(result)
        if listed is not None:
            bad = {problem.key for problem in result.problems}
            result.fine = {key: own[key] for key in index.keys(list(numbers)) if key not in bad}
    return result


def _read_ledger(path: Path) -> dict[str, tuple[str, str]]:
    """key → fingerprint of the source and reason, of what a ledger lists. Raises DataError when it cannot be read."""
    listed = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            listed[str(entry["key"])] = str(entry["fingerprint"]), str(entry["reason"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"ledger={path} cannot be read as a quarantine ledger ({error})") from error
    return listed


def _find(index: SourceIndex, key: str) -> int | None:
    """The number of a listed sample; None when it belongs to another source of the run."""
    try:
        return index.number(key)
    except KeyError:
        return None


def _check_index(index: SourceIndex, name: str, result: CheckResult) -> None:
    """The rows of an index against its digests."""
    facts, numbers = [], iter(range(len(index)))
    for shard in index.shards:
        digest = ContentDigest()
        for _, number in zip(range(shard.samples), numbers, strict=False):
            digest.add(index.sample(number))
        facts.append(digest.facts)
        if digest.contents != shard.digest:
            result.problems.append(Problem(shard.name, "", "its rows in the index do not fit their digest"))
    if facts_digest_of(facts) != index.facts_digest:
        result.problems.append(Problem(name, "", "the facts of its media in the index do not fit their digest"))


@dataclass(frozen=True)
class _How:
    """How samples are checked."""

    decode: str  #: one of DECODE_MODES
    budget: RowBudget | None
    pool: DecodePool


def _checked(corpus: Corpus, numbers: Iterable[int], how: _How) -> "Iterator[_Checked]":
    """Every sample, checked; the pictures of the next ones are decoded meanwhile."""
    waiting: deque[_Checked] = deque()
    for number in numbers:
        waiting.append(_Checked(corpus, number, how))
        if len(waiting) > _AHEAD:
            yield waiting.popleft()
    yield from waiting


class _Checked:
    """One sample: what is known at once, and what its members and pictures will say."""

    def __init__(self, corpus: Corpus, number: int, how: _How):
        self._entry = entry = corpus.entry(number)
        self._shard = corpus.index.shards[entry.shard].name.rpartition("/")[2]
        self._faults: list[str] = []
        self._totals: Counter[str] = Counter()
        self._media: Counter[str] = Counter()
        self._members = {name: how.pool.submit(_digest_job(corpus, entry, name)) for name in entry.members}
        self._pictures: list[Future[DecodedArrays]] = []
        try:
            self._look(corpus, number, how)
        except (SampleError, DataError) as error:
            self._faults.append(error.reason if isinstance(error, SampleError) else str(error))

    def _look(self, corpus: Corpus, number: int, how: _How) -> None:
        entry, sample = self._entry, corpus.sample(number)
        unused = sorted(set(entry.media) - {medium.member for medium in sample.media})
        if unused:
            self._faults.append(f"{', '.join(unused)} is packed but not listed in the JSON")
        for medium in sample.media:
            facts = entry.media.get(medium.member)
            if not isinstance(facts, MediaProbe):
                continue  # compiling names it
            self._media[f"{facts.container} {facts.codec}"] += 1
            self._totals["seconds of video"] += facts.duration_s
            if medium.duration_s is not None and abs(medium.duration_s - facts.duration_s) > DURATION_SLACK_S:
                self._faults.append(
                    f"medium {medium.id!r} is listed with {medium.duration_s} s and has {facts.duration_s:.3f} s"
                )
        self._faults += _times_outside(sample, entry)
        for part in corpus.compile_all(number, how.budget):
            self._totals["text tokens"] += len(part.ids)
            self._totals["frames"] += len(part.frames)
            if how.decode == "all":
                self._decode(corpus, number, part.frames, how.pool)
        if how.decode == "ends":
            for medium in sample.media:
                end = entry.media[medium.member].duration_s
                ends = [FrameRequest(medium.id, time_s) for time_s in (0.0, end / 2, end)]
                self._decode(corpus, number, ends, how.pool)

    def _decode(self, corpus: Corpus, number: int, requests: Iterable[FrameRequest], pool: DecodePool) -> None:
        self._pictures += [pool.submit(job) for job, _ in corpus.decode_jobs(number, list(requests))]

    def report(self, result: CheckResult) -> None:
        """Wait for what is still looked at, and add everything to `result`."""
        result.kinds[self._entry.kind] += 1
        result.totals.update(self._totals)
        result.media.update(self._media)
        for name, future in self._members.items():
            try:
                if future.result().digest != self._entry.members[name].digest:
                    self._faults.append(f"the bytes of {name} differ from those that were indexed")
            except (SampleError, DataError) as error:
                self._faults.append(error.reason if isinstance(error, SampleError) else str(error))
        for picture in self._pictures:
            try:
                decoded = picture.result()
                result.readers[decoded.backend] += 1
                if decoded.note:
                    result.notes[decoded.note] += 1
            except (SampleError, DataError) as error:
                self._faults.append(error.reason if isinstance(error, SampleError) else str(error))
        for what in dict.fromkeys(self._faults):
            result.problems.append(Problem(self._shard, self._entry.key, what))


def _digest_job(corpus: Corpus, entry: IndexedSample, name: str) -> DescribeJob:
    member, shard = entry.members[name], corpus.index.shards[entry.shard]
    location = corpus.index.shard_location(entry.shard)
    return DescribeJob(entry.key, location, member.offset, member.size, "other", 0, None, shard.size)


def _times_outside(sample: Sample, entry: IndexedSample) -> list[str]:
    """Sampling ranges that reach beyond their videos."""
    end = getattr(sample.sampling, "end_s", None)
    if end is None:
        return []
    videos = [(medium, entry.media.get(medium.member)) for medium in sample.media if medium.kind == "video"]
    return [
        f"sampling.end_s={end} lies beyond medium {medium.id!r}, which has {facts.duration_s:.3f} s"
        for medium, facts in videos
        if isinstance(facts, MediaProbe) and end > facts.duration_s + DURATION_SLACK_S
    ]
