"""Held-out samples made ready once: compiled, shared out among processes, their frames kept as long as they fit.

Shape suffixes: F frames of a sample, C colour channels, H, W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist

from moss_train.errors import DataError, SampleError
from moss_train.evaluate.schedule import Schedule, read_stream
from moss_train.evaluate.transcript import StreamTranscript
from moss_train.parallel import groups
from moss_train.parallel.agreement import told_by_first
from moss_train.parallel.phases import beat
from moss_train.streams.compiled import CompiledStream, FrameRequest
from moss_train.streams.compiler import compile_sample
from moss_train.streams.config import CompilerConfig
from moss_train.streams.media import MediaInfo
from moss_train.streams.schema import Sample, StreamSample
from moss_train.streams.tokenizer import StreamTokenizer

_MB = 1e6


class Corpus(Protocol):
    """What evaluation reads of a source, sample by sample; `moss_train.data.corpus` has the packed one."""

    def __len__(self) -> int: ...

    def key(self, number: int) -> str: ...

    def sample(self, number: int) -> Sample: ...

    def media_info(self, number: int) -> dict[str, MediaInfo]: ...

    def frames(self, number: int, requests: Sequence[FrameRequest]) -> torch.Tensor: ...


class FrameCache:
    """The frames of a corpus, uint8 [F, C, H, W], each sample's kept from when it was first decoded on, as long as all
    that is kept takes no more than `cache_mb` MB. What does not fit is decoded anew each time: since every evaluation
    reads the samples in the same order, to put the oldest out would keep none that is needed next."""

    def __init__(self, corpus: Corpus, cache_mb: float):
        self.corpus = corpus
        self._room = cache_mb * _MB
        self._kept: dict[tuple[int, tuple[FrameRequest, ...]], torch.Tensor] = {}

    def frames(self, number: int, requests: tuple[FrameRequest, ...]) -> torch.Tensor:
        """SampleError when they cannot be decoded."""
        found = self._kept.get((number, requests))
        if found is None:
            found = self.corpus.frames(number, requests)
            size = found.numel() * found.element_size()
            if size <= self._room:
                self._room -= size
                self._kept[number, requests] = found
        return found


def _frames_of_first(
    cache: FrameCache, group: dist.ProcessGroup, number: int, requests: tuple[FrameRequest, ...]
) -> torch.Tensor:
    """`cache.frames` of the first process of `group`, on all of them: each sample is decoded once, and all leave out
    the same. Every process of the group must call it alike; SampleError on all when the first cannot decode them."""
    frames, told = None, None
    if group.rank() == 0:
        try:
            frames = cache.frames(number, requests)
            told = {"shape": list(frames.shape)}
        except SampleError as error:
            told = {"key": error.key, "reason": error.reason}
    told = told_by_first(told, group)
    if "reason" in told:
        raise SampleError(told["key"], told["reason"])
    device = groups.state().device
    sent = (
        torch.empty(told["shape"], dtype=torch.uint8, device=device)
        if frames is None
        else frames.to(device).contiguous()
    )
    if sent.numel():
        dist.broadcast(sent, group=group, group_src=0)
    return sent.cpu() if frames is None else frames


@dataclass(frozen=True)
class Share:
    """Which part of the samples this process evaluates: part `number` of `count`."""

    number: int = 0
    count: int = 1


class Lengthy(Protocol):
    """A compiled sample that can be put in a batch."""

    number: int  #: in its corpus
    compiled: CompiledStream

    @property
    def length(self) -> tuple[int, ...]:
        """Samples of similar length are run together."""
        ...


class Found(Protocol):
    """What one process found about its share."""

    skipped: dict[str, str]  #: key → why a sample was left out


Item = TypeVar("Item", bound=Lengthy)


@dataclass(frozen=True)
class PreparedStream:
    """One stream before its pictures are read."""

    number: int
    compiled: CompiledStream
    schedule: Schedule
    transcript: StreamTranscript

    @property
    def length(self) -> tuple[int, ...]:
        return len(self.schedule.steps), len(self.compiled.ids)


@dataclass(frozen=True)
class PreparedCorpus(Generic[Item]):
    """The samples of a corpus that can be evaluated, in its order. The same on every process."""

    items: list[Item]
    skipped: dict[str, str]  #: key → why the sample could not be compiled
    compiler: CompilerConfig  #: without what is random
    cache: FrameCache

    def frames_of(self, key: str) -> torch.Tensor:
        """uint8 [F, C, H, W]: the frames of the sample with this key. SampleError when they cannot be decoded."""
        item = next(item for item in self.items if item.compiled.key == key)
        return self.cache.frames(item.number, item.compiled.frames)

    def batches(
        self,
        share: Share,
        size: int,
        skipped: dict[str, str],
        group: dist.ProcessGroup | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[list[Item], list[torch.Tensor]]]:
        """The samples of a share with their frames, those of similar length together, the longest first, so that memory
        runs out at once or never. Those that do not decode are left out and put into `skipped`. `group`: processes that
        go through the same share in lockstep, for all of which the first decodes. `on_progress(done, total)` is called
        when the next batch is asked for."""
        ordered = sorted(self.items, key=lambda item: tuple(-length for length in item.length))
        ordered = ordered[share.number :: share.count]
        done = 0
        for start in range(0, len(ordered), size):
            batch, frames = [], []
            for item in ordered[start : start + size]:
                beat()
                try:
                    wanted = item.number, item.compiled.frames
                    frames.append(_frames_of_first(self.cache, group, *wanted) if group else self.cache.frames(*wanted))
                    batch.append(item)
                except SampleError as error:
                    skipped[item.compiled.key] = error.reason
            if batch:
                yield batch, frames
                done += len(batch)
                if on_progress is not None:
                    on_progress(done, len(ordered))

    def left_out(self, runs: Sequence[Found], failure: str | None) -> dict[str, str]:
        """Key → why a sample was left out, of all shares together. `failure`: what to say when nothing was found, which
        is a DataError."""
        skipped = dict(sorted((self.skipped | {k: v for run in runs for k, v in run.skipped.items()}).items()))
        if failure is not None:
            key, reason = next(iter(skipped.items()))
            raise DataError(f"{failure}; the first, {key!r}: {reason}")
        return skipped


def prepare(
    corpus: Corpus,
    tokenizer: StreamTokenizer,
    compiler: CompilerConfig,
    schema: type[Sample],
    make: Callable[[Any, int, CompiledStream, CompilerConfig], Item],
    what: str,
    limit: int | None = None,
    cache: FrameCache | None = None,
    cache_mb: float = 0,
) -> PreparedCorpus[Item]:
    """The first `limit` samples of a schema; those of others are left out. `make(sample, number, compiled, compiler)`
    makes of each what is evaluated, and may raise SampleError.

    Nothing is drawn at random (jitter, windows, augmentations), whatever `compiler` says: every model is asked the
    same. Raises DataError when there is not a single `what` in the corpus, whole or damaged.
    """
    compiler = compiler.plain()
    items: list[Item] = []
    skipped: dict[str, str] = {}
    for number in range(len(corpus)):
        if limit is not None and len(items) == limit:
            break
        beat()
        try:
            sample = corpus.sample(number)
            if isinstance(sample, schema):
                compiled = compile_sample(sample, corpus.media_info(number), tokenizer, compiler)
                items.append(make(sample, number, compiled, compiler))
        except SampleError as error:
            skipped[corpus.key(number)] = error.reason
    if not items and not skipped:
        raise DataError(f"the source holds no {what} to evaluate: name one with such samples")
    return PreparedCorpus(items, skipped, compiler, cache or FrameCache(corpus, cache_mb))


def prepare_streams(
    corpus: Corpus,
    tokenizer: StreamTokenizer,
    compiler: CompilerConfig,
    limit: int | None = None,
    cache: FrameCache | None = None,
    cache_mb: float = 0,
) -> PreparedCorpus[PreparedStream]:
    """The streams of a corpus, see `prepare`."""

    def make(sample: StreamSample, number: int, compiled: CompiledStream, compiler: CompilerConfig) -> PreparedStream:
        return PreparedStream(number, compiled, *read_stream(sample, compiled, compiler, tokenizer))

    what = "stream (schema moss_train/stream@1)"
    return prepare(corpus, tokenizer, compiler, StreamSample, make, what, limit, cache, cache_mb)
