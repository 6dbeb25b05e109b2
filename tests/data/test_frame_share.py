"""Several ranks on the same rows: each decodes its share of the frames, and together they hold what one alone would."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import broken_from, caption_json, numbered_clip, split_pack, stage, stage_streams, still, stream_json
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_ranks import Ranks, content, joined, joined_steps, loader_of, same, steps_of
from test_collate import random_stream, shapes

from moss_train.data import frame_store
from moss_train.data.batch import ALL_FRAMES, Batch, FrameShare
from moss_train.data.collate import collate
from moss_train.data.decoding.decode import DecodeLimits
from moss_train.data.decoding.pool import DecodePool
from moss_train.data.packing import bounds_of_kept, cut_frames
from moss_train.errors import ConfigError

SHARES = (1, 2, 3, 5, 8)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Clips of 2 to 14 pictures, stills, texts, and a sample of a still and a clip."""
    base = tmp_path_factory.mktemp("mixed")
    for number in range(10):
        key, frames = f"s{number}", 2 + 4 * number % 13
        stage(base / "in", key, stream_json(key, frames), mp4=numbered_clip(frames, first=10 * number))
    for number in range(4):
        stage(base / "in", f"p{number}", caption_json(f"p{number}"), png=still(200 + number))
        stage(base / "in", f"t{number}", caption_json(f"t{number}", None))
    two = caption_json("two", "0.png", "<|image|> and <|video|>")
    two["media"].append({"id": "m1", "kind": "video", "member": "1.mp4"})
    stage(base / "in", "two", two, _0_png=still(77), _1_mp4=numbered_clip(3, 4, first=90))
    split_pack(base / "in", base / "out", 6)
    return base / "out"


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """The number of pictures of every decoding that begins."""
    counts: list[int] = []
    run, submit = frame_store.run_job, DecodePool.submit
    monkeypatch.setattr(
        frame_store, "run_job", lambda job, store=None: counts.append(len(job.times_s)) or run(job, store)
    )
    monkeypatch.setattr(DecodePool, "submit", lambda pool, job: counts.append(len(job.times_s)) or submit(pool, job))
    return counts


