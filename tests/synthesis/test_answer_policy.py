"""The engine: when a writer is asked, what it is shown, and what of its decisions stays."""

import asyncio
import json
from dataclasses import dataclass, field

import pytest
from caption_cases import MEDIUM, TOKENIZER, settings, task, timeline

from moss_train.streams.importers.talk import Watch
from moss_train.synthesis.captions import find_changes
from moss_train.synthesis.dialogue import Decision, Plan, Question, Rejected, Situation, hold_dialogue
from moss_train.synthesis.emission import Pace
from moss_train.synthesis.pipeline import synthesise
from moss_train.synthesis.sources import Footage

EVENTS = timeline((0.0, 2.5, "A man cuts an apple."), (3.0, 6.5, "He eats the apple."), (4.0, 9.0, "The crowd cheers."))


@dataclass
class Scripted:
    """Says what it is told to, and remembers what it was shown."""

    questions: tuple[Question, ...]
    decisions: list[Decision] = field(default_factory=list)
    shown: list[Situation] = field(default_factory=list)

    async def plan(self, of) -> Plan:
        return Plan(self.questions, ("before",))

    async def decide(self, situation: Situation) -> Decision:
        self.shown.append(situation)
        return self.decisions.pop(0) if self.decisions and situation.seen else Decision("silence")


def hold(writer: Scripted, of=EVENTS, **changed):
    return asyncio.run(hold_dialogue(task(of, **changed), writer.questions, writer))


def make(writer: Scripted, of=EVENTS, **changed) -> tuple[dict | None, list[str]]:
    made = asyncio.run(synthesise(Footage(of, MEDIUM, None), writer, settings(**changed), TOKENIZER, {}))
    reasons = [f"{rejection.item}: {rejection.reason}" for rejection in made.rejections]
    return made.sample and json.loads(made.sample), reasons


def test_changes_are_frames_at_which_something_new_is_known():
    of = timeline((0.0, 1.2, "A."), (0.5, 1.9, "B."), (1.0, 4.0, "b"), (0.0, 7.0, "C."), (1.0, 11.5, "D."), end_s=12.0)
    changes = find_changes(of, Watch(1.0, 0.0, 12.0))
    # A and B become known by the same frame; b says what B said; D only after the last frame
    assert [(change.frame, change.known, len(change.news)) for change in changes] == [(2, 2, 2), (7, 4, 1)]


def test_a_writer_is_asked_at_changes_and_never_sees_a_later_caption():
    writer = Scripted(
        (Question(0.0, "What is happening?", "now"),),
        [Decision("answer", "A man cuts."), Decision("revise", "Now he eats.", changed="x")],
    )
    (asked,) = hold(writer)
    assert [situation.now_s for situation in writer.shown] == [0.0, 3.0, 7.0, 9.0]
    for situation in writer.shown:
        assert [caption for caption in EVENTS.captions if caption.seen_s <= situation.now_s] == list(situation.seen)
    assert [len(situation.news) for situation in writer.shown] == [0, 1, 1, 1]
    assert [situation.said for situation in writer.shown] == [None, None, "A man cuts.", "Now he eats."]
    assert [(turn.t, turn.decision.action) for turn in asked.turns] == [(3.0, "answer"), (7.0, "revise")]


