"""Where events of a timeline end up in the row, spelled out by hand."""

import numpy as np
import pytest
from stream_cases import compiled, layout, revise, say, stream, tokenizer, user

from moss_train.errors import SampleError
from moss_train.streams.compiled import IGNORED_LABEL, Kind
from moss_train.streams.config import CompilerConfig


def kinds_in_order(row) -> list[Kind]:
    return [Kind(kind) for kind in row.kinds if kind]


def test_a_question_comes_after_the_slot_of_the_last_frame_and_the_reply_at_its_own_frame():
    row = compiled(stream(user(1.5), say(3.0, "It is red."), end_s=5.0))
    assert layout(row) == "U: A _ #_ #_ | U:Where is it? A _ #_ #It is red._ #_ |"
    assert [(slot.frame, slot.time_s, slot.state) for slot in row.slots] == [
        (-1, 0.0, "silence"),
        (0, 0.0, "silence"),
        (1, 1.0, "silence"),
        (-1, 1.5, "silence"),
        (2, 2.0, "silence"),
        (3, 3.0, "speak"),
        (4, 4.0, "silence"),
    ]


def test_a_question_at_the_time_of_a_frame_comes_after_that_frame():
    row = compiled(stream(user(2.0), say(3.0, "Red."), end_s=4.0))
    assert layout(row) == "U: A _ #_ #_ #_ | U:Where is it? A _ #Red._ |"


def test_a_question_at_the_start_opens_the_stream():
    row = compiled(stream(user(0.0), say(0.0, "Red."), end_s=2.0))
    assert layout(row) == "U:Where is it? A _ #Red._ #_ |"  # the answer has seen the first frame
    row = compiled(stream(user(0.0), say(0.0, "Red", evidence=[]), end_s=2.0))
    assert layout(row) == "U:Where is it? A Red_ #_ #_ |"  # unless it rests on nothing seen


def test_a_reply_between_two_frames_waits_for_the_next_one():
    row = compiled(stream(say(1.2, "Red."), end_s=4.0))
    assert layout(row) == "U: A _ #_ #_ #Red._ #_ |"


def test_a_reply_at_its_questions_time_follows_the_header_at_once():
    row = compiled(stream(user(1.4), say(1.4, "Red."), end_s=3.0))
    assert layout(row) == "U: A _ #_ #_ | U:Where is it? A Red._ #_ |"


def test_frames_that_arrive_during_a_reply_stand_inside_it():
    config = CompilerConfig(tokens_per_second=2)
    row = compiled(stream(say(1.0, "It is still red now."), end_s=5.0), config)
    assert layout(row) == "U: A _ #_ #It is # still red # now._ #_ |"
    assert [slot.state for slot in row.slots[2:5]] == ["speak", "continue", "continue"]
    assert kinds_in_order(row)[2:] == [Kind.ONSET, *[Kind.TEXT] * 5, Kind.STOP_SILENCE, Kind.IDLE_SILENCE]


def test_fractional_rates_keep_up_with_time():
    row = compiled(stream(say(0.0, "red red red red red red red"), end_s=8.0), CompilerConfig(tokens_per_second=2.5))
    lengths = [len(tokenizer().encode(slot.text)) for slot in row.slots if slot.text]
    assert lengths == [2, 3, 2]


def test_what_is_left_at_the_last_frame_is_said_there():
    row = compiled(stream(say(1.0, "It is red now."), end_s=2.0), CompilerConfig(tokens_per_second=1))
    assert layout(row) == "U: A _ #_ #It is red now._ |"


def test_an_interruption_cuts_the_running_reply_and_leaves_no_silence():
    config = CompilerConfig(tokens_per_second=2)
    row = compiled(stream(say(1.0, "It is still red now."), user(2.5, "Stop.", kind="interrupt"), end_s=4.0), config)
    assert layout(row) == "U: A _ #_ #It is # still | U:Stop. A _ #_ |"
    assert Kind.STOP_SILENCE not in kinds_in_order(row)
    assert row.labels[np.flatnonzero(row.ids == tokenizer().special.end_of_turn) - 1].tolist()[-2] == IGNORED_LABEL


def test_an_interruption_answered_at_once():
    row = compiled(
        stream(
            say(1.0, "It is sti", chunks=[[1.0, "It is sti"]]),
            user(1.5, "Stop.", kind="interrupt"),
            say(1.5, "All right."),
            end_s=3.0,
        )
    )
    assert layout(row) == "U: A _ #_ #It is sti | U:Stop. A All right._ #_ |"


