"""Decoded frames, once per clip and request: a bounded cache in the training process, decoder processes for the rest.

    store = FrameStore(pool, cache_mb)                  # pool None: decodes in this process, when a result is asked for
    pending = store.request_all([FrameWant(corpus, number, requests), …])   # those of one step, together
    frames = pending[0].result()                        # uint8 [F, 3, S, S]; waits; raises SampleError
    store.request(corpus, number, requests).result()                        # one alone
    store.close()

Clips are known by their content (the digest of their bytes), so equal clips of different samples are decoded once.
Wants of one call that need the same clip are decoded in one pass over it, however much their times differ.

The pixels of a want are a function of the clip's bytes, the reader and the want's own times, never of what else was
asked or cached: a reader gives the same picture for a time whatever the other times are, and where it fails, or another
reader has to take its place, each want is decoded by itself. What is cached answers the very same times only.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

import numpy as np
import torch

from moss_train.data.corpus import Corpus
from moss_train.data.decoding.decode import DecodedArrays
from moss_train.data.decoding.job import DecodeJob, Shards, run_job
from moss_train.data.decoding.pool import DecodeFailure, DecodePool
from moss_train.errors import SampleError
from moss_train.streams.compiled import FrameRequest

_Clip = tuple[bytes, str, int | None]  #: digest of the bytes, reader, image size
_CacheKey = tuple[_Clip, tuple[float, ...]]


@dataclass(frozen=True)
class FrameWant:
    """Frames of one sample."""

    corpus: Corpus
    number: int
    requests: Sequence[FrameRequest]


class PendingFrames:
    """Frames that are being decoded, or are decoded already."""

    def __init__(
        self,
        corpus: Corpus,
        key: str,
        parts: "list[_Part]",
        places: list[list[int]],
        error: SampleError | None = None,
    ):
        self._corpus = corpus
        self._key = key
        self._parts = parts
        self._places = places
        self._value: torch.Tensor | SampleError | None = error

    def result(self) -> torch.Tensor:
        """uint8 [F, 3, S, S]; waits for the decoder. Raises SampleError, the same one at every call."""
        if self._value is None:
            try:
                decoded = [part.result() for part in self._parts]
                self._value = self._corpus.assemble(decoded, self._places)
            except SampleError as error:
                self._value = _renamed(error, self._key)
            self._parts, self._places = [], []
        if isinstance(self._value, SampleError):
            raise self._value
        return self._value


class FrameStore:
    """Frames from the cache, from a decoding under way, or from a new one. Safe to use from several threads."""

    def __init__(self, pool: DecodePool | None, cache_mb: int):
        self.pool = pool
        self.decoded = 0  #: clips (requests of one) decoded so far
        self.cached = 0  #: clips served from the cache, or from a decoding that another want had begun
        self._room = cache_mb << 20
        self._bytes = 0
        self._lock = threading.Lock()
        self._cache: OrderedDict[_CacheKey, DecodedArrays] = OrderedDict()
        # A decoding that nobody waits for any more is forgotten with its last owner.
        self._under_way: WeakValueDictionary[_CacheKey, _Part] = WeakValueDictionary()

    def request(self, corpus: Corpus, number: int, requests: Sequence[FrameRequest]) -> PendingFrames:
        """The frames of one sample; decoding begins at once when there are decoder processes."""
        return self.request_all([FrameWant(corpus, number, requests)])[0]

    def request_all(self, wants: Sequence[FrameWant]) -> list[PendingFrames]:
        """The frames of several samples, in their order, with one pass over each clip. Raises no SampleError: the
        results do."""
        pending, passes = [], {}
        for want in wants:
            try:
                work = want.corpus.decode_jobs(want.number, want.requests)
            except SampleError as error:
                pending.append(PendingFrames(want.corpus, error.key, [], [], error))
                continue
            parts = [self._part(job, passes, want.corpus.store) for job, _ in work]
            key = work[0][0].key if work else ""
            pending.append(PendingFrames(want.corpus, key, parts, [places for _, places in work]))
        for clip_passes in passes.values():
            for clip_pass in clip_passes:
                clip_pass.begin(self.pool)
        return pending

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()

    def _part(self, job: DecodeJob, passes: "dict[_Clip, list[_Pass]]", store: Shards | None) -> "_Part":
        clip = (job.digest, job.decoder, job.image_size)
        cache_key = (clip, job.times_s)
        with self._lock:
            if cache_key in self._cache:
                self._cache.move_to_end(cache_key)
                self.cached += 1
                return _Part(self, cache_key, job, None, self._cache[cache_key])
            if cache_key in self._under_way:
                self.cached += 1
                return self._under_way[cache_key]
            clip_passes = passes.setdefault(clip, [])
            if not clip_passes or not clip_passes[-1].has_room(job):
                clip_passes.append(_Pass(store))
            part = _Part(self, cache_key, job, clip_passes[-1])
            clip_passes[-1].add(job)
            self._under_way[cache_key] = part
            return part

    def settle(self, cache_key: _CacheKey, value: DecodedArrays | SampleError) -> None:
        """A decoding has ended; keep its frames while there is room, the least recently used go first."""
        with self._lock:
            self._under_way.pop(cache_key, None)
            self.decoded += 1
            if isinstance(value, SampleError) or value.frames.nbytes > self._room:
                return
            self._cache[cache_key] = value
            self._bytes += value.frames.nbytes
            while self._bytes > self._room:
                _, oldest = self._cache.popitem(last=False)
                self._bytes -= oldest.frames.nbytes


def _renamed(error: SampleError, key: str) -> SampleError:
    """The error as one of the sample `key`: another one with the same clip may have asked first."""
    if error.key == key:
        return error
    failed = isinstance(error, DecodeFailure)
    own = DecodeFailure(key, error.reason, error.exception) if failed else SampleError(key, error.reason)
    own.__cause__ = error.__cause__
    return own


class _Part:
    """The pictures of one job: what one want asks of one clip."""

    def __init__(
        self,
        store: FrameStore,
        cache_key: _CacheKey,
        job: DecodeJob,
        clip_pass: "_Pass | None",
        value: DecodedArrays | None = None,
    ):
        self._store = store
        self._cache_key = cache_key
        self._job = job
        self._pass = clip_pass
        self._value: DecodedArrays | SampleError | None = value
        self._lock = threading.Lock()

    def result(self) -> DecodedArrays:
        with self._lock:
            if self._value is None:
                try:
                    self._value = self._pass.decoded(self._job)
                except SampleError as error:
                    self._value = error
                self._pass = None
                self._store.settle(self._cache_key, self._value)
        if isinstance(self._value, SampleError):
            raise self._value
        return self._value


class _Pass:
    """One pass over a clip for all jobs that need it."""

    def __init__(self, store: Shards | None) -> None:
        self._store = store  # fetches remote shards where there is no pool that does
        self._jobs: list[DecodeJob] = []
        self._pool: DecodePool | None = None
        self._future: Future[DecodedArrays] | None = None
        self._lock = threading.Lock()

    def has_room(self, job: DecodeJob) -> bool:
        """Whether the pass stays within the limits of one request when it serves this job too."""
        return job.limits.allow(len(self._times([*self._jobs, job])), job.image_size)

    def add(self, job: DecodeJob) -> None:
        self._jobs.append(job)

    def begin(self, pool: DecodePool | None) -> None:
        """Hand the pass to a decoder process; without a pool it waits for the first job that needs it."""
        self._pool = pool
        if pool is not None:
            self._future = pool.submit(self._together())

    def decoded(self, job: DecodeJob) -> DecodedArrays:
        """The pictures of one of the jobs; raises its SampleError."""
        together = self._together_decoded()
        if isinstance(together, SampleError):
            if len(self._jobs) == 1:
                raise together
        elif len(self._jobs) == 1:
            return together
        elif together.backend == job.decoder:
            places = np.searchsorted(self._times(self._jobs), job.times_s)
            return replace(together, frames=together.frames[places], times_s=together.times_s[places])
        # A failure may belong to another job's times. So that it does not matter who shared the pass, it counts for
        # nobody, and neither does what another reader gave instead.
        return self._pool.submit(job).result() if self._pool is not None else run_job(job, self._store)

    def _together_decoded(self) -> DecodedArrays | SampleError:
        with self._lock:
            if self._future is None:
                self._future = Future()
                try:
                    self._future.set_result(run_job(self._together(), self._store))
                except BaseException as error:
                    self._future.set_exception(error)
        try:
            return self._future.result()
        except SampleError as error:
            return error

    def _together(self) -> DecodeJob:
        if len(self._jobs) == 1:
            return self._jobs[0]
        return replace(self._jobs[0], times_s=self._times(self._jobs))

    @staticmethod
    def _times(jobs: list[DecodeJob]) -> tuple[float, ...]:
        return tuple(sorted({time for job in jobs for time in job.times_s}))
