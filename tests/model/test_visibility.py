"""What a token may see: backends agree, nothing leaks, packing and padding are inert, streaming equals training."""

import numpy as np
import pytest
import torch
from model_cases import pack, stream


def rows_of_streams(seed: int, **options) -> list[list[dict]]:
    rng = np.random.default_rng(seed)
    return [
        [stream(rng, frames=4, **options), stream(rng, frames=2, leading=1, **options)],
        [stream(rng, frames=0, leading=5)],
        [stream(rng, frames=5, leading=0, **options)],
    ]


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"window": 2, "sinks": 1}])
@pytest.mark.parametrize("reference_compat", [False, True])
def test_segments_equal_dense(build, options, reference_compat):
    """fp32; loss and every gradient of the two backends."""
    batch = pack(rows_of_streams(0, **options), padding=3)
    real = (batch.segments_RT >= 0).T
    results = {}
    for attention in ("segments", "dense"):
        model = build(attention=attention, reference_compat=reference_compat)
        logits_TRV = model(batch)
        (logits_TRV[real].square().mean()).backward()
        results[attention] = (logits_TRV[real].detach(), {n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(results["segments"][0], results["dense"][0], atol=2e-5, rtol=0)
    all_norm = torch.stack([g.norm() for g in results["dense"][1].values()]).norm()
    for name, gradient in results["dense"][1].items():
        scale = max(gradient.norm(), 1e-4 * all_norm)  # design §5
        assert (results["segments"][1][name] - gradient).norm() <= 5e-5 * scale, name


@pytest.mark.parametrize("options", [{}, {"jitter": True}, {"window": 2}, {"window": 1, "sinks": 2, "jitter": True}])
@pytest.mark.parametrize("attention", ["segments", "dense"])
def test_future_frames_change_nothing(build, options, attention):
    """Perturb frame f: logits of tokens with hi ≤ f, and of every other stream, are bit-identical."""
    model = build(attention=attention)
    rows = rows_of_streams(1, **options)
    batch = pack(rows, padding=3)
    with torch.inference_mode():
        before = model(batch)
        for r, slot in zip(batch.frame_rows_N.tolist(), batch.frame_slots_N.tolist(), strict=True):
            index = int(((batch.frame_rows_N == r) & (batch.frame_slots_N == slot)).nonzero())
            original = batch.frames_NCHW[index].clone()
            batch.frames_NCHW[index] = 255 - original
            after = model(batch)
            batch.frames_NCHW[index] = original
            row_of_token = torch.arange(batch.rows)[:, None]
            segment = segment_of_frame(rows, r, slot)
            may_change = (row_of_token == r) & (batch.segments_RT == segment) & (batch.visible_hi_RT > slot)
            assert torch.equal(after[~may_change.T], before[~may_change.T]), (r, slot)
            assert not torch.equal(after[may_change.T], before[may_change.T]), (r, slot)


def segment_of_frame(rows: list[list[dict]], row: int, slot: int) -> int:
    for segment, s in enumerate(rows[row]):
        slot -= len(s["frames"])
        if slot < 0:
            return segment
    raise AssertionError("no such frame")


def test_the_reference_leak_is_a_leak(build):
    """With `reference_compat`, text before the first frame does change with future frames: the test above can fail."""
    model = build(reference_compat=True)
    batch = pack([[stream(np.random.default_rng(2), frames=3, leading=4)]])
    with torch.inference_mode():
        before = model(batch)
        batch.frames_NCHW[2] = 255 - batch.frames_NCHW[2]
        after = model(batch)
    assert not torch.equal(after[:4], before[:4])


def test_a_token_that_sees_nothing_passes_cross_layers_unchanged(build):
    """Text-only rows give the same logits with and without cross layers' parameters (they add exactly zero)."""
    model = build()
    rows = rows_of_streams(3)
    batch = pack(rows)
    with torch.inference_mode():
        before = model(batch)
        for index in model.sizes.text.cross_layers:
            for parameter in model.decoder_layers[index].parameters():
                parameter.mul_(3.0)
        after = model(batch)
    blind = (batch.visible_hi_RT == 0).T & (batch.segments_RT >= 0).T
    assert blind[:, 1].any() and torch.equal(before[:, 1], after[:, 1])  # row 1 has no frame
    assert torch.equal(before[blind], after[blind])


def test_packed_equals_unpacked(build):
    """fp32: logits of each stream in a packed row equal those of the stream alone in its row, 1e-5."""
    model = build()
    rows = rows_of_streams(4, window=3, sinks=1)
    with torch.inference_mode():
        packed = model(pack(rows, padding=2))
        for r, row in enumerate(rows):
            start = 0
            for s in row:
                alone = model(pack([[s]]))[:, 0]
                torch.testing.assert_close(packed[start : start + len(alone), r], alone, atol=1e-5, rtol=0)
                start += len(alone)


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"window": 2, "sinks": 1}])
@pytest.mark.parametrize("tokens_at_once", [1, 3])
def test_incremental_equals_teacher_forced(build, options, tokens_at_once):
    """fp32, 1e-5: rows of different lengths grow together, frames are added when their anchor comes."""
    model = build()
    rng = np.random.default_rng(5)
    streams = [stream(rng, frames=f, leading=n, **options) for f, n in ((4, 3), (0, 6), (3, 0))]
    batch = pack([[s] for s in streams])
    with torch.inference_mode():
        expected_TRV = model(batch)
        state = model.start_streams(len(streams), max_tokens=batch.ids_RT.shape[1], max_frames=4)
        shown = [0] * len(streams)
        fed = [0] * len(streams)
        while any(n < len(s["ids"]) for n, s in zip(fed, streams, strict=True)):
            lengths = [min(tokens_at_once, len(s["ids"]) - n) for n, s in zip(fed, streams, strict=True)]
            for r, s in enumerate(streams):
                due = int(s["hi"][fed[r] + lengths[r] - 1]) if lengths[r] else shown[r]
                for f in range(shown[r], due):
                    model.add_frames(
                        state, s["frames"][f : f + 1], torch.tensor([r]), torch.from_numpy(s["anchors"][f : f + 1])
                    )
                shown[r] = due
            ids, positions, lo, hi = (torch.zeros(len(streams), tokens_at_once, dtype=torch.int64) for _ in range(4))
            for r, s in enumerate(streams):
                where = slice(fed[r], fed[r] + lengths[r])
                ids[r, : lengths[r]] = torch.from_numpy(s["ids"][where])
                positions[r, : lengths[r]] = torch.arange(fed[r], fed[r] + lengths[r])
                lo[r, : lengths[r]] = torch.from_numpy(s["lo"][where])
                hi[r, : lengths[r]] = torch.from_numpy(s["hi"][where])
            logits_RLV = model.extend(
                state, ids, positions, torch.tensor(lengths), lo, hi, sinks=options.get("sinks", 0)
            )
            for r in range(len(streams)):
                torch.testing.assert_close(
                    logits_RLV[r, : lengths[r]], expected_TRV[fed[r] : fed[r] + lengths[r], r], atol=1e-5, rtol=0
                )
                fed[r] += lengths[r]


def test_a_full_cache_is_an_error(build):
    model = build()
    state = model.start_streams(1, max_tokens=2, max_frames=1)
    frame = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    model.add_frames(state, frame, torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(ValueError, match="max_frames=1"):
        model.add_frames(state, frame, torch.tensor([0]), torch.tensor([1]))
    with pytest.raises(ValueError, match="max_tokens=2"):
        model.extend(state, torch.ones(1, 3, dtype=torch.int64), torch.arange(3)[None], torch.tensor([3]))