@given(st.lists(st.integers(0, 9), max_size=12), st.sampled_from(SHARES), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_shares_cut_every_stream_without_gap_or_overlap(counts: list[int], ranks: int, random):
    kept = [random.random() < 0.7 for _ in counts]
    planned = FrameShare(0, ranks).bounds(sum(counts))
    sizes = np.diff(planned)
    assert planned[0] == 0 and planned[-1] == sum(counts) and sizes.max() - sizes.min() <= 1
    found: list[list[int]] = [[] for _ in counts]
    kept_sizes = []
    for rank in range(ranks):
        parts = cut_frames(counts, *FrameShare(rank, ranks).of(planned))
        assert sum(map(len, parts)) == sizes[rank]
        kept_sizes.append(sum(len(part) for part, keep in zip(parts, kept, strict=True) if keep))
        for frames, part in zip(found, parts, strict=True):
            frames += part
    assert found == [list(range(count)) for count in counts]
    bounds = bounds_of_kept(planned, counts, kept)
    assert np.diff(bounds).tolist() == kept_sizes and bounds[0] == 0
    assert bounds_of_kept(planned, counts, [True] * len(counts)) == planned


def test_a_share_that_does_not_exist_is_refused():
    for rank, ranks in ((2, 2), (-1, 2), (0, 0), (None, 0)):
        with pytest.raises(ValueError, match="does not exist"):
            FrameShare(rank, ranks)


@given(shapes, st.sampled_from(SHARES), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_collated_shares_are_shares_of_the_collated_whole(rows, ranks: int, seed: int):
    draw = np.random.default_rng(seed)
    made = [
        [
            (
                random_stream(draw, f"{r}-{s}", *lengths),
                torch.from_numpy(draw.integers(0, 255, (lengths[1], 3, 4, 4), np.uint8)),
            )
            for s, lengths in enumerate(row)
        ]
        for r, row in enumerate(rows)
    ]
    whole = collate(made, image_size=4)
    counts = [len(frames) for row in made for _, frames in row]
    bounds = FrameShare(0, ranks).bounds(sum(counts))
    batches = []
    for share in [FrameShare(rank, ranks) for rank in range(ranks)]:
        parts = iter(cut_frames(counts, *share.of(bounds)))
        own = [[(stream, frames[slice((p := next(parts)).start, p.stop)]) for stream, frames in row] for row in made]
        batches.append(collate(own, 4, None, share, bounds))
        assert torch.equal(batches[-1].frames_NCHW, whole.share(share).frames_NCHW)
        assert batches[-1].frame_bounds == whole.share(share).frame_bounds
    assert torch.equal(joined(batches).frames_NCHW, whole.frames_NCHW)
    with pytest.raises(ValueError, match="one share of its frames already"):
        batches[0].share(FrameShare())


def test_frames_of_another_share_are_refused():
    stream = random_stream(np.random.default_rng(0), "a", 5, 3)
    frames = torch.zeros((3, 3, 8, 8), dtype=torch.uint8)
    with pytest.raises(ValueError, match="'a' asks for 1 frames and was given 2"):
        collate([[(stream, frames[:2])]], 8, None, FrameShare(0, 2), (0, 1, 3))
    with pytest.raises(ValueError, match="'a' asks for 0 frames and was given 3"):
        collate([[(stream, frames)]], 8, None, FrameShare(None, 2), (0, 1, 3))
    for bounds in ((0, 1, 2), (0, 3)):
        with pytest.raises(ValueError, match="do not cut 3 frames in 2 shares"):
            collate([[(stream, frames[:1])]], 8, None, FrameShare(0, 2), bounds)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("ranks", SHARES)
def test_shares_in_order_are_the_unshared_batches(mixed: Path, decoded: list[int], ranks: int, pack: bool):
    """Not packed, a microbatch is a single stream: mostly fewer frames than ranks, and none at all for a text."""
    cut = {"pack": pack, "micro_batch_rows": 2 if pack else 1, "global_batch_size": 7, "frame_cache_mb": 0}
    alone = steps_of(loader_of(mixed, **cut), 3)
    frames = sum(batch.frames for step in alone for batch in step.microbatches)
    assert sum(decoded) == frames
    assert all(not b.frame_bounds and len(b.frames_NCHW) == b.frames for step in alone for b in step.microbatches)
    if not pack:
        counts = {batch.frames for step in alone for batch in step.microbatches}
        assert {0, 1} <= counts and max(counts) > 8
    decoded.clear()
    parts = [steps_of(loader_of(mixed, share=FrameShare(rank, ranks), **cut), 3) for rank in range(ranks)]
    # Nothing is decoded twice, and no decoding is begun for nothing.
    assert sum(decoded) == frames and min(decoded) > 0
    for whole, *shares in zip(alone, *parts, strict=True):
        for batch, delivered in zip(whole.microbatches, joined_steps(shares).microbatches, strict=True):
            assert same(batch, delivered)
        for rank, step in enumerate(shares):
            for batch, own in zip(whole.microbatches, step.microbatches, strict=True):
                assert same(own, batch if ranks == 1 else batch.share(FrameShare(rank, ranks)))


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_rank_without_a_share_knows_all_but_the_pixels(mixed: Path, decoded: list[int], ranks: int):
    own = steps_of(loader_of(mixed, share=FrameShare(None, ranks)), 3)
    assert not decoded
    for whole, step in zip(steps_of(loader_of(mixed), 3), own, strict=True):
        for batch, bare in zip(whole.microbatches, step.microbatches, strict=True):
            assert bare.frames_NCHW.shape == (0, 3, 64, 64) and bare.frames_NCHW.dtype == torch.uint8
            assert bare.frames == batch.frames and same(bare, batch.share(FrameShare(None, ranks)))


@pytest.mark.parametrize(
    ("data_ranks", "shares", "workers"), [(1, 1, 2), (1, 4, 1), (2, 1, 0), (2, 3, 0), (2, 2, 1), (3, 2, 0)]
)
def test_global_batches_do_not_depend_on_the_layout(
    mixed: Path, tmp_path: Path, decoded: list[int], data_ranks: int, shares: int, workers: int
):
    alone = steps_of(loader_of(mixed), 4)
    ranks = Ranks(mixed, data_ranks, tmp_path / "ledger", shares, workers=workers, frame_cache_mb=0)
    for number, whole in enumerate(alone):
        if number == 2:  # another layout goes on where this one stands
            with loader_of(mixed, share=FrameShare(2, 4)) as other:
                other.load_state_dict(json.loads(json.dumps(ranks.loaders[-1].state_dict())))
                assert same(next(other).microbatches[0], whole.microbatches[0].share(FrameShare(2, 4)))
        decoded.clear()
        steps = ranks.step()
        if workers == 0:
            assert sum(decoded) == sum(batch.frames for batch in whole.microbatches)
        merged: dict[str, str] = {}
        for rank in range(data_ranks):
            step = joined_steps(steps[rank * shares : (rank + 1) * shares])
            assert step.keys == whole.keys and not merged.keys() & content(step).keys()
            merged |= content(step)
        assert merged == content(whole)
    ranks.close()


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Nine good streams; one whose clip breaks off near its end, and one whose sample is no JSON."""
    stage_streams(tmp_path / "in", 9)
    # The first picture decodes, so the index finds nothing wrong.
    clip = broken_from(numbered_clip(12, 4, gop=2, options={"bf": "0"}), packet=10)
    stage(tmp_path / "in", "breaks", stream_json("breaks"), mp4=clip)
    stage(tmp_path / "in", "json", b'{"schema": "moss_train/stream@1"')
    split_pack(tmp_path / "in", tmp_path / "out", 5)
    return tmp_path / "out"


@pytest.mark.parametrize(("data_ranks", "shares", "pack"), [(1, 3, False), (2, 2, False), (1, 3, True), (1, 8, True)])
def test_what_one_share_could_not_decode_leaves_all_shares(
    damaged: Path, tmp_path: Path, data_ranks: int, shares: int, pack: bool
):
    cut = {"pack": pack, "max_bad_fraction": 0.5, "global_batch_size": 11, "pack_frames": 40, "micro_batch_rows": 1}
    ledger = tmp_path / "ledger"
    unshared = Ranks(damaged, data_ranks, tmp_path / "unshared", **cut)
    ranks = Ranks(damaged, data_ranks, ledger, shares, **cut)
    for epoch in range(2):
        wholes, steps = unshared.step(), ranks.step()
        told = [[fault["key"] for fault in faults] for _, faults in sorted(ranks.told.items())]
        if epoch == 0:
            assert sorted(told) == [[]] * (data_ranks * shares - 1) + [["breaks"]]
        else:
            assert not any(told)
        for rank, whole in enumerate(wholes):
            step = joined_steps(steps[rank * shares : (rank + 1) * shares])
            assert step.masked == whole.masked == whole.keys.count("breaks") > 0 and "breaks" not in content(step)
            assert {fault.key for fault in step.quarantined} == ({"breaks", "json"} if epoch == 0 else set())
            for batch, delivered in zip(whole.microbatches, step.microbatches, strict=True):
                assert same(batch, delivered)
    ranks.close()
    unshared.close()
    assert sorted(json.loads(line)["key"] for line in ledger.read_text().splitlines()) == ["breaks", "json"]
    assert all(loader.counters()["quarantined"] == 2 for loader in ranks.loaders)


def test_a_clip_of_too_many_frames_is_refused_however_it_is_shared(mixed: Path, monkeypatch):
    monkeypatch.setattr(DecodeLimits, "max_frames", 8)
    for share in (ALL_FRAMES, FrameShare(1, 2)):
        with loader_of(mixed, share=share, max_bad_fraction=0.5, global_batch_size=19) as loader:
            step = next(loader)
            assert {fault.key for fault in step.quarantined} == {"s2", "s3", "s5", "s6", "s9"}
            assert all(fault.backend == "compiler" and "the limit is 8" in fault.reason for fault in step.quarantined)


def test_shares_are_cached_while_they_are_cut_alike(mixed: Path):
    """Alone in its microbatch, a clip is cut alike in every epoch."""
    cut = {"pack": False, "micro_batch_rows": 1, "global_batch_size": 19}
    assert steps_of(loader_of(mixed, **cut), 1)[0].masked == 0
    for rank in range(2):
        with loader_of(mixed, share=FrameShare(rank, 2), **cut) as loader:
            step = next(loader)
            asked = sum(len(batch.frames_NCHW) > 0 for batch in step.microbatches)
            assert 0 < asked < len(step.microbatches)
            assert (loader.counters()["clips_decoded"], loader.counters()["clips_cached"]) == (asked, 0)
            next(loader)  # all of the next epoch
            assert (loader.counters()["clips_decoded"], loader.counters()["clips_cached"]) == (asked, asked)


@pytest.mark.parametrize("multiple", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("data_ranks", [1, 2])
def test_steps_of_a_multiple_of_microbatches(mixed: Path, data_ranks: int, multiple: int):
    alone = steps_of(loader_of(mixed, pack=False), 4)
    parts = [
        steps_of(loader_of(mixed, rank, data_ranks, multiple=multiple, pack=False), 4) for rank in range(data_ranks)
    ]
    for whole, *steps in zip(alone, *parts, strict=True):
        merged: dict[str, str] = {}
        needed = -(-6 // (2 * data_ranks))
        for step in steps:
            batches = step.microbatches
            assert len(batches) == -(-needed // multiple) * multiple
            rows = [sum(bool(keys) for keys in batch.keys) for batch in batches]
            assert rows == sorted(rows, reverse=True) and max(rows) <= 2 and max(rows) - min(rows) <= 1
            for batch in batches[len([count for count in rows if count]) :]:
                assert_padding(batch)
            merged |= content(step)
        assert merged == content(whole)


def test_a_step_without_microbatches_is_refused(mixed: Path):
    with pytest.raises(ConfigError, match="microbatch_multiple=0"):
        loader_of(mixed, multiple=0)


def assert_padding(batch: Batch) -> None:
    assert batch.rows == 1 and batch.frames == 0 and batch.frames_NCHW.shape == (0, 3, 64, 64)
    assert (batch.segments_RT == -1).all() and (batch.labels_RT == -100).all()
