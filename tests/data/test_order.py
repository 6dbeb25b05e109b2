"""The order: a function of its inputs alone, every sample as often as its weight says, well mixed."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_train.data.blend import Blend, BlendSource
from moss_train.data.config import DataConfig
from moss_train.data.order import augmentation_rng, hashed, permutation, uniform, windowed_shuffle


def source(name: str, shard_sizes: list[int], weight: float = 1.0) -> BlendSource:
    shards = np.repeat(np.arange(len(shard_sizes)), shard_sizes).astype(np.int32)
    return BlendSource(name, weight, f"fingerprint of {name}", shards)


def blend(sources: list[BlendSource], seed: int = 0, **data: object) -> Blend:
    return Blend(sources, DataConfig(**data), seed)


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(sizes, sizes, st.integers(0, 2**32), st.integers(0, 50), st.integers(1, 40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_batches_of_an_epoch_hold_every_sample_once_and_wrap(first, second, seed, epoch, batch_size, shuffle):
    made = [
        blend([source("a", first), source("b", second)], seed, global_batch_size=batch_size, shuffle=shuffle)
        for _ in range(2)
    ]
    total = sum(first) + sum(second)
    steps = made[0].steps_per_epoch(epoch)
    assert (steps - 1) * batch_size < total <= steps * batch_size
    batches = [made[0].global_batch(epoch, step) for step in range(steps)]
    assert all(len(batch) == batch_size for batch in batches)
    flat = [entry for batch in batches for entry in batch]
    assert len(set(flat[:total])) == total
    assert flat[total:] == (flat[:total] * batch_size)[: len(flat) - total]
    assert made[0].wrapped_samples == len(flat) - total
    # Another object, asked in another sequence, gives the same batches.
    assert [made[1].global_batch(epoch, step) for step in reversed(range(steps))] == batches[::-1]


@given(st.integers(1, 60), st.floats(0.05, 3.5), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_weights_repeat_and_draw_samples(count: int, weight: float, epoch: int):
    other = source("other", [5])
    made = blend([source("a", [count], weight), other], global_batch_size=1)
    times = Counter(number for which, number in map(tuple, made.epoch_order(epoch).tolist()) if which == 0)
    assert sum(times.values()) == int(weight * count + 1e-9)
    assert set(times.values()) <= {int(weight), int(weight) + 1}
    assert len(made.epoch_order(epoch)) == sum(times.values()) + 5


def test_the_fraction_of_a_weight_is_drawn_anew_every_epoch():
    made = blend([source("a", [100], 0.5)], global_batch_size=10)
    drawn = [frozenset(made.epoch_order(epoch)[:, 1].tolist()) for epoch in range(8)]
    assert len(set(drawn)) == 8 and all(len(samples) == 50 for samples in drawn)
    assert len(frozenset().union(*drawn)) >= 97


def test_epochs_and_seeds_differ_and_the_order_is_pinned():
    made = blend([source("a", [50, 50])], seed=7, global_batch_size=10)
    orders = {tuple(made.epoch_order(epoch)[:, 1].tolist()) for epoch in range(3)}
    orders.add(tuple(blend([source("a", [50, 50])], seed=8, global_batch_size=10).epoch_order(0)[:, 1].tolist()))
    assert len(orders) == 4
    # When this changes, raise ORDER_VERSION: runs saved before cannot go on with the same data.
    assert [number for _, number in made.global_batch(0, 0)] == [57, 81, 21, 93, 89, 7, 33, 55, 79, 19]


def test_fingerprint_depends_on_everything_the_order_depends_on():
    base = {"global_batch_size": 8, "pack": True, "pack_text_tokens": 64, "pack_frames": 16, "shuffle": True}
    first = blend([source("a", [9])], **base).fingerprint
    assert first == blend([source("a", [9])], **base, workers=7, micro_batch_rows=3, frame_cache_mb=1).fingerprint
    changed = [
        blend([source("a", [9])], seed=1, **base),
        blend([source("a", [9], 2.0)], **base),
        blend([source("b", [9])], **base),
        *(
            blend([source("a", [9])], **(base | {name: value}))
            for name, value in [
                ("global_batch_size", 4),
                ("pack", False),
                ("pack_text_tokens", 65),
                ("pack_frames", 17),
                ("shuffle", False),
            ]
        ),
        blend([source("a", [9])], **base, shuffle_window_shards=2),
    ]
    assert len({first, *(b.fingerprint for b in changed)}) == len(changed) + 1


def test_sources_are_mixed_in_proportion_all_along_the_epoch():
    made = blend([source("a", [900]), source("b", [100])], global_batch_size=100)
    for step in range(10):
        share = sum(which == 1 for which, _ in made.global_batch(3, step))
        assert 5 <= share <= 15


@given(sizes, st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_shuffling_stays_inside_windows_of_shards(shard_sizes: list[int], window: int, seed: int):
    shards = np.repeat(np.arange(len(shard_sizes)), shard_sizes)
    order = windowed_shuffle(shards, window, seed)
    assert sorted(order.tolist()) == list(range(len(shards)))
    visited = shards[order]
    place = 0
    seen: set[int] = set()
    while place < len(visited):
        inside: set[int] = set()
        while place < len(visited) and (visited[place] in inside or len(inside) < window):
            inside.add(int(visited[place]))
            place += 1
        # A window is read to its end: its shards hold exactly the samples met since it began.
        assert not inside & seen
        seen |= inside


def test_hashes_are_distinct_and_even():
    values = hashed(100_000, "x")
    assert len(np.unique(values)) == len(values)
    drawn = uniform(100_000, "x")
    assert 0 <= drawn.min() and drawn.max() < 1 and abs(drawn.mean() - 0.5) < 0.01
    assert (np.bincount((drawn * 10).astype(int)) > 9_500).all()
    assert sorted(permutation(1000, 1).tolist()) == list(range(1000))


def test_augmentation_depends_on_seed_epoch_and_key():
    draws = [
        augmentation_rng(*words).random() for words in [(0, 0, "a"), (0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]
    ]
    assert draws[0] == draws[1] and len(set(draws)) == 4


def test_tokenizer_and_compiler_settings_are_part_of_the_order():
    """They decide how long streams are, and so which share a row."""
    made = [Blend([source("a", [4])], DataConfig(), 0, {"tokenizer": name}).fingerprint for name in ("x", "y", "x")]
    assert made[0] == made[2] != made[1]