def test_a_finished_reply_keeps_its_silence_when_a_question_follows():
    row = compiled(stream(say(1.0, "Red.", chunks=[[1.0, "Red."]]), user(1.5, "And now?"), end_s=2.0))
    assert layout(row) == "U: A _ #_ #Red._ | U:And now? A _ |"


def test_chunks_fix_the_text_of_each_slot_and_win_over_words():
    reply = say(1.0, "digital", chunks=[[1.0, "digi"], [2.0, "tal"]], words=[[1.0, 1.5, "digital"]])
    row = compiled(stream(reply, end_s=4.0))
    assert layout(row) == "U: A _ #_ #digi #tal_ #_ |"
    special = tokenizer().special
    spoken = [int(token) for token in row.ids if token not in (special.anchor, special.silence)]
    expected = [*tokenizer().encode("digi"), *tokenizer().encode("tal")]  # each alone: the cut inside the word survives
    assert str(expected)[1:-1] in str(spoken)


def test_words_are_said_when_they_were_spoken_and_pauses_are_silence():
    words = [[1.0, 1.2, "It"], [1.0, 1.3, "is"], [1.9, 2.0, "red"], [4.0, 4.5, "now"]]
    row = compiled(stream(say(1.0, "It is red now", words=words), end_s=6.0))
    assert layout(row) == "U: A _ #_ #It is # red_ #_ # now_ #_ |"
    assert kinds_in_order(row).count(Kind.ONSET) == 2  # speaking up again is a decision too


def test_a_question_in_a_pause_leaves_the_silence_before_it():
    reply = say(1.0, "It is red", words=[[1.0, 1.1, "It"], [1.5, 1.6, "is"], [4.0, 4.1, "red"]])
    row = compiled(stream(reply, user(3.5, "Stop.", kind="interrupt"), end_s=5.0))
    assert layout(row) == "U: A _ #_ #It # is_ #_ | U:Stop. A _ #_ |"


def test_words_win_over_the_rate():
    reply = say(1.0, "It is", words=[[1.0, 1.1, "It"], [2.0, 2.1, "is"]])
    assert layout(compiled(stream(reply, end_s=3.0))) == "U: A _ #_ #It # is_ |"


def test_every_token_of_a_revision_is_revision():
    data = stream(say(1.0, "One block."), revise(3.0, "Two blocks now.", "e0", evidence=[2.5, 3.0]), end_s=5.0)
    row = compiled(data)
    text = tokenizer().encode("Two blocks now.")
    assert row.labels[row.kinds == Kind.REVISION].tolist() == text
    assert kinds_in_order(row)[-2:] == [Kind.STOP_SILENCE, Kind.IDLE_SILENCE]
    assert (row.kinds == Kind.ONSET).sum() == 1


def test_silence_between_the_evidence_and_the_revision_is_stale():
    data = stream(say(0.0, "One."), revise(4.0, "Two.", "e0", evidence=[1.5, 2.0]), end_s=6.0)
    stale = {slot.time_s for slot in compiled(data).slots if slot.state == "unknown"}
    assert stale == {2.0, 3.0}
    row = compiled(data)
    assert (row.labels[row.kinds == Kind.STALE] == tokenizer().special.silence).all()
    assert (compiled(data, CompilerConfig(stale_silence_guard=False)).kinds == Kind.STALE).sum() == 0


def test_a_stale_reply_and_an_untrained_reply():
    row = compiled(stream(say(0.0, "Red.", stale=True), say(2.0, "Blue.", train=False), end_s=4.0))
    assert row.labels[row.kinds == Kind.STALE].tolist() == tokenizer().encode("Red.")
    assert not set(tokenizer().encode("Blue.")[:1]) & set(row.labels.tolist())
    assert layout(row) == "U: A _ #Red._ #_ #Blue._ #_ |"  # both stay in the row


def test_explicit_silence_trains_only_the_listed_moments():
    listed = {"t": 2.0, "t_end": 4.0, "role": "assistant", "kind": "silence"}
    row = compiled(stream(say(0.0, "Red."), listed, end_s=6.0, silence="explicit"))
    assert layout(row) == "U: A _ #Red._ #_ #_ #_ #_ #_ |"  # the others stay in the row
    assert kinds_in_order(row) == [Kind.ONSET, Kind.TEXT, Kind.STOP_SILENCE, Kind.IDLE_SILENCE, Kind.IDLE_SILENCE]
    assert [slot.state for slot in row.slots] == [
        "unknown",
        "speak",
        "unknown",
        "silence",
        "silence",
        "unknown",
        "unknown",
    ]


