"""The blend: how often each source's samples come in an epoch, and how the sources are mixed along it.

A *stratum* is what is drawn from as one: a source or, where the shares of text, image and video are set, the samples of
one modality of a source. What is dealt in are units (samples, or parts of samples that were split).
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moss_train.data.config import MODALITIES, DataConfig
from moss_train.data.order import ORDER_VERSION, cut_batch, permutation, steps_in, uniform, windowed_shuffle
from moss_train.errors import DataError


@dataclass(frozen=True)
class BlendSource:
    """What the order needs to know of a source: of each of its U usable units, in the order of the index."""

    name: str
    units: np.ndarray  #: int32 [U], its number among all units of the source
    shards: np.ndarray  #: int32 [U]
    modalities: np.ndarray  #: int8 [U], index into MODALITIES
    identity: Mapping[str, Any]  #: JSON values that change when the source, or the lengths of its streams, do
    weight: float = 1.0
    max_samples: int | None = None
    max_epochs: float | None = None


@dataclass
class _Stratum:
    source: int  #: index of its source
    name: str  #: distinguishes its random numbers from every other stratum's
    units: np.ndarray
    shards: np.ndarray
    max_epochs: float | None
    per_epoch: float = 0.0  #: units of one epoch, before `max_epochs` and rounding

    def count(self, epoch: int) -> int:
        """Units of that epoch. What one epoch cannot give of a fraction of a unit, a later one does."""
        return self._until(epoch + 1) - self._until(epoch)

    def _until(self, epoch: int) -> int:
        """Units of all epochs before."""
        most = math.inf if self.max_epochs is None else self.max_epochs * len(self.units)
        return math.floor(min(epoch * self.per_epoch, most) + 1e-9)


class Blend:
    """The order of every epoch. An entry is (source number, unit number within the source)."""

    def __init__(
        self,
        sources: Sequence[BlendSource],
        data: DataConfig,
        seed: int,
        compiled_with: Mapping[str, Any] | None = None,
    ):
        """compiled_with: JSON values on which the lengths of streams depend, and so the rows: tokenizer, compiler.

        Raises DataError when the sources cannot give what the blend asks for.
        """
        self.sources = list(sources)
        self.seed = seed
        self.batch_size = data.global_batch_size
        self._shuffle = data.shuffle
        self._window = data.shuffle_window_shards
        self._strata = _strata(self.sources, data)
        #: everything the sequence of global batches depends on
        self.order_settings: dict[str, Any] = {
            "version": ORDER_VERSION,
            "seed": seed,
            "sources": {
                source.name: {
                    "weight": source.weight,
                    "max_samples": source.max_samples,
                    "max_epochs": source.max_epochs,
                    **source.identity,
                }
                for source in self.sources
            },
            # JSON objects have no order, the merging of sources has one.
            "order of sources": [source.name for source in self.sources],
            "temperature": data.temperature,
            "shares": dict(data.shares),
            "global_batch_size": data.global_batch_size,
            "pack": data.pack,
            "pack_text_tokens": data.pack_text_tokens,
            "pack_frames": data.pack_frames,
            "over_budget": data.over_budget,
            "shuffle": data.shuffle,
            "shuffle_window_shards": data.shuffle_window_shards,
            **(compiled_with or {}),
        }
        self.epoch_size(0)  # raises when it is empty
        self._epochs: dict[int, np.ndarray] = {}

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.order_settings, sort_keys=True).encode()).hexdigest()

    def epoch_size(self, epoch: int) -> int:
        """Units of an epoch. DataError when there are none: every source has reached its max_epochs."""
        size = sum(stratum.count(epoch) for stratum in self._strata)
        if size == 0 and epoch > 0:
            raise DataError(
                f"epoch {epoch} of the blend holds no sample: every source has been read data.sources.*.max_epochs "
                "times; raise it, or train fewer steps"
            )
        if size == 0:
            raise DataError("the blend holds no sample: raise the weights or caps of data.sources")
        return size

    def source_size(self, source: int, epoch: int) -> int:
        """Units of one source in an epoch."""
        return sum(stratum.count(epoch) for stratum in self._strata if stratum.source == source)

    def steps_per_epoch(self, epoch: int) -> int:
        """Global batches of an epoch; the last one is completed with the first units of the same epoch."""
        return steps_in(self.epoch_size(epoch), self.batch_size)

    def steps_of(self, epochs: float) -> int:
        """Global batches of so many passes over the blend, the last of them in part; at least one."""
        whole = math.floor(epochs + 1e-9)
        steps = sum(self.steps_per_epoch(epoch) for epoch in range(whole))
        if epochs - whole > 1e-9:
            steps += math.ceil((epochs - whole) * self.steps_per_epoch(whole) - 1e-9)
        return max(1, steps)

    def epochs_of(self, steps: int) -> float:
        """Passes over the blend that so many steps are. Raises DataError when the sources cannot give as many steps."""
        if all(stratum.max_epochs is None for stratum in self._strata):
            return steps / self.steps_per_epoch(0)
        left, epoch = steps, 0
        while True:
            try:
                size = self.steps_per_epoch(epoch)
            except DataError as error:
                raise DataError(
                    f"{steps} steps are asked for, and data.sources.*.max_epochs allows {steps - left}: raise it, add "
                    "sources, or train fewer steps"
                ) from error
            if left <= size:
                return epoch + left / size
            left, epoch = left - size, epoch + 1

    def after(self, epoch: int, step: int) -> tuple[int, int]:
        """The step that follows."""
        return (epoch, step + 1) if step + 1 < self.steps_per_epoch(epoch) else (epoch + 1, 0)

    def global_batch(self, epoch: int, step: int) -> np.ndarray:
        """int64 [global_batch_size, 2]: the entries of one global batch."""
        return cut_batch(self.epoch_order(epoch), step, self.batch_size).astype(np.int64)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """int32 [n, 2]: the entries of an epoch, in order."""
        if epoch not in self._epochs:
            self.epoch_size(epoch)  # raises when there is nothing left
            # The loader looks one epoch ahead while it serves another.
            self._epochs = {old: order for old, order in self._epochs.items() if abs(old - epoch) <= 1}
            self._epochs[epoch] = self._plan(epoch)
        return self._epochs[epoch]

    def _plan(self, epoch: int) -> np.ndarray:
        """Each stratum in its own order, then merged so that every stretch of the epoch holds them by their shares."""
        parts, places = [], []
        for stratum in self._strata:
            units = self._stratum_order(stratum, epoch)
            parts.append(np.stack([np.full(len(units), stratum.source, np.int32), units.astype(np.int32)], axis=1))
            within = uniform(len(units), self.seed, epoch, stratum.name, "merge") if self._shuffle else 0.5
            places.append((np.arange(len(units)) + within) / max(len(units), 1))
        return np.concatenate(parts)[np.argsort(np.concatenate(places), kind="stable")]

    def _stratum_order(self, stratum: _Stratum, epoch: int) -> np.ndarray:
        """Whole passes over the stratum, then the units that the fraction adds, drawn anew every epoch."""
        total = len(stratum.units)
        if total == 0:
            return np.zeros(0, np.int64)
        passes, rest = divmod(stratum.count(epoch), total)
        chosen = [np.arange(total)] * passes
        if rest:
            drawn = permutation(total, self.seed, epoch, stratum.name, "subset")[:rest]
            chosen.append(np.sort(drawn))
        if self._shuffle:
            chosen = [
                members[windowed_shuffle(stratum.shards[members], self._window, self.seed, epoch, stratum.name, number)]
                for number, members in enumerate(chosen)
            ]
        return stratum.units[np.concatenate(chosen)] if chosen else np.zeros(0, np.int64)


def order_changes(saved: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """What differs between two runs' `order_settings`, one line each: `sources.main.samples was 100, is 120`."""
    changes = []
    for name in [*saved, *(name for name in now if name not in saved)]:
        before, after = saved.get(name), now.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += order_changes(before, after, f"{where}{name}.")
        elif before != after:
            changes.append(f"{where}{name} was {_short(before)}, is {_short(after)}")
    return changes


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 40 else repr(value)


