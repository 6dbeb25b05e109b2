"""The order: a function of its inputs alone, every sample as often as its weight says, well mixed."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_train.data.blend import Blend, BlendSource, order_changes
from moss_train.data.config import MODALITIES, DataConfig
from moss_train.data.order import augmentation_rng, hashed, permutation, uniform, windowed_shuffle
from moss_train.errors import DataError


def source(
    name: str, shard_sizes: list[int], weight: float = 1.0, modalities: str = "video", **caps: float
) -> BlendSource:
    """`modalities`: one for all units, or a list of them separated by spaces that is repeated."""
    shards = np.repeat(np.arange(len(shard_sizes)), shard_sizes).astype(np.int32)
    codes = np.resize([MODALITIES.index(word) for word in modalities.split()], len(shards)).astype(np.int8)
    identity = {"index": f"fingerprint of {name}", "samples": len(shards)}
    return BlendSource(name, np.arange(len(shards), dtype=np.int32), shards, codes, identity, weight, **caps)


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
    flat = [tuple(entry) for batch in batches for entry in batch.tolist()]
    assert len(set(flat[:total])) == total
    assert flat[total:] == (flat[:total] * batch_size)[: len(flat) - total]
    # Another object, asked in another sequence, gives the same batches.
    again = [made[1].global_batch(epoch, step) for step in reversed(range(steps))]
    assert all(np.array_equal(first, second) for first, second in zip(again, batches[::-1], strict=True))


@given(st.integers(1, 60), st.floats(0.05, 3.5), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_weights_repeat_and_draw_samples(count: int, weight: float, epoch: int):
    other = source("other", [5])
    made = blend([source("a", [count], weight), other], global_batch_size=1)
    times = Counter(number for which, number in map(tuple, made.epoch_order(epoch).tolist()) if which == 0)
    # A fraction of a sample that one epoch does not hold comes in a later one.
    assert sum(times.values()) == int((epoch + 1) * weight * count + 1e-9) - int(epoch * weight * count + 1e-9)
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
        blend([source("a", [9])], **base, temperature=2.0),
        blend([source("a", [9])], **base, over_budget="split"),
        blend([source("a", [9])], **base, shares={"video": 1.0}),
        blend([source("a", [9], max_samples=5)], **base),
        blend([source("a", [9], max_epochs=5.0)], **base),
    ]
    assert len({first, *(b.fingerprint for b in changed)}) == len(changed) + 1


def test_sources_are_mixed_in_proportion_all_along_the_epoch():
    made = blend([source("a", [900]), source("b", [100])], global_batch_size=100)
    for step in range(10):
        share = (made.global_batch(3, step)[:, 0] == 1).sum()
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


def counts(made: Blend, epoch: int = 0) -> Counter:
    """(source, modality) → units of an epoch."""
    return Counter(
        (made.sources[which].name, MODALITIES[made.sources[which].modalities[unit]])
        for which, unit in made.epoch_order(epoch).tolist()
    )


def test_units_that_are_left_out_never_come():
    made = BlendSource("a", np.array([1, 3, 4], np.int32), np.zeros(3, np.int32), np.zeros(3, np.int8), {})
    assert sorted(blend([made], global_batch_size=2).epoch_order(0)[:, 1].tolist()) == [1, 3, 4]


@given(st.integers(1, 400), st.integers(1, 400), st.floats(1, 50))
@settings(max_examples=60, deadline=None)
def test_temperature_evens_out_sources_and_keeps_the_length_of_the_epoch(first: int, second: int, temperature: float):
    made = blend([source("a", [first]), source("b", [second])], temperature=temperature)
    sizes = [made.source_size(number, 0) for number in range(2)]
    assert abs(sum(sizes) - first - second) <= 2
    expected = (first / second) ** (1 / temperature)
    if min(sizes) > 20:
        assert sizes[0] / sizes[1] == pytest.approx(expected, rel=0.1)
    made.epoch_order(0)


def test_caps_hold_an_epoch_and_a_whole_run():
    made = blend([source("a", [100], max_samples=30), source("b", [40], max_epochs=2.5)], global_batch_size=10)
    drawn = [made.epoch_order(epoch) for epoch in range(4)]
    assert [(order[:, 0] == 0).sum() for order in drawn] == [30] * 4
    assert [(order[:, 0] == 1).sum() for order in drawn] == [40, 40, 20, 0]
    assert len({frozenset(order[order[:, 0] == 0, 1].tolist()) for order in drawn}) == 4
    assert [made.steps_per_epoch(epoch) for epoch in range(4)] == [7, 7, 5, 3]
    assert (made.steps_of(2.0), made.steps_of(2.5), made.steps_of(0.01)) == (14, 17, 1)
    assert made.after(1, 6) == (2, 0) and made.after(2, 3) == (2, 4)
    assert (made.epochs_of(14), made.epochs_of(17), made.epochs_of(22)) == (2.0, 2.6, 4.0)
    alone = blend([source("b", [40], max_epochs=1.25)], global_batch_size=10)
    assert alone.epochs_of(5) == 2.0
    for ask in (alone.steps_per_epoch, alone.epoch_order, lambda epoch: alone.global_batch(epoch, 0)):
        with pytest.raises(DataError, match="epoch 2 of the blend holds no sample.*max_epochs"):
            ask(2)
    with pytest.raises(DataError, match="6 steps are asked for, and data.sources.*max_epochs allows 5"):
        alone.epochs_of(6)


def test_a_small_weight_gives_its_samples_over_the_epochs():
    made = blend([source("a", [40], weight=0.04), source("b", [10])], global_batch_size=5)
    assert [made.source_size(0, epoch) for epoch in range(5)] == [1, 2, 1, 2, 2]


def test_shares_of_modalities_hold_whatever_source_they_come_from():
    sources = [source("a", [60, 60], modalities="text image video"), source("b", [100], modalities="video")]
    made = blend(sources, shares={"text": 0.25, "image": 0.25, "video": 0.5}, global_batch_size=16)
    drawn = counts(made)
    assert sum(n for (_, m), n in drawn.items() if m == "text") == 40  # the scarcest for its share is read whole
    assert sum(n for (_, m), n in drawn.items() if m == "image") == 40
    assert sum(n for (_, m), n in drawn.items() if m == "video") in (79, 80)
    # Within a modality sources keep their proportion.
    assert drawn["b", "video"] / drawn["a", "video"] == pytest.approx(100 / 40, rel=0.1)
    # A modality without a share does not come.
    assert {m for _, m in counts(blend(sources, shares={"video": 1.0}))} == {"video"}
    with pytest.raises(DataError, match="shares.text=0.5, but no source holds"):
        blend([sources[1]], shares={"text": 0.5, "video": 0.5})


def test_what_changed_is_named():
    first = blend([source("a", [9]), source("b", [4])]).order_settings
    second = blend([source("a", [9, 3], 0.5), source("c", [4])], pack_frames=9).order_settings
    told = order_changes(first, second)
    assert "sources.a.samples was 9, is 12" in told and "sources.a.weight was 1.0, is 0.5" in told
    assert any(line.startswith("sources.b was {") for line in told) and "pack_frames was 256, is 9" in told
    assert order_changes(first, first) == []


def test_tokenizer_and_compiler_settings_are_part_of_the_order():
    """They decide how long streams are, and so which share a row."""
    made = [Blend([source("a", [4])], DataConfig(), 0, {"tokenizer": name}).fingerprint for name in ("x", "y", "x")]
    assert made[0] == made[2] != made[1]