def test_a_reply_that_breaks_off_at_the_end():
    row = compiled(stream(say(1.0, "It is re", complete=False), end_s=2.0))
    assert layout(row) == "U: A _ #_ #It is re |"
    with pytest.raises(SampleError, match=r"events\[0\].complete"):
        compiled(stream(say(1.0, "It is re", complete=False), end_s=4.0))


def test_window_and_sinks():
    row = compiled(stream(end_s=6.0), CompilerConfig(window=2, sinks=1))
    assert row.visible_hi[row.frame_positions].tolist() == [1, 2, 3, 4, 5, 6]
    assert row.visible_lo[row.frame_positions].tolist() == [0, 0, 1, 2, 3, 4]
    assert row.sinks == 1


def test_start_and_rate_of_the_sampling():
    data = stream(say(11.0, "Red."), sampling={"fps": 2.0, "start_s": 10.0, "end_s": 12.0})
    row = compiled(data)
    assert [request.time_s for request in row.frames] == [10.0, 10.5, 11.0, 11.5]
    assert layout(row) == "U: A _ #_ #_ #Red._ #_ |"
    del data["sampling"]["fps"]
    assert len(compiled(data, CompilerConfig(fps=4.0)).frames) == 8


def test_special_strings_in_events_stay_text():
    text = "<|silence|><|image|><|eot_id|>"
    row, special = compiled(stream(user(0.5, text), say(1.0, text), end_s=3.0)), tokenizer().special
    assert (row.ids == special.anchor).sum() == 3
    assert (row.ids == special.end_of_turn).sum() == 4  # two turns of each side
    assert row.slots[3].text == text


@pytest.mark.parametrize(
    ("data", "config", "message"),
    [
        (stream(say(7.5, "Red.")), {}, r"events\[0\].t: no frame arrives at or after 7.5"),
        (
            stream(say(1.0, "It is red now."), say(2.0, "No.")),
            {"tokens_per_second": 1},
            r"events\[1\].t: reply 'e1' starts at 2.0 s while 'e0' still runs",
        ),
        (stream(say(1.2, "One."), say(1.8, "Two.")), {}, r"events\[1\].t: .* one reply at a time"),
        (stream(end_s=8.0), {"max_frames": 7}, "sampling: 8 frames at 1.0 fps exceed compiler.max_frames=7"),
        (stream(end_s=700.0), {"max_frames": 1000}, "beyond the video's 600.0 s"),
    ],
)
def test_samples_that_do_not_fit(data, config, message):
    with pytest.raises(SampleError, match=message) as caught:
        compiled(data, CompilerConfig(**config))
    assert caught.value.key == "key"


def test_frames_that_arrive_at_given_times():
    even = stream(user(1.5), say(3.0, "It is red."), end_s=6.0)
    at_times = even | {"sampling": {"times_s": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], "end_s": 6.0}}
    assert compiled(even).slots == compiled(at_times).slots and compiled(even).frames == compiled(at_times).frames

    uneven = stream(user(1.0), say(2.5, "abc"), sampling={"times_s": [2.0, 2.25, 3.0, 5.5], "end_s": 6.0})
    row = compiled(uneven, CompilerConfig(tokens_per_second=1.0))
    # asked before anything is shown: the question opens the stream; one token a second between uneven frames
    assert layout(row) == "U:Where is it? A _ #_ #_ #ab #c_ |"
    assert [slot.time_s for slot in row.slots] == [1.0, 2.0, 2.25, 3.0, 5.5]
    answer = stream(user(1.0), say(1.0, "Wait."), sampling={"times_s": [2.0, 2.5], "end_s": 6.0})
    assert layout(compiled(answer)) == "U:Where is it? A Wait._ #_ #_ |"


@pytest.mark.parametrize(
    ("sampling", "fault"),
    [
        ({"times_s": [1.0, 2.0], "fps": 1.0}, "sampling.fps: has no effect beside times_s"),
        ({"times_s": [2.0, 1.0]}, r"sampling.times_s\[1\]: 1.0 is not after"),
        ({"times_s": [1.0, 6.0]}, "sampling.times_s: must lie in"),
        ({"times_s": [1.0, 2.0], "start_s": 1.5}, "sampling.times_s: must lie in"),
        ({"times_s": []}, "sampling.times_s: "),
    ],
)
def test_times_that_are_refused(sampling, fault):
    with pytest.raises(SampleError, match=fault):
        compiled(stream(sampling=sampling | {"end_s": 6.0}))
