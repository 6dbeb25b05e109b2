"""What a token sees and when a frame is looked at: offline, windowed and blocked streams, and that nothing leaks."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_cases import compiled, confirm, layout, parts_of, say, stream, tokenizer, user
from stream_strategies import CONFIGS, compiled_or_refused, streams

from moss_train.errors import ConfigError
from moss_train.streams.compiled import IGNORED_LABEL, Kind
from moss_train.streams.compiler import compile_sample
from moss_train.streams.config import AugmentationConfig, CompilerConfig
from moss_train.streams.media import MediaInfo
from moss_train.streams.schema import parse_sample
from moss_train.streams.split import RowBudget

SLOW = {"tokens_per_second": 2.0}
LONG = "It is red and blue now."  # six tokens: three slots of a second


def test_frames_that_arrive_during_a_reply():
    data = stream(user(0.0), say(2.0, LONG), end_s=7.0)
    overlapped = compiled(data, CompilerConfig(**SLOW))
    blocked = compiled(data, CompilerConfig(**SLOW, perceive="blocked"))
    assert layout(overlapped).endswith("_ #_ #_ #It is # red and # blue now #._ #_ |")
    assert layout(blocked).endswith("_ #_ #_ #It is red and blue now._ #_ #_ #_ #_ |")
    notes = [(slot.note, slot.state) for slot in blocked.slots[3:]]
    assert notes == [("", "speak"), ("blocked", "unknown"), ("blocked", "unknown"), ("", "silence"), ("", "silence")]
    kinds = [Kind(blocked.kinds[slot.position]) for slot in blocked.slots[3:]]
    assert kinds == [Kind.ONSET, Kind.IGNORED, Kind.IGNORED, Kind.IDLE_SILENCE, Kind.IDLE_SILENCE]
    # no token of the reply sees a frame that arrived after the decision to give it
    said = range(blocked.slots[3].position, blocked.slots[4].position)
    assert {int(blocked.visible_hi[position]) for position in said} == {3}
    trained = [row.ids[1:][row.kinds[:-1] > 0] for row in (overlapped, blocked)]
    silence = tokenizer().special.silence
    assert trained[0][trained[0] != silence].tolist() == trained[1][trained[1] != silence].tolist()


def test_the_user_cuts_a_reply_of_a_blocked_stream():
    data = stream(user(0.0), say(1.0, LONG), user(3.5, "Stop."), say(3.5, "Yes."), end_s=5.0)
    row = compiled(data, CompilerConfig(**SLOW, perceive="blocked"))
    assert layout(row).endswith("_ #_ #It is red and blue #_ #_ | U:Stop. A Yes._ #_ |")
    assert [slot.note for slot in row.slots] == ["", "", "", "blocked", "blocked", "", ""]


@pytest.mark.parametrize("form", ["chunks", "words"])
def test_exact_times_with_a_pause_in_a_blocked_stream(form):
    parts = [(1.0, "It is"), (2.0, " red"), (4.0, " and"), (5.0, " blue.")]
    exact = [[t, text] for t, text in parts] if form == "chunks" else [[t, t, text] for t, text in parts]
    data = stream(say(1.0, "It is red and blue.", **{form: exact}), end_s=7.0)
    row = compiled(data, CompilerConfig(perceive="blocked"))
    assert layout(row).endswith(" A _ #_ #It is red_ #_ #_ # and blue._ #_ #_ |")
    assert [slot.note for slot in row.slots if slot.frame >= 0] == [""] * 7  # of each two frames the last one decides


@settings(max_examples=30, deadline=None)
@given(streams(), CONFIGS, st.integers(10, 60))
def test_blocked_rows_say_the_same_and_can_be_split(data, config, tokens):
    config = replace(config, jitter_probability=0.0)
    free = compiled_or_refused(data, config)
    row = compiled_or_refused(data, replace(config, perceive="blocked"))
    special = tokenizer().special
    quiet = (special.silence, special.anchor)
    assert row.ids[~np.isin(row.ids, quiet)].tolist() == free.ids[~np.isin(free.ids, quiet)].tolist()
    assert len(row.frames) == len(free.frames) and len(row.slots) == len(free.slots)
    for slot in row.slots:
        assert slot.state != "continue"
        if slot.note == "blocked":
            assert row.labels[slot.position] == IGNORED_LABEL and row.ids[slot.position + 1] == special.silence
    # silences that end replies are the same ones
    assert (row.kinds == Kind.STOP_SILENCE).sum() == (free.kinds == Kind.STOP_SILENCE).sum()
    longest = max(b.position - a.position for a, b in zip(row.slots, [*row.slots[1:], row.slots[-1]], strict=True))
    budget = RowBudget(len(row.ids) // 2 + longest + 40 + tokens, len(row.frames))
    parts = parts_of(data, budget, replace(config, perceive="blocked", window=None))
    labels = [part.labels[part.labels != IGNORED_LABEL] for part in parts]
    assert np.concatenate(labels).tolist() == row.labels[row.labels != IGNORED_LABEL].tolist()


def test_offline_tokens_see_every_frame():
    data = stream(user(0.0), say(2.0, "It is red."), end_s=5.0)
    row, streaming = compiled(data, CompilerConfig(visibility="offline")), compiled(data)
    assert set(row.visible_hi.tolist()) == {5} and not row.visible_lo.any()
    for name in ("ids", "labels", "kinds", "positions", "cross_positions", "frame_positions"):
        assert getattr(row, name).tolist() == getattr(streaming, name).tolist()


RANGES = {"window_range": [2, 4], "sink_range": [0, 2], "text_window_range": [5, 9], "text_sink_range": [1, 3]}


def test_windows_are_drawn_within_their_ranges():
    data = stream(user(0.0), say(2.0, LONG), end_s=12.0)
    config = CompilerConfig(augment=AugmentationConfig(**RANGES))
    seen = {name: set() for name in RANGES}
    for seed in range(60):
        row = compiled(data, config, np.random.default_rng(seed))
        again = compiled(data, config, np.random.default_rng(seed))
        assert (again.sinks, again.text_sinks) == (row.sinks, row.text_sinks)
        assert again.visible_lo.tolist() == row.visible_lo.tolist() and again.text_lo.tolist() == row.text_lo.tolist()
        seen["window_range"].add(int((row.visible_hi - row.visible_lo).max()))
        seen["text_window_range"].add(int((np.arange(len(row.ids)) + 1 - row.text_lo).max()))
        seen["sink_range"].add(row.sinks)
        seen["text_sink_range"].add(row.text_sinks)
    assert seen == {name: set(range(lo, hi + 1)) for name, (lo, hi) in RANGES.items()}
    plain = compiled(data, config)  # without a generator: what evaluation sees
    assert not plain.visible_lo.any() and not plain.text_lo.any() and plain.sinks == plain.text_sinks == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"visibility": "all"}, "compiler.visibility='all' is none of streaming, offline"),
        (
            {"visibility": "offline", "window": 3},
            "compiler.visibility='offline' sees all frames of a row",
        ),
        ({"perceive": "later"}, "compiler.perceive='later' is none of"),
        ({"perceive": "blocked", "jitter_probability": 0.5}, "compiler.jitter_probability=0.5 has no effect with"),
        ({"confirmation_weight": -1.0}, "compiler.confirmation_weight=-1.0 must"),
        ({"think": "loud"}, "compiler.think='loud' is none of keep, drop"),
        ({"augment": AugmentationConfig(window_range=[3])}, r"compiler.augment.window_range=\[3\] must be \[lo, hi\]"),
        ({"augment": AugmentationConfig(window_range=[3, 2])}, r"window_range=\[3, 2\] must be"),
        ({"augment": AugmentationConfig(window_range=[0, 2])}, r"window_range=\[0, 2\] must be"),
        ({"augment": AugmentationConfig(sink_range=[0, 2])}, "sink_range=.* has no effect without a window"),
        ({"augment": AugmentationConfig(text_sink_range=[0, 2])}, "text_sink_range=.* has no effect without"),
        ({"augment": AugmentationConfig(keep_silence=1.5)}, "keep_silence=1.5 must lie"),
        ({"augment": AugmentationConfig(corruption=-0.1)}, "corruption=-0.1 must lie"),
        ({"augment": AugmentationConfig(variants=0)}, "variants=0 must lie"),
        ({"augment": AugmentationConfig(interruption_texts=[])}, "interruption_texts=.* is empty"),
        ({"augment": AugmentationConfig(corruption_texts=[" "])}, "corruption_texts=.* holds a blank"),
    ],
)
def test_illegal_configurations(fields, message):
    with pytest.raises(ConfigError, match=message):
        CompilerConfig(**fields).validate()


# --- nothing of what comes later is known before -----------------------------------------------------------------

LEAK_CONFIGS = st.builds(
    CompilerConfig,
    tokens_per_second=st.sampled_from([0.5, 3.5, 38.0]),
    jitter_probability=st.sampled_from([0.0, 0.5]),
    jitter_shifts=st.sampled_from([[-1], [-1, 2]]),
    window=st.sampled_from([None, 2]),
    text_window=st.sampled_from([None, 4]),
    positions=st.sampled_from(["shared", "decoupled"]),
    perceive=st.sampled_from(["overlapped", "blocked"]),
    confirmation_weight=st.sampled_from([1.0, 0.25, 0.0]),
    stale_silence_guard=st.just(False),  # by its rule a later revision speaks of silences before it
    augment=st.builds(
        AugmentationConfig,
        window_range=st.sampled_from([None, [1, 4]]),
        text_window_range=st.sampled_from([None, [3, 9]]),
        keep_silence=st.sampled_from([1.0, 0.4]),
        keep_silence_within_s=st.just(0.0),
    ),
)
FUTURES = st.lists(
    st.builds(
        lambda gap, asks: user(gap, "Stop.") if asks else say(gap, "Later."),
        st.sampled_from([0.1, 0.75, 2.0]),
        st.booleans(),
    ),
    max_size=1,
)


@settings(max_examples=60, deadline=None)
@given(streams(ends_s=(9.5,)), LEAK_CONFIGS, st.integers(4, 34), FUTURES, st.integers(0, 4), st.integers(0, 3))
def test_what_comes_later_changes_nothing_before(data, config, quarter, future, more_frames, seed):
    if config.perceive == "blocked":
        config = replace(config, jitter_probability=0.0)
    cut_s, sampling = quarter / 4, dict(data["sampling"])
    if sampling.get("times_s"):
        sampling["times_s"] = [*sampling["times_s"], *(9.5 + step for step in range(more_frames))]
    sampling["end_s"] = 9.5 + more_frames
    past = [event for event in data["events"] if event["t"] <= cut_s]
    late = [event | {"id": "late", "t": cut_s + event["t"]} for event in future]
    other = data | {"events": [*past, *late], "sampling": sampling}
    rows = [compiled_or_refused(one, config, seed) for one in (data, other)]
    last = _last_known_slot(rows, data, config, cut_s)
    if last < 0:
        return
    special = tokenizer().special
    end = rows[0].slots[last].position + 1
    while rows[0].ids[end] not in (special.anchor, special.end_of_turn):
        end += 1
    if config.jitter_probability > 0:  # by its rule a frame may move as far as the row already goes
        end -= 1 + max(0, *config.jitter_shifts)
    if end <= 0:
        return
    for name in ("ids", "visible_lo", "visible_hi", "text_lo", "positions", "cross_positions"):
        first, second = (getattr(row, name)[:end].tolist() for row in rows)
        assert first == second, name
    for name in ("labels", "kinds", "weights", "contrasts"):
        first, second = (getattr(row, name)[: end - 1].tolist() for row in rows)
        assert first == second, name


def _last_known_slot(rows, data, config, cut_s) -> int:
    """The last slot that is over at the cut; in a blocked stream no reply may run then, which is said at once."""
    slots = rows[0].slots
    over = [index for index in range(len(slots) - 1) if slots[index + 1].time_s <= cut_s]
    last = over[-1] if over else -1
    if config.perceive == "blocked" and last >= 0:
        free = compiled(data, replace(config, perceive="overlapped")).slots
        while last >= 0 and free[last].event_id is not None and not free[last].ends:
            last -= 1  # it goes on, or would have if the user had not cut it
    return last


def test_confirmations_weigh_their_silence():
    data = stream(user(0.0), say(1.0, "Red."), confirm(3.0, "e1"), confirm(4.5, "e1"), end_s=7.0)
    for weight in (1.0, 2.5, 0.0):
        row = compiled(data, CompilerConfig(confirmation_weight=weight))
        marked = [slot for slot in row.slots if slot.note == "confirm"]
        assert [slot.time_s for slot in marked] == [3.0, 5.0]
        for slot in row.slots:
            expected = weight if slot in marked else 1.0
            assert row.weights[slot.position] == expected
            assert (row.labels[slot.position] == IGNORED_LABEL) == (expected == 0.0)
    explicit = compiled(data | {"silence": "explicit"})
    assert [slot.time_s for slot in explicit.slots if slot.state == "silence"] == [3.0, 5.0]


def test_thinned_silences_are_far_from_transitions():
    data = stream(user(0.0), say(5.0, "Red."), confirm(12.0, "e1"), user(20.5, "And?"), end_s=40.0)
    augment = AugmentationConfig(keep_silence=0.3, keep_silence_within_s=2.0)
    near = {0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 10.0, 11.0, 12.0, 13.0, 14.0, 19.0, 20.0, 20.5, 21.0, 22.0}
    kept = []
    for seed in range(40):
        row = compiled(data, CompilerConfig(augment=augment), np.random.default_rng(seed))
        silent = [slot for slot in row.slots if slot.event_id is None]
        thinned = {slot.time_s for slot in silent if slot.note == "thinned"}
        assert not thinned & near
        for slot in silent:
            assert (row.labels[slot.position] == IGNORED_LABEL) == (slot.time_s in thinned)
        far = len(silent) - len([slot for slot in silent if slot.time_s in near])
        kept.append(1 - len(thinned) / far)
    assert 0.2 < np.mean(kept) < 0.4
    assert not any(slot.note for slot in compiled(data, CompilerConfig(augment=augment)).slots if slot.time_s != 12.0)


def test_turn_ends_are_trained_where_no_reply_is_cut():
    data = stream(user(0.0), say(1.0, LONG), user(2.5), say(4.0, "Yes."), user(5.5), end_s=7.0)
    row = compiled(data, CompilerConfig(**SLOW, train_turn_end_streams=True))
    special = tokenizer().special
    ends = [int(position) for position in np.flatnonzero(row.labels == special.end_of_turn)]
    assert [Kind(row.kinds[position]) for position in ends] == [Kind.TEXT, Kind.TEXT]
    assert row.ids[ends].tolist() == [special.silence] * 2 and ends[-1] == len(row.ids) - 2
    plain = compiled(data, CompilerConfig(**SLOW))
    assert not (plain.labels == special.end_of_turn).any() and plain.ids.tolist() == row.ids.tolist()


def test_media_given_whole_are_seen_whole():
    """Windows and sinks are for streams."""
    media = [{"id": "v0", "kind": "video", "member": "mp4", "duration_s": 6.0}]
    talk = [{"role": "user", "content": "<|video|>What is it?"}, {"role": "assistant", "content": "It is red."}]
    conversation = {"schema": "moss_train/conversation@1", "id": "c", "media": media, "messages": talk}
    caption = {"schema": "moss_train/caption@1", "id": "c", "media": media, "text": "It is red."}
    infos = {"v0": MediaInfo(6.0)}
    narrow = CompilerConfig(window=2, sinks=1, text_window=4, augment=AugmentationConfig(window_range=[1, 2]))
    for data in (conversation, caption):
        rows = [
            compile_sample(parse_sample(data, "c"), infos, tokenizer(), config, np.random.default_rng(0))
            for config in (CompilerConfig(), narrow)
        ]
        assert int(rows[0].visible_hi.max()) > 2
        for name in ("ids", "visible_lo", "visible_hi", "text_lo"):
            assert np.array_equal(getattr(rows[0], name), getattr(rows[1], name)), name
        assert (rows[1].sinks, rows[1].text_sinks) == (0, 0)