def _strata(sources: Sequence[BlendSource], data: DataConfig) -> list[_Stratum]:
    """The strata with how much of each an epoch holds: weights, caps, temperature, then shares of modalities."""
    sizes = [_capped(source, source.weight * len(source.units)) for source in sources]
    whole = sum(sizes)
    if data.temperature != 1.0 and whole > 0:
        evened = [size ** (1 / data.temperature) for size in sizes]
        sizes = [_capped(source, whole * even / sum(evened)) for source, even in zip(sources, evened, strict=True)]
    strata = []
    for number, (source, size) in enumerate(zip(sources, sizes, strict=True)):
        if not data.shares:
            stratum = _Stratum(number, source.name, source.units, source.shards, source.max_epochs, size)
            strata.append(stratum)
            continue
        for code, modality in enumerate(MODALITIES):
            chosen = source.modalities == code
            if chosen.any():
                per_epoch = size * float(chosen.mean())
                name = f"{source.name}/{modality}"
                stratum = _Stratum(
                    number, name, source.units[chosen], source.shards[chosen], source.max_epochs, per_epoch
                )
                strata.append(stratum)
    if data.shares:
        _apply_shares(strata, data.shares)
    return strata


def _capped(source: BlendSource, size: float) -> float:
    return size if source.max_samples is None else min(size, source.max_samples)


def _apply_shares(strata: list[_Stratum], shares: Mapping[str, float]) -> None:
    """Scale the strata so that each modality has its share; the one that is scarcest for its share is read whole."""
    held = dict.fromkeys(MODALITIES, 0.0)
    for stratum in strata:
        held[stratum.name.rpartition("/")[2]] += stratum.per_epoch
    missing = [modality for modality, share in shares.items() if share > 0 and held[modality] == 0]
    if missing:
        raise DataError(
            f"data.shares.{missing[0]}={shares[missing[0]]}, but no source holds a sample of that modality: "
            "add one, or set the share to 0"
        )
    total = sum(shares.values())
    epoch = min(held[modality] / (share / total) for modality, share in shares.items() if share > 0)
    for stratum in strata:
        modality = stratum.name.rpartition("/")[2]
        stratum.per_epoch *= shares.get(modality, 0.0) / total * epoch / held[modality]
