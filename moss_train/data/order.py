"""The order of the run: which samples make up global batch (epoch, step).

A function of (seed, epoch, index fingerprints, blend, packing settings, global batch size) and of nothing else, so
the loader's state is three numbers and a run may resume on any number of ranks and workers. All randomness comes
from hashes (SHA-256 for seeds, splitmix64 for long arrays), which no numpy release changes.
"""

import hashlib
import json

import numpy as np

#: raised when the same settings begin to give another order; part of the fingerprint
ORDER_VERSION = 1


def seed_of(*words: object) -> int:
    """A 64-bit seed from numbers and strings."""
    return int.from_bytes(hashlib.sha256(json.dumps(words).encode()).digest()[:8], "little")


def hashed(count: int, *words: object) -> np.ndarray:
    """uint64 [count], all different: splitmix64 (Steele, Lea, Flood 2014) of a counter that starts at the seed."""
    with np.errstate(over="ignore"):
        x = np.uint64(seed_of(*words)) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permutation(count: int, *words: object) -> np.ndarray:
    """int64 [count]: a permutation of 0 … count-1 that depends on `words` alone."""
    return np.argsort(hashed(count, *words), kind="stable")


def uniform(count: int, *words: object) -> np.ndarray:
    """float64 [count] in [0, 1)."""
    return (hashed(count, *words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def augmentation_rng(seed: int, epoch: int, key: str) -> np.random.Generator:
    """The generator of a sample's random augmentations; the same whichever rank compiles it."""
    return np.random.Generator(np.random.PCG64(seed_of("augmentation", seed, epoch, key)))


def drawn_variant(seed: int, epoch: int, key: str, chance: float, variants: int) -> int:
    """Which augmented variant of a sample an epoch shows, 1 … `variants`, or 0: with probability 1 - chance itself."""
    if not variants:
        return 0
    drawn = seed_of("variant of the epoch", seed, epoch, key) / 2.0**64
    return min(1 + int(drawn / chance * variants), variants) if drawn < chance else 0


def variation_seed(seed: int, key: str, variant: int) -> int | None:
    """The seed of what is different in a variant of a sample; None for variant 0, the sample itself."""
    return seed_of("variant", seed, key, variant) if variant else None


def windowed_shuffle(shards: np.ndarray, window: int, *words: object) -> np.ndarray:
    """int64 [n]: positions 0 … n-1, shards in random order, samples mixed inside windows of `window` shards.

    `shards` int [n] names the shard of each position. Within a window everything mixes, between windows nothing
    does, so a reader needs at most `window` shards of the source at a time.
    """
    names = np.unique(shards)
    rank_of_shard = np.zeros(int(names[-1]) + 1, np.int64)
    rank_of_shard[names[permutation(len(names), "shards", *words)]] = np.arange(len(names))
    windows = rank_of_shard[shards] // window
    return np.lexsort((hashed(len(shards), "samples", *words), windows))


def cut_batch(order: np.ndarray, step: int, size: int) -> np.ndarray:
    """Entries of global batch `step`: `size` consecutive entries, the last batch wrapping to the epoch's start.

    Wrapping loses no sample and keeps every batch full; at most `size - 1` samples of an epoch come twice (all of
    them several times when an epoch is smaller than one batch).
    """
    return order[np.arange(step * size, (step + 1) * size) % len(order)]


def steps_in(samples: int, size: int) -> int:
    """Global batches of an epoch, the wrapped one included."""
    return -(-samples // size)
