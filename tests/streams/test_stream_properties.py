"""Properties of every compiled stream, on random timelines at random rates."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_cases import compiled, layout, say, stream, tokenizer
from stream_strategies import CONFIGS, compiled_or_refused, streams

from moss_train.streams.compiled import IGNORED_LABEL, Kind
from moss_train.streams.config import CompilerConfig
from moss_train.streams.schema import parse_sample


@settings(max_examples=200, deadline=None)
@given(streams(), CONFIGS, st.integers(0, 3))
def test_visibility_labels_and_slots(data, config, seed):
    row, special = compiled_or_refused(data, config, seed), tokenizer().special
    is_anchor = row.ids == special.anchor
    length = len(row.ids)
    assert {
        len(array) for array in (row.labels, row.kinds, row.weights, row.visible_lo, row.visible_hi, row.positions)
    } == {length}
    # visibility: monotone, counts the anchors so far, bounded by the window
    assert (np.diff(row.visible_hi) >= 0).all() and (np.diff(row.visible_lo) >= 0).all()
    assert row.visible_hi.tolist() == [int(is_anchor[: t + 1].sum()) for t in range(length)]
    assert (row.visible_lo <= row.visible_hi).all()
    if config.window:
        assert (row.visible_hi - row.visible_lo).max() <= config.window
    else:
        assert not row.visible_lo.any()
    assert row.frame_positions.tolist() == np.flatnonzero(is_anchor).tolist()
    assert len(row.frames) == is_anchor.sum() and row.positions.tolist() == list(range(length))
    # labels: the next token or nothing, never an anchor, a turn end or a header
    assert row.labels[-1] == IGNORED_LABEL
    trained = np.flatnonzero(row.labels != IGNORED_LABEL)
    assert (row.labels[trained] == row.ids[trained + 1]).all()
    assert not np.isin(row.labels, [special.anchor, special.end_of_turn, special.start_header]).any()
    assert ((row.kinds == Kind.IGNORED) == (row.labels == IGNORED_LABEL)).all()
    assert ((row.weights > 0) == (row.labels != IGNORED_LABEL)).all()
    silent = np.isin(row.kinds, [Kind.IDLE_SILENCE, Kind.STOP_SILENCE])
    assert (row.labels[silent] == special.silence).all()
    assert not (row.labels[np.isin(row.kinds, [Kind.TEXT, Kind.ONSET, Kind.REVISION])] == special.silence).any()
    # slots: one for each anchor in order, one for each header; what they decide stands right after them
    assert [slot.frame for slot in row.slots if slot.frame >= 0] == list(range(len(row.frames)))
    assert all(
        first.position < second.position and first.time_s <= second.time_s for first, second in pairwise(row.slots)
    )
    for slot in row.slots:
        assert row.visible_hi[slot.position] == sum(
            earlier.frame >= 0 for earlier in row.slots[: row.slots.index(slot) + 1]
        )
        if slot.state == "silence":
            assert row.labels[slot.position] == special.silence and not slot.text


@settings(max_examples=150, deadline=None)
@given(streams(), CONFIGS)
def test_what_is_said_is_the_reply_or_its_beginning(data, config):
    config.jitter_probability = 0.0
    row, sample = compiled_or_refused(data, config), parse_sample(data, "key")
    users = [event.t for event in sample.events if event.role == "user"]
    for event in sample.events:
        if event.role == "user" or event.kind in ("silence", "confirm"):
            continue
        slots = [slot for slot in row.slots if slot.event_id == event.id]
        said = "".join(slot.text for slot in slots)
        if not any("\ufffd" in slot.text for slot in slots):  # a frame may fall inside a character
            assert event.text.startswith(said) and said
        ids = [int(t) for slot in slots for t in row.ids[slot.position + 1 :][: len_of(row, slot)]]
        exact = event.chunks or event.words
        if tokenizer().decode(ids) != event.text:
            assert any(t >= event.t for t in users)  # only a user event cuts a reply
            assert exact or not slots[-1].ends  # the cut may fall into a pause only where times are exact
        elif not exact:
            assert slots[-1].ends  # said in full, even if the user event comes in the same slot
        for slot, following in pairwise(row.slots):
            if slot in slots and not slot.ends and following.frame >= 0:
                assert (following.event_id, following.state) == (event.id, "continue")  # no silence inside running text
        assert slots[0].time_s >= event.t - 1e-6 and slots[0].state == "speak"  # never before its time
        if event.train and not event.stale:
            labels = [int(row.labels[slot.position + step]) for slot in slots for step in range(len_of(row, slot))]
            assert labels == ids  # every token of it is trained, and nothing else


def len_of(row, slot) -> int:
    """Tokens said in a slot, without its silence."""
    special = tokenizer().special
    length = 0
    while row.ids[slot.position + 1 + length] not in (special.anchor, special.silence, special.end_of_turn):
        length += 1
    return length


@settings(max_examples=100, deadline=None)
@given(streams(), CONFIGS, st.integers(0, 3))
def test_jitter_moves_frames_only_earlier_and_by_one_token(data, config, seed):
    moved = compiled_or_refused(data, config, seed)
    config.jitter_probability = 0.0
    still = compiled(data, config)
    shift = still.frame_positions - moved.frame_positions
    assert set(shift.tolist()) <= {0, 1}
    assert (moved.visible_hi >= still.visible_hi).all()
    same_but_for_the_anchors(moved, still)


def same_but_for_the_anchors(moved, still):
    anchor = tokenizer().special.anchor
    assert moved.ids[moved.ids != anchor].tolist() == still.ids[still.ids != anchor].tolist()
    assert sorted(moved.kinds.tolist()) == sorted(still.kinds.tolist())


@settings(max_examples=60, deadline=None)
@given(streams(), st.lists(st.integers(-3, 3).filter(bool), min_size=1, max_size=4), st.sampled_from([2.0, 3.5]))
def test_jitter_both_ways_keeps_frames_inside_their_reply(data, shifts, rate):
    config = CompilerConfig(tokens_per_second=rate, jitter_probability=1.0, jitter_shifts=shifts)
    moved, special = compiled_or_refused(data, config, 1), tokenizer().special
    still = compiled(data, replace(config, jitter_probability=0.0))
    same_but_for_the_anchors(moved, still)
    moves = moved.frame_positions - still.frame_positions
    assert min(0, *shifts) <= moves.min() and moves.max() <= max(0, *shifts)
    for position in moved.frame_positions[moves != 0]:
        # inside a reply: text before it, text or the silence that ends it behind it, and no other frame beside it
        around = [int(moved.ids[position - 1]), int(moved.ids[position + 1])]
        assert special.anchor not in around and around[0] not in (special.silence, special.end_of_turn)
    # frames are never moved across a decision: where a reply starts, and where silence is kept, nothing changes
    for one, other in zip(moved.slots, still.slots, strict=True):
        if other.state in ("speak", "silence") and other.frame >= 0 and other.note == "":
            assert moved.visible_hi[one.position] == still.visible_hi[other.position]
            assert moved.labels[one.position] == still.labels[other.position]


def test_a_frame_moves_as_far_as_it_is_told():
    data = stream(say(1.0, "It is red and blue now and then."), end_s=4.0)
    texts = {}
    for shift in (-9, -1, 1, 2, 9):
        config = CompilerConfig(tokens_per_second=4.0, jitter_probability=1.0, jitter_shifts=[shift])
        texts[shift] = layout(compiled(data, config, np.random.default_rng(0))).split(" A ")[1].split("|")[0]
    assert texts == {
        -9: "_ #_ #It # is # red and blue now and then._ ",
        -1: "_ #_ #It is red # and blue now and # then._ ",
        1: "_ #_ #It is red and blue # now and then. #_ ",
        2: "_ #_ #It is red and blue now # and then. #_ ",
        9: "_ #_ #It is red and blue now and # then. #_ ",
    }