def test_what_changes_during_a_reply_waits_for_its_end_and_is_taken_together():
    long = "A man cuts an apple and a man cuts it."
    writer = Scripted(
        (Question(2.25, "And?", "x"),), [Decision("answer", long), Decision("revise", "The crowd cheers.")]
    )
    (asked,) = hold(writer, rate=3.0)
    tokens = len(TOKENIZER.encode(long))
    free = 3 + -(-tokens // 3)
    assert 9 < free < 12
    assert [(turn.t, turn.since_s) for turn in asked.turns] == [(3.0, 3.0), (free, 7.0)]
    assert len(writer.shown[1].news) == 2


def test_a_question_cuts_what_runs_and_is_answered_at_once():
    questions = (
        Question(2.5, "Describe it.", "all", stands=False),
        Question(4.5, "What now?", "now", at_once=True, cut_in="Stop. "),
    )
    writer = Scripted(
        questions, [Decision("answer", "A man cuts an apple. A man cuts an apple."), Decision("answer", "He cuts.")]
    )
    sample, reasons = make(writer, tokens_per_second=4.0)
    assert not reasons
    told = [(event["t"], event.get("kind", "ask"), event.get("text")) for event in sample["events"]]
    assert told == [
        (2.5, "ask", "Describe it."),
        (3.0, "speak", "A man cuts an apple. A man cuts an apple."),
        (4.5, "interrupt", "Stop. What now?"),
        (4.5, "speak", "He cuts."),
    ]
    # what is cut is never said, so it cannot be scored
    assert [question["id"] for question in sample["source_metadata"]["questions"]] == ["q2"]


def test_without_a_reply_to_cut_it_is_a_plain_question():
    question = Question(4.5, "What now?", "now", at_once=True, cut_in="Stop. ")
    sample, _ = make(Scripted((question,), [Decision("answer", "He cuts.")]))
    assert sample["events"][0] == {"id": "q1", "t": 4.5, "role": "user", "text": "What now?"}


def test_events_and_metadata_say_the_same_as_in_the_rendered_clips():
    decisions = [
        Decision("answer", "He cuts."),
        Decision("revise", "Now he eats.", changed="now"),
        Decision("confirm", "He eats.", changed="event"),
    ]
    sample, _ = make(Scripted((Question(1.25, "What is he doing?", "doing"),), decisions))
    assert [event.get("kind") for event in sample["events"]] == [None, "speak", "revise", "confirm"]
    question, answer, revision, confirmation = sample["events"]
    assert answer["reply_to"] == revision["reply_to"] == question["id"] == "q1"
    assert revision["supersedes"] == answer["id"] and confirmation["confirms"] == revision["id"]
    assert (answer["evidence"], revision["evidence"]) == ([0.0, 2.5], [3.0, 6.5])
    metadata = sample["source_metadata"]
    assert metadata["questions"] == [
        {"id": "q1", "attribute": "doing", "asked_t": 1.25, "evidence_t": 3.0, "answer_t": 3.0, "answer_id": "a1",
         "answer": "He cuts."}
    ]  # fmt: skip
    assert metadata["revisions"] == [
        {"id": "a2", "question": "q1", "attribute": "now", "t": 7.0, "old": "He cuts.", "new": "Now he eats.",
         "supersedes": "a1"}
    ]  # fmt: skip
    assert metadata["confirmations"] == [{"question": "q1", "attribute": "event", "t": 9.0, "standing": "He eats."}]


@pytest.mark.parametrize(
    ("question", "decisions", "reason"),
    [
        (Question(1.25, "What?", "x"), [Decision("answer", "He eats.")], "answer: leak"),
        (Question(1.25, "What?", "x"), [Decision("answer", "He is eating something.")], "answer: leak"),
        (Question(1.25, "Who will eat?", "x"), [], "question: leak"),
        (Question(1.25, "What is it at 0:07?", "x"), [], "question: clock"),
        (Question(1.25, "What?", "x"), [Decision("answer", "He cuts it for 3 seconds.")], "answer: clock"),
        (Question(1.25, "What?", "x"), [Decision("answer", "  ")], "answer: empty"),
        (Question(1.25, "What?", "x"), [Decision("revise", "He cuts.")], "revise: out_of_turn"),
        (Question(1.25, "What?", "x"), [Decision("answer", "He cuts."), Decision("answer", "Cuts.")],
         "answer: out_of_turn"),
        (Question(1.25, "What?", "x"), [Decision("answer", "He cuts."), Decision("revise", "He cuts.")],
         "revise: nothing_new"),
        (Question(1.25, "What?", "x"), [Decision("answer", "He cuts."), Decision("revise", "It cheers.")],
         "revise: leak"),
        (Question(1.25, "What?", "x"), [], "question: never_answered"),
    ],
)  # fmt: skip
def test_what_breaks_a_rule_is_left_out_and_named(question, decisions, reason):
    with pytest.raises(Rejected) as caught:
        hold(Scripted((question,), list(decisions)))
    assert f"{caught.value.rejection.item}: {caught.value.rejection.reason}" == reason
    sample, reasons = make(Scripted((question,), decisions))
    assert sample is None and reasons == [reason, "video: nothing_left"]


def test_a_revision_that_comes_too_late_is_left_out():
    of = timeline((0.0, 1.0, "A man cuts."), (2.0, 4.0, "He eats."), end_s=60.0)
    long = "A man cuts. " * 12
    question = Question(0.5, "What?", "x")
    with pytest.raises(Rejected) as caught:
        hold(Scripted((question,), [Decision("answer", long), Decision("revise", "He eats.")]), of, rate=2.0)
    assert caught.value.rejection.reason == "late"


def test_the_others_stay_when_one_question_goes():
    questions = (Question(1.25, "What?", "x"), Question(4.25, "And now?", "y"))
    decisions = [Decision("answer", "He eats."), Decision("answer", "He cuts.")]
    sample, reasons = make(Scripted(questions, decisions))
    assert reasons == ["answer: leak"] and [event.get("text") for event in sample["events"]] == ["And now?", "He cuts."]


@pytest.mark.parametrize("rate", [2.0, 5.0, 38.0])
def test_replies_take_the_slots_that_the_compiler_gives_them(rate):
    from moss_train.streams.compiler import compile_sample
    from moss_train.streams.config import CompilerConfig
    from moss_train.streams.media import MediaInfo
    from moss_train.streams.schema import parse_sample

    text, t = "It is green, at the bottom, and there are three blocks.", 2.5
    said = Pace(Watch(1.0, 0.0, 30.0), TOKENIZER, rate).say(text, t)
    events = [
        {"id": "q", "t": t, "role": "user", "text": "What?"},
        {"id": "a", "t": t, "role": "assistant", "kind": "speak", "text": text},
    ]
    data = {"schema": "moss_train/stream@1", "id": "k", "media": [MEDIUM], "sampling": {"fps": 1.0, "end_s": 30.0}}
    sample = parse_sample(data | {"events": events}, "k")
    row = compile_sample(sample, {"v0": MediaInfo(30.0, 25.0)}, TOKENIZER, CompilerConfig(tokens_per_second=rate))
    assert max(slot.frame for slot in row.slots if slot.event_id == "a") + 1 == max(said.free_frame, 3) or (
        said.free_frame == 3 and rate == 38.0
    )
    spread = Pace(Watch(1.0, 0.0, 30.0), TOKENIZER, rate, spread=0.5).say(text, t)
    assert "".join(part for _, part in spread.chunks) == text
    assert [time_s for time_s, _ in spread.chunks] == sorted({time_s for time_s, _ in spread.chunks})
    assert spread.chunks[0][0] == t and spread.free_frame == int(spread.chunks[-1][0]) + 1
