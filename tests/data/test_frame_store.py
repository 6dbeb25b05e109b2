"""Frames by content: one pass per clip and step, one decoding of equal clips, and pixels that depend on neither."""

from pathlib import Path

import numpy as np
import pytest
from data_samples import broken_from, caption_json, numbered_clip, pack, read_numbers, stage, still, stream_json

from moss_train.data.config import DataConfig
from moss_train.data.corpus import Corpus, load_source
from moss_train.data.decoding import job as job_module
from moss_train.data.decoding.pool import DecodePool
from moss_train.data.frame_store import FrameStore, FrameWant
from moss_train.errors import SampleError
from moss_train.streams.compiled import FrameRequest

SIZE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Samples a and b of one clip, c of another, broken (good until its third picture), and a still with a clip."""
    base = tmp_path_factory.mktemp("store")
    clip, other = numbered_clip(12), numbered_clip(12, first=50)
    broken = broken_from(numbered_clip(12, gop=1, first=100), 3)
    for key, data in (("a", clip), ("b", clip), ("c", other), ("d", broken), ("e", broken)):
        stage(base / "in", key, stream_json(key), mp4=data)
    two = caption_json("two", "0.png", "<|image|> and <|video|>")
    two["media"].append({"id": "m1", "kind": "video", "member": "1.mp4"})
    stage(base / "in", "two", two, _0_png=still(77), _1_mp4=clip)
    pack(base / "in", base / "out")
    return base / "out"


@pytest.fixture
def corpus(folder: Path) -> Corpus:
    return load_source(folder, image_size=SIZE, data=DataConfig(decoder="auto"))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each decoding asks for."""
    counts: list[int] = []
    run = job_module.decode_arrays
    monkeypatch.setattr(
        job_module, "decode_arrays", lambda data, times, *a: counts.append(len(times)) or run(data, times, *a)
    )
    return counts


def want(corpus: Corpus, key: str, *numbers: int, medium: str = "v0") -> FrameWant:
    return FrameWant(corpus, corpus.index.number(key), tuple(FrameRequest(medium, number / 4) for number in numbers))


def numbers_of(frames) -> list[int]:
    return read_numbers(frames.numpy(), 32)


def test_one_pass_over_a_clip_serves_all_wants_of_a_step(corpus: Corpus, passes: list[int]):
    store = FrameStore(None, 0)
    a, b, c, two = store.request_all(
        [
            want(corpus, "a", 0, 4, 8),
            want(corpus, "b", 9, 4, 1),
            want(corpus, "c", 2, 2),
            FrameWant(corpus, corpus.index.number("two"), (FrameRequest("m1", 2.5), FrameRequest("m0", 0.0))),
        ]
    )
    assert numbers_of(two.result()) == [10, 77]
    assert numbers_of(a.result()) == [0, 4, 8]
    assert numbers_of(b.result()) == [9, 4, 1]
    assert numbers_of(c.result()) == [52, 52]
    assert sorted(passes) == [1, 2, 6]
    assert store.decoded == 5 and store.cached == 0


def test_equal_clips_are_decoded_once_and_kept_by_content(corpus: Corpus, passes: list[int]):
    store = FrameStore(None, 64)
    first, second = store.request_all([want(corpus, "a", 1, 2), want(corpus, "b", 1, 2)])
    assert np.array_equal(first.result(), second.result()) and passes == [2] and store.cached == 1
    assert numbers_of(store.request(corpus, corpus.index.number("b"), want(corpus, "b", 1, 2).requests).result()) == [
        1,
        2,
    ]
    assert passes == [2] and store.cached == 2
    assert numbers_of(store.request_all([want(corpus, "a", 1, 3)])[0].result()) == [1, 3]
    assert passes == [2, 2]


@pytest.mark.parametrize("decoder", ["auto", "decord"])
def test_pixels_do_not_depend_on_company_or_cache(folder: Path, decoder: str):
    """Every set of wants, cached or not, with others or alone, gives the same."""
    corpus = load_source(folder, image_size=40, data=DataConfig(decoder=decoder))
    wants = [want(corpus, "a", 0, 3, 11), want(corpus, "b", 2, 3), want(corpus, "a", 7), want(corpus, "c", 5, 6)]
    alone = [FrameStore(None, 0).request_all([one])[0].result().numpy() for one in wants]
    for cache_mb in (0, 64):
        store = FrameStore(None, cache_mb)
        for chosen in ([0, 1, 2, 3], [2, 1], [0], [3, 1, 0], [1, 2]):
            for place, pending in zip(chosen, store.request_all([wants[c] for c in chosen]), strict=True):
                assert np.array_equal(pending.result().numpy(), alone[place])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_part_fails_those_alone_who_ask_for_it(corpus: Corpus, workers: int):
    """Each failure bears its own sample's key, though both samples have the same clip and one pass."""
    store = FrameStore(DecodePool(workers, 60.0) if workers else None, 64)
    try:
        good, bad, also = store.request_all([want(corpus, "d", 0, 2), want(corpus, "d", 1, 8), want(corpus, "e", 1, 8)])
        for pending, key in ((bad, "d"), (also, "e")):
            for _ in range(2):
                with pytest.raises(SampleError) as caught:
                    pending.result()
                assert caught.value.key == key
        assert numbers_of(good.result()) == [100, 102]
    finally:
        store.close()


def test_a_pass_stays_within_the_limits_of_a_request(corpus: Corpus, passes: list[int], monkeypatch):
    from moss_train.data.decoding.decode import DecodeLimits

    monkeypatch.setattr(corpus, "_limits", DecodeLimits(max_frames=3))
    store = FrameStore(None, 0)
    pending = store.request_all([want(corpus, "a", 0, 1), want(corpus, "b", 1, 2), want(corpus, "a", 5, 6)])
    assert [numbers_of(one.result()) for one in pending] == [[0, 1], [1, 2], [5, 6]]
    assert sorted(passes) == [2, 3]


def test_cache_is_bounded_and_forgets_the_least_recently_used(corpus: Corpus, passes: list[int]):
    frame_bytes = 3 * SIZE * SIZE
    store = FrameStore(None, 1)
    store._room = 4 * frame_bytes
    for numbers in ((0, 1), (2, 3), (0, 1), (4, 5), (0, 1), (2, 3)):
        store.request_all([want(corpus, "a", *numbers)])[0].result()
    assert len(passes) == 4  # (0, 1), (2, 3), (4, 5), and (2, 3) again
    assert store._bytes <= store._room
    store.request_all([want(corpus, "a", *range(5))])[0].result()
    assert store._bytes <= store._room


def test_what_nobody_waits_for_is_forgotten(corpus: Corpus):
    store = FrameStore(None, 64)
    pending = store.request_all([want(corpus, "a", 0)])
    assert len(store._under_way) == 1
    del pending
    assert len(store._under_way) == 0


def test_a_medium_that_the_sample_does_not_list_is_its_own_failure(corpus: Corpus):
    pending = FrameStore(None, 0).request_all([want(corpus, "a", 0, medium="v9"), want(corpus, "b", 3)])
    with pytest.raises(SampleError, match="v9"):
        pending[0].result()
    assert numbers_of(pending[1].result()) == [3]
