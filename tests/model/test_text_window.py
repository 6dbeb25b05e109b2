"""Text windows, sinks and the two axes of positions: backends agree, nothing leaks, streaming equals training."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_cases import pack, stream

from moss_train.data.batch import Batch
from moss_train.engines.memory import measure_step
from moss_train.model import text_window
from moss_train.model.attention import SegmentAttention
from moss_train.streams.sight import Sight

WINDOWS = [(1, 0), (3, 0), (4, 2), (50, 3)]


def rows_of_streams(seed: int) -> list[list[dict]]:
    rng = np.random.default_rng(seed)
    return [
        [stream(rng, frames=4), stream(rng, frames=2, leading=1)],
        [stream(rng, frames=0, leading=5)],
        [stream(rng, frames=5, leading=0)],
    ]


def streams_of(batch: Batch):
    """Row, first token and end of every stream."""
    for row, segments in enumerate(batch.segments_RT.tolist()):
        for segment in sorted(set(segments) - {-1}):
            first = segments.index(segment)
            yield row, first, first + segments.count(segment)


def windowed(batch: Batch, window: int, sinks: int, positions: str = "shared", but: tuple[int, ...] = ()) -> Batch:
    """Every stream of the batch under a text window, `but` those of these numbers; frames stay as visible as they
    are."""
    batch = replace(batch, **{name: getattr(batch, name).clone() for name in vars(batch) if name.endswith("_RT")})
    frame_positions_RF = batch.frame_positions_RF.clone()
    for number, (row, first, end) in enumerate(streams_of(batch)):
        if number in but:
            continue
        anchors = batch.ids_RT[row, first:end].numpy() == batch.ids_RT.max().item()
        hi = batch.visible_hi_RT[row, first:end].numpy()
        first_frame = int(hi[0] - anchors[0])
        places = Sight(None, 0, window, sinks, positions).places(anchors)
        here = np.s_[row, first:end]
        batch.text_lo_RT[here] = torch.from_numpy(places.text_lo) + first
        batch.text_sink_lo_RT[here] = first
        batch.text_sink_hi_RT[here] = torch.from_numpy(np.minimum(places.text_lo, sinks)) + first
        batch.positions_RT[here] = torch.from_numpy(places.positions).long()
        batch.cross_positions_RT[here] = torch.from_numpy(places.cross_positions).long()
        count = int(anchors.sum())
        frame_positions_RF[row, first_frame : first_frame + count] = torch.from_numpy(places.frame_positions).long()
    return replace(batch, frame_positions_RF=frame_positions_RF)


@pytest.mark.parametrize("but", [(), (0, 3)])
@pytest.mark.parametrize("positions", ["shared", "decoupled"])
@pytest.mark.parametrize("window, sinks", WINDOWS)
def test_chunks_equal_a_dense_mask(build, monkeypatch, window, sinks, positions, but):
    """float64; logits 1e-10 and every gradient 1e-8 of the two backends, with chunks shorter than a stream, and
    streams without a window among the others."""
    monkeypatch.setattr(text_window, "CHUNK", 3)
    batch = windowed(pack(rows_of_streams(0), padding=3), window, sinks, positions, but)
    assert len(text_window.plan_windows(batch, torch.device("cpu")).whole) >= bool(but)
    real = (batch.segments_RT >= 0).T
    results = {}
    for attention in ("segments", "dense"):
        model = build(attention=attention).double()
        logits_TRV = model(batch)
        (logits_TRV[real].square().mean()).backward()
        results[attention] = (logits_TRV[real].detach(), {n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(results["segments"][0], results["dense"][0], atol=1e-10, rtol=0)
    all_norm = torch.stack([g.norm() for g in results["dense"][1].values()]).norm()
    for name, gradient in results["dense"][1].items():
        assert torch.isfinite(results["segments"][1][name]).all(), name
        assert (results["segments"][1][name] - gradient).norm() <= 1e-8 * all_norm, name


def test_any_ranges_equal_a_dense_mask(build, monkeypatch):
    """Ranges that follow no rule, drawn token by token: the plan does not rely on windows that only move forward."""
    monkeypatch.setattr(text_window, "CHUNK", 4)
    rng = np.random.default_rng(7)
    batch = windowed(pack(rows_of_streams(1), padding=2), 4, 1)
    for row, first, end in streams_of(batch):
        for token in range(first, end):
            lo = int(rng.integers(first, token + 1))
            batch.text_lo_RT[row, token] = lo
            batch.text_sink_hi_RT[row, token] = int(rng.integers(first, lo + 1))
    with torch.inference_mode():
        outputs = [build(attention=attention)(batch) for attention in ("segments", "dense")]
    real = (batch.segments_RT >= 0).T
    torch.testing.assert_close(outputs[0][real], outputs[1][real], atol=2e-5, rtol=0)


def test_a_window_that_holds_everything_changes_nothing(build):
    """fp32, 1e-5; and without any window the plan of windows is not made."""
    batch = pack(rows_of_streams(2), padding=2)
    wide = windowed(batch, 50, 3)
    assert not text_window.has_text_windows(batch) and not text_window.has_text_windows(wide)
    assert text_window.has_text_windows(windowed(batch, 4, 1))
    narrow = replace(wide, text_lo_RT=wide.text_lo_RT.clone())
    for row, first, end in streams_of(batch):
        narrow.text_lo_RT[row, first:end] = first
    model = build()
    with torch.inference_mode():
        assert torch.equal(model(batch), model(narrow))


def test_memory_grows_with_the_length_of_a_stream_without_a_window_and_not_its_square():
    """A long stream without a window beside one with: plan and attention take at most 2.5 times as much when both are
    twice as long."""

    def taken(tokens: int) -> tuple[int, int]:
        none_RT = torch.zeros(2, tokens, dtype=torch.int32)
        lo_RT = none_RT.clone()
        lo_RT[1] = (torch.arange(tokens) - 127).clamp(min=0)
        ranges = {"text_lo_RT": lo_RT, "text_sink_lo_RT": none_RT, "text_sink_hi_RT": none_RT}
        batch = SimpleNamespace(segments_RT=none_RT, **ranges)
        plan = text_window.plan_windows(batch, torch.device("cpu"))
        q_TRAD, k_TRBD = torch.randn(tokens, 2, 2, 4), torch.randn(tokens, 2, 1, 4)
        attention = SegmentAttention(None, None, windows=plan)
        _, figures = measure_step(lambda: attention.self_attention(0, q_TRAD, k_TRBD, k_TRBD))
        tensors = [x for group in (*plan.whole, *plan.groups) for x in vars(group).values()]
        return sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor)), figures.added

    shorter, longer = taken(1024), taken(2048)
    assert longer[0] < 2.5 * shorter[0] and longer[1] < 2.5 * shorter[1], (shorter, longer)


@pytest.mark.parametrize("positions", ["shared", "decoupled"])
@pytest.mark.parametrize("attention", ["segments", "dense"])
def test_neither_future_nor_evicted_tokens_are_seen(build, attention, positions):
    """Logits of a token stay bit-identical when a later token, a token of another stream, or one that lies beyond the
    reach of all layers together changes; with one that it sees they change."""
    model = build(attention=attention)
    self_layers = model.sizes.text.layers - len(model.sizes.text.cross_layers)
    window = 2
    batch = windowed(pack([[stream(np.random.default_rng(3), frames=4, leading=6)]]), window, 1, positions)
    tokens = batch.ids_RT.shape[1]
    anchor = batch.ids_RT.max()
    reach = self_layers * (window - 1)
    with torch.inference_mode():
        before = model(batch)
        for changed in range(1, tokens):
            if batch.ids_RT[0, changed] == anchor:
                continue
            other = replace(batch, ids_RT=batch.ids_RT.clone())
            other.ids_RT[0, changed] = (other.ids_RT[0, changed] + 1) % (int(anchor) - 1)
            after = model(other)
            same = (after == before).all(-1)[:, 0]
            assert same[:changed].all(), changed
            assert same[changed + reach + 1 :].all(), changed
            assert not same[changed], changed


@pytest.mark.parametrize("positions", ["shared", "decoupled"])
def test_future_frames_change_nothing_on_either_axis(build, positions):
    model = build()
    batch = windowed(pack(rows_of_streams(4), padding=3), 4, 1, positions)
    with torch.inference_mode():
        before = model(batch)
        for index, (row, slot) in enumerate(
            zip(batch.frame_rows_N.tolist(), batch.frame_slots_N.tolist(), strict=True)
        ):
            frames_NCHW = batch.frames_NCHW.clone()
            frames_NCHW[index] = 255 - frames_NCHW[index]
            after = model(replace(batch, frames_NCHW=frames_NCHW))
            blind = (batch.visible_hi_RT <= slot) | (torch.arange(batch.rows)[:, None] != row)
            assert torch.equal(after[blind.T], before[blind.T]), (row, slot)


@pytest.mark.parametrize("positions", ["shared", "decoupled"])
@pytest.mark.parametrize("window, sinks", WINDOWS)
def test_incremental_equals_teacher_forced(build, window, sinks, positions):
    """fp32, 2e-5: a stream that grows token by token under a text window."""
    model = build()
    batch = windowed(pack([[stream(np.random.default_rng(5), frames=4, leading=3)]]), window, sinks, positions)
    anchor = batch.ids_RT.max()
    with torch.inference_mode():
        expected_TV = model(batch)[:, 0]
        state = model.start_streams(1, max_tokens=batch.ids_RT.shape[1], max_frames=4)
        frame = 0
        for token in range(batch.ids_RT.shape[1]):
            if batch.ids_RT[0, token] == anchor:
                places = batch.frame_positions_RF[0, frame : frame + 1]
                model.add_frames(state, batch.frames_NCHW[frame : frame + 1], torch.zeros(1, dtype=torch.long), places)
                frame += 1
            one = np.s_[:, token : token + 1]
            logits_RLV = model.extend(
                state,
                batch.ids_RT[one],
                batch.positions_RT[one],
                torch.tensor([1]),
                visible_lo_RL=batch.visible_lo_RT[one],
                visible_hi_RL=batch.visible_hi_RT[one],
                cross_positions_RL=batch.cross_positions_RT[one],
                text_lo_RL=batch.text_lo_RT[one],
                text_sinks=sinks,
            )
            torch.testing.assert_close(logits_RLV[0, 0], expected_TV[token], atol=2e-5, rtol=0)
