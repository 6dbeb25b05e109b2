"""Collation: packed rows hold their streams unchanged, each seeing its own frames only."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_train.data.collate import collate, padding_of_batches
from moss_train.streams.compiled import IGNORED_LABEL, CompiledStream, FrameRequest


def random_stream(draw: np.random.Generator, key: str, tokens: int, frames: int, sinks: int = 0) -> CompiledStream:
    hi = np.sort(draw.integers(0, frames + 1, tokens)).astype(np.int32)
    return CompiledStream(
        key=key,
        kind="stream",
        ids=draw.integers(1, 1000, tokens).astype(np.int32),
        labels=np.where(draw.random(tokens) < 0.5, IGNORED_LABEL, 7).astype(np.int32),
        kinds=draw.integers(0, 7, tokens).astype(np.uint8),
        weights=draw.random(tokens).astype(np.float32),
        visible_lo=np.maximum(hi - 3, 0).astype(np.int32),
        visible_hi=hi,
        positions=np.arange(tokens, dtype=np.int32),
        text_lo=np.maximum(np.arange(tokens) - 4, 0).astype(np.int32),
        cross_positions=draw.integers(0, 9, tokens).astype(np.int32),
        contrasts=np.full(tokens, -1, np.int32),
        frame_positions=np.sort(draw.integers(0, tokens, frames)).astype(np.int32),
        frames=tuple(FrameRequest("v0", float(n)) for n in range(frames)),
        sinks=sinks,
        text_sinks=sinks,
    )


def test_padding_is_what_no_stream_fills():
    draw = np.random.default_rng(0)

    def row_of(*lengths: tuple[int, int]):
        return [
            (random_stream(draw, "s", tokens, frames), torch.zeros((frames, 3, 4, 4), dtype=torch.uint8))
            for tokens, frames in lengths
        ]

    full = collate([row_of((3, 1), (5, 1))], 4)
    ragged = collate([row_of((8, 4)), row_of((4, 1))], 4)
    assert padding_of_batches([full]) == (0.0, 0.0)
    assert padding_of_batches([ragged]) == (1 - 12 / 16, 1 - 5 / 8)
    text, frame = padding_of_batches([full, ragged, collate([[]], 4)])
    assert (text, frame) == (1 - 20 / 25, 1 - 7 / 10), "a microbatch of padding alone has one empty place for text"
    assert padding_of_batches([collate([row_of((2, 0))], 4)]) == (0.0, 0.0)


shapes = st.lists(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 6)), max_size=4), min_size=1, max_size=4)


@given(shapes, st.integers(0, 3), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_every_stream_is_found_again(rows, sinks: int, seed: int):
    draw = np.random.default_rng(seed)
    made = [
        [
            (
                random_stream(draw, f"{r}-{s}", tokens, frames, sinks),
                torch.full((frames, 3, 4, 4), 10 * r + s, dtype=torch.uint8),
            )
            for s, (tokens, frames) in enumerate(row)
        ]
        for r, row in enumerate(rows)
    ]
    batch = collate(made, image_size=4)
    assert batch.rows == len(rows) and batch.frames_NCHW.shape[1:] == (3, 4, 4)
    assert batch.keys == tuple(tuple(stream.key for stream, _ in row) for row in made)
    assert batch.frame_counts_R.tolist() == [sum(f for _, f in row) for row in rows]
    for r, row in enumerate(made):
        start = first = 0
        for s, (stream, frames) in enumerate(row):
            here = slice(start, start + len(stream.ids))
            assert batch.ids_RT[r, here].tolist() == stream.ids.tolist()
            assert batch.labels_RT[r, here].tolist() == stream.labels.tolist()
            assert batch.kinds_RT[r, here].tolist() == stream.kinds.tolist()
            assert batch.weights_RT[r, here].tolist() == stream.weights.tolist()
            assert batch.positions_RT[r, here].tolist() == stream.positions.tolist()
            assert (batch.segments_RT[r, here] == s).all()
            for t in range(len(stream.ids)):
                seen = visible(batch, r, start + t)
                lo, hi = int(stream.visible_lo[t]), int(stream.visible_hi[t])
                own = set(range(lo, hi)) | set(range(min(stream.sinks, hi)))
                assert seen == {first + frame for frame in own}
            of_row = [n for n in range(len(batch.frame_rows_N)) if batch.frame_rows_N[n] == r]
            for frame in range(len(frames)):
                n = of_row[first + frame]
                assert batch.frame_slots_N[n] == first + frame and (batch.frames_NCHW[n] == 10 * r + s).all()
                assert batch.frame_positions_RF[r, first + frame] == stream.frame_positions[frame]
            start += len(stream.ids)
            first += len(frames)
        assert (batch.segments_RT[r, start:] == -1).all() and (batch.labels_RT[r, start:] == IGNORED_LABEL).all()
        assert not any(visible(batch, r, t) for t in range(start, batch.ids_RT.shape[1]))
        assert (batch.weights_RT[r, start:] == 0).all()


def visible(batch, row: int, token: int) -> set[int]:
    """The frames a token sees; the two ranges never overlap, so that no frame is counted twice."""
    main = set(range(int(batch.visible_lo_RT[row, token]), int(batch.visible_hi_RT[row, token])))
    sinks = set(range(int(batch.sink_lo_RT[row, token]), int(batch.sink_hi_RT[row, token])))
    assert not main & sinks and batch.sink_hi_RT[row, token] <= batch.visible_hi_RT[row, token]
    return main | sinks


def test_text_only_and_padding_only_batches():
    draw = np.random.default_rng(0)
    text = (random_stream(draw, "t", 5, 0), torch.zeros((0, 3, 56, 56), dtype=torch.uint8))
    batch = collate([[text], []])
    assert batch.frames_NCHW.shape == (0, 3, 56, 56) and batch.frame_positions_RF.shape == (2, 0)
    assert batch.frame_rows_N.shape == (0,) and batch.frame_rows_N.dtype == torch.int64 == batch.frame_slots_N.dtype
    empty = collate([], image_size=56)
    assert (
        empty.ids_RT.shape == (1, 1) and (empty.segments_RT == -1).all() and empty.frames_NCHW.shape == (0, 3, 56, 56)
    )


def test_dtypes():
    draw = np.random.default_rng(0)
    batch = collate([[(random_stream(draw, "a", 5, 2), torch.zeros((2, 3, 8, 8), dtype=torch.uint8))]], sources=[["s"]])
    assert batch.sources == (("s",),)
    for name in ("ids_RT", "labels_RT", "positions_RT", "frame_rows_N", "frame_slots_N", "frame_positions_RF"):
        assert getattr(batch, name).dtype == torch.int64, name
    for name in ("segments_RT", "visible_lo_RT", "visible_hi_RT", "sink_lo_RT", "sink_hi_RT"):
        assert getattr(batch, name).dtype == torch.int32, name
    assert batch.kinds_RT.dtype == torch.uint8 == batch.frames_NCHW.dtype and batch.weights_RT.dtype == torch.float32


def test_frames_that_do_not_fit_the_requests_are_refused():
    stream = random_stream(np.random.default_rng(0), "a", 5, 2)
    with pytest.raises(ValueError, match="'a' asks for 2 frames and was given 1"):
        collate([[(stream, torch.zeros((1, 3, 8, 8), dtype=torch.uint8))]])
