"""Decoded frames, once per request: a bounded cache in the training process, decoder processes for what it lacks.

What is cached answers the very same requests only, never part of others. So the pixels of a request depend on nothing
that was asked before, not even where a decoder gives up on one part of a clip and another one takes its place.
"""

from collections import OrderedDict
from concurrent.futures import Future

import torch

from moss_train.data.corpus import Corpus
from moss_train.data.decoding.decode import DecodedArrays
from moss_train.data.decoding.job import run_job
from moss_train.data.decoding.pool import DecodePool
from moss_train.errors import SampleError
from moss_train.streams.compiled import FrameRequest

_CacheKey = tuple[str, str, tuple[FrameRequest, ...]]


class PendingFrames:
    """Frames that are being decoded, or are decoded already."""

    def __init__(self, store: "FrameStore", cache_key: _CacheKey, corpus: Corpus):
        self._store = store
        self._cache_key = cache_key
        self._corpus = corpus
        self._value: torch.Tensor | SampleError | None = None
        self._futures: list[Future[DecodedArrays]] = []
        self._work = []
        try:
            self._work = corpus.decode_jobs(cache_key[1], cache_key[2])
        except SampleError as error:
            self._value = error
        if store.pool is not None:
            self._futures = [store.pool.submit(job) for job, _ in self._work]

    def result(self) -> torch.Tensor:
        """uint8 [F, 3, S, S]; waits for the decoder. Raises SampleError, the same one at every call."""
        if self._value is None:
            try:
                if self._store.pool is not None:
                    parts = [future.result() for future in self._futures]
                else:
                    parts = [run_job(job) for job, _ in self._work]
                self._value = self._corpus.assemble(parts, [places for _, places in self._work])
            except SampleError as error:
                self._value = error
            self._futures, self._work = [], []
            self._store.settle(self._cache_key, self._value)
        if isinstance(self._value, SampleError):
            raise self._value
        return self._value


class FrameStore:
    """Frames by (source, key, requests): from the cache, from a decoding under way, or from a new one."""

    def __init__(self, pool: DecodePool | None, cache_mb: int):
        self.pool = pool
        self.decoded = 0  #: clips decoded so far
        self.cached = 0  #: clips served from the cache so far
        self._room = cache_mb << 20
        self._cache: OrderedDict[_CacheKey, torch.Tensor] = OrderedDict()
        self._bytes = 0
        self._under_way: dict[_CacheKey, PendingFrames] = {}

    def request(self, corpus: Corpus, key: str, requests: tuple[FrameRequest, ...]) -> "PendingFrames | torch.Tensor":
        """The frames if they are there, else the decoding, which has begun when there are decoder processes."""
        cache_key = (corpus.name, key, requests)
        frames = self._cache.get(cache_key)
        if frames is not None:
            self._cache.move_to_end(cache_key)
            self.cached += 1
            return frames
        if cache_key not in self._under_way:
            self._under_way[cache_key] = PendingFrames(self, cache_key, corpus)
        return self._under_way[cache_key]

    def settle(self, cache_key: _CacheKey, value: torch.Tensor | SampleError) -> None:
        """A decoding has ended; keep its frames while there is room, the least recently used go first."""
        self._under_way.pop(cache_key, None)
        self.decoded += 1
        if isinstance(value, SampleError) or value.nbytes > self._room:
            return
        self._cache[cache_key] = value
        self._bytes += value.nbytes
        while self._bytes > self._room:
            _, oldest = self._cache.popitem(last=False)
            self._bytes -= oldest.nbytes

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()
