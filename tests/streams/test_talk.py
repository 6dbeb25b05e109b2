"""One speaks at a time: what crowded annotations become, and that it always compiles."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stream_cases import compiled

from moss_train.errors import SampleError
from moss_train.streams.importers.talk import LONGEST_WAIT_S, Saying, Watch, hold_talk, spoken_s, watch_until

TEXTS = st.sampled_from(["Go #.", "It is # now.", "A long sentence of # that takes a while to be said.", "他正在#né"])
NUMBERS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen".split()


def replies(*sayings: Saying, end_s: float = 12.0) -> list[tuple[float, str]]:
    events = hold_talk(list(sayings), Watch(1.0, 0.0, end_s), "key")
    return [(event["t"], event["text"]) for event in events]


def says(t: float, text: str, evidence=None) -> Saying:
    return Saying("assistant", t, text, "row[0]", evidence)


def asks(t: float, text: str = "What?") -> Saying:
    return Saying("user", t, text, "row[0]")


def test_replies_start_at_the_first_frame_that_is_free():
    assert replies(says(1.2, "One."), says(4.0, "Two.")) == [(2.0, "One."), (4.0, "Two.")]
    assert replies(says(4.0, "Two."), says(1.2, "One.")) == [(2.0, "One."), (4.0, "Two.")]  # sorted
    long = "word " * 30  # 150 characters: at most 103 tokens, at 38 a second
    assert spoken_s(long) == pytest.approx(103 / 38)
    assert replies(says(1.0, long), says(2.5, "Two.")) == [(1.0, long), (4.0, "Two.")]


def test_replies_of_one_frame_are_one():
    assert replies(says(1.2, "One."), says(1.9, "Two."), says(2.0, "One.")) == [(2.0, "One. Two.")]
    events = hold_talk([says(1.5, "One.", (0.5, 1.5)), says(1.9, "Two.", (1.0, 1.9))], Watch(1.0, 0.0, 9.0), "key")
    assert events[0]["evidence"] == [0.5, 1.9]


def test_what_is_due_after_the_last_frame_is_said_at_it():
    assert replies(says(11.5, "End."), says(11.9, "Over.")) == [(11.0, "End. Over.")]
    event = hold_talk([says(11.9, "End.", (10.0, 11.9))], Watch(1.0, 0.0, 12.0), "key")[0]
    assert event["evidence"] == [10.0, 11.0]  # never after the reply


def test_questions_wait_for_the_reply_before_them_and_answers_for_their_question():
    # due at frame 2, so the question of 1.5 s comes after it, and the answer at its own frame
    spoken = 2.0 + spoken_s("One.")
    assert replies(says(1.2, "One."), asks(1.5), says(2.0, "Two.")) == [
        (2.0, "One."), (spoken, "What?"), (3.0, "Two.")]  # fmt: skip
    assert replies(asks(1.5), says(1.5, "At once.")) == [(1.5, "What?"), (1.5, "At once.")]
    assert replies(asks(11.7), says(11.9, "Late.")) == [(11.7, "What?"), (11.7, "Late.")]  # no frame is left


def test_more_than_can_be_said_is_refused():
    with pytest.raises(SampleError, match=r"row\[0\]: what is said before it leaves no room until"):
        replies(says(0.0, "word " * 200), says(2.0, "Two."), end_s=60.0)


@pytest.mark.parametrize("fps", [0.5, 1.0, 2.0, 29.97])
@pytest.mark.parametrize(("last_s", "from_s"), [(0.0, 0.0), (7.3, 0.0), (7.3, 5.1), (3600.01, 3590.0)])
def test_the_last_frame_of_an_unknown_length_is_the_last_annotation(fps, last_s, from_s):
    watch = watch_until(last_s, fps, from_s)
    assert watch.time(watch.frames() - 1) == pytest.approx(last_s, abs=1e-9)
    assert from_s - 1e-9 <= watch.start_s < from_s + 1 / fps and watch.start_s >= 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 79), TEXTS), min_size=1, max_size=14),
    st.sampled_from([0.5, 1.0, 2.0, 3.3]),
)
def test_whatever_is_said_compiles_in_order_and_in_full(given_sayings, fps):
    sayings = [
        Saying("user" if asks else "assistant", t / 4, text.replace("#", NUMBERS[number]), "x")
        for number, (asks, t, text) in enumerate(given_sayings)
    ]
    watch = Watch(fps, 0.0, 20.0)
    try:
        events = hold_talk(sayings, watch, "key")
    except SampleError as error:
        assert "leaves no room" in error.reason
        assume(False)
    media = [{"id": "v0", "kind": "video", "member": "mp4"}]
    data = {"schema": "moss_train/stream@1", "id": "x", "media": media, "sampling": watch.sampling()}
    row = compiled(data | {"events": events})
    in_order = sorted(sayings, key=lambda saying: saying.t)
    assert [event["text"] for event in events if event["role"] == "user"] == [
        saying.text for saying in in_order if saying.role == "user"
    ]
    texts = iter(event["text"] for event in events if event["role"] == "assistant")
    text = ""
    for saying in (saying for saying in in_order if saying.role == "assistant"):
        if saying.text not in text:
            text = next(texts)
        assert saying.text in text
    for event in events:
        if event["role"] == "assistant":
            due = [saying.t for saying in sayings if saying.text in event["text"]]
            assert math.floor(min(due)) <= event["t"] + 1 / fps and event["t"] <= max(due) + LONGEST_WAIT_S + 1 / fps
            slots = [slot for slot in row.slots if slot.event_id == event["id"]]
            cut = not slots[-1].ends
            assert not cut or slots[-1].time_s >= watch.time(watch.frames() - 1)  # only the end of the stream cuts
