"""Streams on caches that forget: what is left gives the logits that training with the same windows gives."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stream_growth import ANCHOR, dense_logits, feed, grown_rows

from moss_train.model.frame_cache import KeepAll, KeepWindow
from moss_train.streams.sight import Sight

SIGHTS = {
    "all": Sight(),
    "window": Sight(window=3),
    "sinks": Sight(window=2, sinks=2),
    "text": Sight(text_window=5),
    "text sinks": Sight(text_window=4, text_sinks=3),
    "both": Sight(window=2, sinks=1, text_window=6, text_sinks=2),
    "decoupled": Sight(window=3, sinks=1, text_window=7, text_sinks=2, positions="decoupled"),
    "one": Sight(window=1, text_window=1),
}


@pytest.mark.parametrize("sight", SIGHTS.values(), ids=SIGHTS)
def test_incremental_equals_dense_with_eviction(build, sight):
    """fp32, 2e-5: one token at a time, a few at a time in rows that advance unevenly, and long pieces."""
    model = build()
    rows = grown_rows(3, sight)
    expected = [dense_logits(model, row, sight) for row in rows]
    patterns = (lambda rng: 1, lambda rng: int(rng.integers(0, 4)), lambda rng: int(rng.integers(1, 14)))
    for at_once in patterns:
        state = model.start_streams(len(rows), sight=sight)
        for mine, theirs in zip(feed(model, state, rows, sight, at_once), expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)
    for row, theirs in zip(rows, expected, strict=True):  # a row alone takes other paths than rows side by side
        state = model.start_streams(1, sight=sight)
        (mine,) = feed(model, state, [row], sight, patterns[1])
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)


def test_windows_change_logits_and_a_window_that_forgets_too_much_is_refused(build):
    """The comparison above can fail: another window gives other logits. And caches smaller than the window say so."""
    model, wide, narrow = build(), Sight(window=4), Sight(window=3)
    (row,) = grown_rows(3, wide, shape=((9, 3),))
    assert (dense_logits(model, row, wide) - dense_logits(model, row, narrow)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="frames that left: the cache keeps 0 sinks and 3 frames"):
        feed(model, model.start_streams(1, sight=narrow), [row], wide, lambda rng: 1)
    wide, narrow = Sight(text_window=6, text_sinks=2), Sight(text_window=6, text_sinks=1)
    (row,) = grown_rows(3, wide, shape=((9, 3),))
    with pytest.raises(ValueError, match="tokens that left: the cache keeps 1 sinks and 6 tokens"):
        feed(model, model.start_streams(1, sight=narrow), [row], wide, lambda rng: 1)


def test_only_the_last_logits(build):
    model, sight = build(), SIGHTS["both"]
    rows = grown_rows(4, sight)
    whole = feed(model, model.start_streams(4, sight=sight), rows, sight, lambda rng: 3)
    last = feed(model, model.start_streams(4, sight=sight), rows, sight, lambda rng: 3, only_last=True)
    for every, some in zip(whole, last, strict=True):
        at = [*range(2, len(every), 3)] + ([len(every) - 1] if len(every) % 3 else [])
        torch.testing.assert_close(some, every[at], atol=1e-5, rtol=0)


class EveryThird:
    """A policy of a user: every third frame stays for ever, and the latest two."""

    most = None

    def leaving(self, held, arriving):
        return [frame for frame in held if frame % 3 and frame < arriving - 1]


def test_a_policy_of_ones_own(build):
    model, sight, policy = build(), Sight(), EveryThird()
    (row,) = grown_rows(5, sight, shape=((14, 2),))
    expected = dense_logits(model, row, sight, stays=lambda frame, hi: frame % 3 == 0 or frame >= hi - 2)
    state = model.start_streams(1, sight=sight, keep=policy)
    (mine,) = feed(model, state, [row], sight, lambda rng: 2)
    torch.testing.assert_close(mine, expected, atol=2e-5, rtol=0)
    assert state.frames.held_R.tolist() == [6]  # 0, 3, 6, 9, 12 and 13

    class Liar(EveryThird):
        def leaving(self, held, arriving):
            return [99] if arriving else []

    with pytest.raises(ValueError, match="lets frame 99 leave, which is not held"):
        feed(model, model.start_streams(1, keep=Liar()), [row], sight, lambda rng: 1)


def test_memory_is_constant_with_windows_and_doubles_without(build):
    model = build()
    sight = Sight(window=4, sinks=1, text_window=8, text_sinks=2)
    rows = grown_rows(6, sight, shape=((60, 3),))
    state = model.start_streams(1, sight=sight)
    before = state.cache_bytes()
    feed(model, state, rows, sight, lambda rng: 1)
    assert state.cache_bytes() == before and state.frames.held_R.tolist() == [5]

    free, bounded = model.start_streams(1), model.start_streams(1, max_tokens=300, max_frames=60)
    sight = Sight()
    rows = grown_rows(6, sight, shape=((60, 3),))
    for state in (free, bounded):
        feed(model, state, rows, sight, lambda rng: 1)
    places = [{x.shape[2] for pair in s.frames.of_layer.values() for x in pair} for s in (free, bounded)]
    assert places == [{64}, {60}]


def test_one_token_reads_caches_as_they_lie(build, monkeypatch):
    """No mask, no repeated keys and values, whatever the history: also with windows, once they are full."""
    calls = []
    attention = F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, **more):
        calls.append((k.shape[1], k.shape[2], attn_mask is None and not more.get("enable_gqa"), k.untyped_storage()))
        return attention(q, k, v, attn_mask=attn_mask, **more)

    model = build()
    for sight in (Sight(), SIGHTS["both"]):
        rows = grown_rows(7, sight, shape=((8, 4),))
        state = model.start_streams(1, sight=sight)
        rows[0].ids[-1] = 5 if rows[0].ids[-1] == ANCHOR else rows[0].ids[-1]
        feed(model, state, rows, sight, lambda rng: 1)
        stored = {
            x.untyped_storage().data_ptr() for c in (state.frames, state.text) for p in c.of_layer.values() for x in p
        }
        monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
        calls.clear()
        places = sight.places(np.array([False]), len(rows[0].ids), 8)
        ranges = (torch.from_numpy(x)[None] for x in (places.visible_lo, places.visible_hi))
        model.extend(
            state, torch.tensor([[3]]), torch.from_numpy(places.positions)[None].long(), torch.tensor([1]), *ranges,
            sight.sinks, text_lo_RL=torch.from_numpy(places.text_lo)[None], text_sinks=sight.text_sinks,
        )  # fmt: skip
        monkeypatch.undo()
        assert len(calls) == 5
        for heads, _, plain, storage in calls:
            assert heads == 2 and plain and storage.data_ptr() in stored
        frames = 8 if sight.window is None else 3
        tokens = len(rows[0].ids) + 1 if sight.text_window is None else 8
        assert sorted({length for _, length, _, _ in calls}) == sorted({tokens, frames * model.sizes.tokens_per_frame})


def test_policies_say_who_leaves():
    assert list(KeepAll().leaving([0, 1, 2], 3)) == []
    window = KeepWindow(window=2, sinks=1)
    held = []
    for arriving in range(6):
        for frame in list(window.leaving(held, arriving)):
            held.remove(frame)
        held.append(arriving)
        assert held == sorted({*range(min(1, arriving + 1)), *range(max(0, arriving - 1), arriving + 1)})
    assert window.most == 3
