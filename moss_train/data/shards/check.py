"""`data check`: is every sample of a packed source whole, well formed, decodable and true to its media?"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from moss_train.data.corpus import Corpus
from moss_train.data.decoding.decode import DecodedArrays
from moss_train.data.decoding.job import run_job
from moss_train.data.decoding.probe import MediaProbe
from moss_train.data.progress import progress_bar
from moss_train.data.shards.index import (
    IndexedSample,
    ShardFacts,
    SourceIndex,
    describe_sample,
    load_index,
    scan_shard,
    shard_files,
)
from moss_train.errors import ConfigError, DataError, SampleError
from moss_train.streams.compiled import FrameRequest
from moss_train.streams.config import CompilerConfig, TokenizerConfig
from moss_train.streams.schema import Sample
from moss_train.streams.tokenizer import load_tokenizer

DECODE_MODES = ("none", "ends", "all")
#: how far a listed duration may be from the medium's own: containers round to a frame
DURATION_SLACK_S = 0.25


@dataclass
class CheckOptions:
    """Options of `data check`."""

    path: str
    """Folder of shards; need not have been packed by us, and may lack an index."""
    decode: str = "ends"
    """`none`; `ends`: the first, middle and last picture of every medium; `all`: every picture that training shows."""
    show: int = 20
    """Problems to list; all are counted."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Every sample is compiled, with this tokenizer."""
    compiler: CompilerConfig = field(default_factory=CompilerConfig)
    """Frame rate and limits under which the samples are compiled."""

    def validate(self) -> None:
        if self.decode not in DECODE_MODES:
            raise ConfigError(f"decode={self.decode!r} is not one of {', '.join(DECODE_MODES)}")
        self.tokenizer.validate()
        self.compiler.validate()


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

    def table(self) -> list[tuple[str, float]]:
        """(label, figure) of every line that is printed."""
        rows = list(self.totals.items())
        for title, figures in (("", self.kinds), ("", self.media), ("decoded by ", self.readers), ("", self.notes)):
            rows += [(f"  {title}{name}", count) for name, count in sorted(figures.items())]
        return [*rows, ("problems", len(self.problems))]


def check_command(options: CheckOptions) -> int:
    """Validate a folder of shards; exit code 1 when there is any problem."""
    result = check_source(options, progress=True)
    for label, value in result.table():
        print(f"{label:<46}{value:>12.1f}" if isinstance(value, float) else f"{label:<46}{value:>12}")
    for problem in result.problems[: options.show]:
        print(f"  {problem.shard}  {problem.key or '-'}  {problem.what}")
    if len(result.problems) > options.show:
        print(f"  … and {len(result.problems) - options.show} more (show=… lists more)")
    return 1 if result.problems else 0


def check_source(options: CheckOptions, progress: bool = False) -> CheckResult:
    """Check every shard and every sample. Raises DataError only when there is no shard at all."""
    folder = Path(options.path)
    result = CheckResult()
    try:
        index = load_index(folder)
    except DataError as error:
        result.problems.append(Problem(folder.name, "", str(error)))
        index = _scan_leniently(folder, result)
    corpus = Corpus(folder.name, index, load_tokenizer(options.tokenizer), options.compiler, 64, "auto", 40_000_000)
    result.totals["shards"] = len(index.shards)
    result.totals["samples"] = len(index.samples)
    for entry in progress_bar(index.samples, "checking", progress):
        result.kinds[entry.kind] += 1
        _check_sample(corpus, entry, options.decode, result)
    return result


def _scan_leniently(folder: Path, result: CheckResult) -> SourceIndex:
    """An index in memory of the shards that can be read; the others become problems."""
    shards: list[ShardFacts] = []
    samples: dict[str, IndexedSample] = {}
    for path in shard_files(folder):
        number = len(shards)
        shards.append(ShardFacts(path.name, path.stat().st_size, 0, ""))
        try:
            for key, members in scan_shard(path):
                if key in samples:
                    result.problems.append(Problem(path.name, key, "the key is used twice, or its parts lie apart"))
                else:
                    samples[key] = describe_sample(path, number, key, members)
        except DataError as error:
            result.problems.append(Problem(path.name, "", str(error)))
    return SourceIndex(folder, tuple(shards), tuple(samples.values()), "")


def _check_sample(corpus: Corpus, entry: IndexedSample, decode: str, result: CheckResult) -> None:
    shard = corpus.shard_name(entry.key)

    def problem(what: str) -> None:
        result.problems.append(Problem(shard, entry.key, what))

    try:
        sample = corpus.sample(entry.key)
    except SampleError as error:
        problem(error.reason)
        return
    unused = sorted(set(entry.media) - {medium.member for medium in sample.media})
    if unused:
        problem(f"{', '.join(unused)} is packed but not listed in the JSON")
    for medium in sample.media:
        facts = entry.media.get(medium.member)
        if not isinstance(facts, MediaProbe):
            continue  # compiling names it
        result.media[f"{facts.container} {facts.codec}"] += 1
        result.totals["seconds of video"] += facts.duration_s
        if medium.duration_s is not None and abs(medium.duration_s - facts.duration_s) > DURATION_SLACK_S:
            problem(f"medium {medium.id!r} is listed with {medium.duration_s} s and has {facts.duration_s:.3f} s")
    for what in _times_outside(sample, entry):
        problem(what)
    try:
        compiled = corpus.compile(entry.key)
        result.totals["text tokens"] += len(compiled.ids)
        result.totals["frames"] += len(compiled.frames)
        if decode == "all":
            for job, _ in corpus.decode_jobs(entry.key, compiled.frames):
                _count(run_job(job), result)
        elif decode == "ends":
            for medium in sample.media:
                end = entry.media[medium.member].duration_s
                ends = [FrameRequest(medium.id, time_s) for time_s in (0.0, end / 2, end)]
                for job, _ in corpus.decode_jobs(entry.key, ends):
                    _count(run_job(job), result)
    except (SampleError, DataError) as error:
        problem(error.reason if isinstance(error, SampleError) else str(error))


def _count(decoded: DecodedArrays, result: CheckResult) -> None:
    result.readers[decoded.backend] += 1
    if decoded.note:
        result.notes[decoded.note] += 1


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
