"""The blend: how often each source's samples come in an epoch, and how the sources are mixed along it."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moss_train.data.config import DataConfig
from moss_train.data.order import ORDER_VERSION, cut_batch, permutation, steps_in, uniform, windowed_shuffle
from moss_train.data.shards.index import SourceIndex
from moss_train.errors import DataError


@dataclass(frozen=True)
class BlendSource:
    """What the order needs to know of a source."""

    name: str
    weight: float
    fingerprint: str
    shards: np.ndarray  #: int32 [n], the shard of each sample, in the order of the index

    @property
    def epoch_samples(self) -> int:
        """Samples of this source in one epoch."""
        return math.floor(self.weight * len(self.shards) + 1e-9)


def blend_source(name: str, weight: float, index: SourceIndex) -> BlendSource:
    return BlendSource(name, weight, index.fingerprint, np.array([sample.shard for sample in index.samples], np.int32))


class Blend:
    """The order of every epoch. An entry is (source number, sample number within the source)."""

    def __init__(
        self, sources: list[BlendSource], data: DataConfig, seed: int, compiled_with: Mapping[str, Any] | None = None
    ):
        """compiled_with: JSON values on which the lengths of streams depend, and so the rows: tokenizer, compiler."""
        self.sources = sources
        self.seed = seed
        self.batch_size = data.global_batch_size
        self._shuffle = data.shuffle
        self._window = data.shuffle_window_shards
        self.epoch_samples = sum(source.epoch_samples for source in sources)
        if self.epoch_samples == 0:
            raise DataError("the blend holds no sample: raise the weights of data.sources")
        #: everything the sequence of global batches and their rows depends on
        self.order_settings = {
            "version": ORDER_VERSION,
            "seed": seed,
            "sources": [[source.name, source.weight, source.fingerprint] for source in sources],
            "global_batch_size": data.global_batch_size,
            "pack": data.pack,
            "pack_text_tokens": data.pack_text_tokens,
            "pack_frames": data.pack_frames,
            "shuffle": data.shuffle,
            "shuffle_window_shards": data.shuffle_window_shards,
            **(compiled_with or {}),
        }
        self._epochs: dict[int, np.ndarray] = {}

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.order_settings, sort_keys=True).encode()).hexdigest()

    def steps_per_epoch(self, epoch: int) -> int:
        """Global batches of an epoch; the last one is completed with the first samples of the same epoch."""
        return steps_in(self.epoch_samples, self.batch_size)

    @property
    def wrapped_samples(self) -> int:
        """Entries of an epoch's last batch that repeat its first ones."""
        return self.steps_per_epoch(0) * self.batch_size - self.epoch_samples

    def global_batch(self, epoch: int, step: int) -> list[tuple[int, int]]:
        """The entries of one global batch."""
        return [(int(s), int(i)) for s, i in cut_batch(self.epoch_order(epoch), step, self.batch_size)]

    def epoch_order(self, epoch: int) -> np.ndarray:
        """int64 [n, 2]: the entries of an epoch, in order."""
        if epoch not in self._epochs:
            # The loader looks one epoch ahead while it serves another.
            self._epochs = {old: order for old, order in self._epochs.items() if abs(old - epoch) <= 1}
            self._epochs[epoch] = self._plan(epoch)
        return self._epochs[epoch]

    def _plan(self, epoch: int) -> np.ndarray:
        """Each source in its own order, then merged so that every stretch of the epoch holds them by their shares."""
        parts, places = [], []
        for number, source in enumerate(self.sources):
            samples = self._source_order(source, epoch)
            parts.append(np.stack([np.full(len(samples), number, np.int64), samples], axis=1))
            within = uniform(len(samples), self.seed, epoch, source.name, "merge") if self._shuffle else 0.5
            places.append((np.arange(len(samples)) + within) / max(len(samples), 1))
        return np.concatenate(parts)[np.argsort(np.concatenate(places), kind="stable")]

    def _source_order(self, source: BlendSource, epoch: int) -> np.ndarray:
        """Whole passes over the source, then the samples that the weight's fraction adds, drawn anew every epoch."""
        total = len(source.shards)
        if total == 0:
            return np.zeros(0, np.int64)
        passes, rest = divmod(source.epoch_samples, total)
        chosen = [np.arange(total)] * passes
        if rest:
            drawn = permutation(total, self.seed, epoch, source.name, "subset")[:rest]
            chosen.append(np.sort(drawn))
        if not self._shuffle:
            return np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
        shuffled = []
        for number, samples in enumerate(chosen):
            words = (self.seed, epoch, source.name, number)
            shuffled.append(samples[windowed_shuffle(source.shards[samples], self._window, *words)])
        return np.concatenate(shuffled) if shuffled else np.zeros(0, np.int64)
