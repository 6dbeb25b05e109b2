"""The answer policy: what is asked of a timeline, answered from what has been seen, and kept up to date.

The engine here walks through a stream in time. At each moment at which something may be said it shows the writer the
question and the captions known so far (never a later one) and takes its decision:

* silence: nothing can be said yet;
* answer: the first reply to the question;
* revise: what was said no longer holds, this does;
* confirm: something changed and what was said still holds, so silence is right.

One speaks at a time: a decision waits until the reply before it is over and is then taken on what is known by then.
A new question ends what still runs (pre-emption) and is from then on the one that is kept up to date.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from moss_train.streams.importers.talk import LONGEST_WAIT_S, Watch
from moss_train.synthesis.captions import Caption, CaptionTimeline, Change
from moss_train.synthesis.emission import Pace, Utterance
from moss_train.synthesis.leakage import clock_words, leaked

Action = Literal["silence", "answer", "revise", "confirm"]


@dataclass(frozen=True)
class Question:
    """Something the user asks. What is `stands` is kept up to date until the next question."""

    t: float
    text: str
    topic: str  #: what it is about, in the writer's own terms
    stands: bool = True
    at_once: bool = False  #: it cuts in and is answered before the next frame where that is possible
    cut_in: str = ""  #: said before the text when it really cuts a running reply


@dataclass(frozen=True)
class Situation:
    """All that a writer may know when it decides."""

    question: Question
    now_s: float
    seen: tuple[Caption, ...]  #: known by now, in the order in which they became known
    news: tuple[Caption, ...]  #: those that became known since the last decision
    said: str | None  #: the reply that stands; None before the first


@dataclass(frozen=True)
class Decision:
    """What a writer wants said."""

    action: Action
    text: str = ""  #: answer, revise: what is said. confirm: the answer that still holds
    evidence: tuple[float, float] | None = None  #: None: the span of the latest caption
    changed: str = ""  #: what a revision or a confirmation is about


@dataclass(frozen=True)
class Turn:
    """A decision that leaves a trace, and when."""

    t: float
    since_s: float  #: when its evidence could first be known
    decision: Decision
    evidence: tuple[float, float]
    utterance: Utterance | None = None  #: None for a confirmation


@dataclass
class Asked:
    """A question with all that is said about it."""

    question: Question
    cuts: bool  #: a reply still ran when it was asked
    turns: list[Turn] = field(default_factory=list)


@dataclass(frozen=True)
class Rejection:
    """Something a writer proposed and that was left out, with the reason as one word for the counts."""

    item: Literal["video", "question", "answer", "revise", "confirm"]
    reason: str
    detail: str
    t: float | None = None
    text: str = ""


class Rejected(Exception):
    """A question that cannot stay, because of itself or of something said about it."""

    def __init__(self, number: int, rejection: Rejection):
        super().__init__(rejection.reason)
        self.number = number
        self.rejection = rejection


class WriterFault(Exception):
    """The writer could not do its part for one video; `reason` is one word for the counts."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Task:
    """What a writer plans for: one video and the conditions of its stream."""

    timeline: CaptionTimeline
    watch: Watch
    changes: list[Change]
    pace: Pace
    mix: dict[str, float]  #: scenario → share
    question_every_s: float
    rng: np.random.Generator


@dataclass(frozen=True)
class Plan:
    """The questions of a stream in the order of their times, and the names of the scenarios they make up."""

    questions: tuple[Question, ...]
    scenario: tuple[str, ...]


class Writer(Protocol):
    """What thinks of questions and answers them. `plan` may look at the whole timeline, `decide` only at its
    situation. Both may be called for several videos at a time, and may raise WriterFault."""

    async def plan(self, task: Task) -> Plan:
        """The questions of one stream."""

    async def decide(self, situation: Situation) -> Decision:
        """What is to be said in a situation."""


async def hold_dialogue(task: Task, questions: tuple[Question, ...], writer: Writer) -> list[Asked]:
    """What is said when, from the first question to the end of the stream.

    Raises Rejected for the first question that cannot stay: it leaks what is not known yet, it is never answered, or
    something that is said about it breaks a rule.
    """
    held: list[Asked] = []
    over_s, free = task.watch.start_s, 0
    for number, question in enumerate(questions):
        until_s = questions[number + 1].t if number + 1 < len(questions) else task.watch.end_s
        _check_question(task, number, question)
        asked = Asked(question, cuts=over_s > question.t + 1e-6)
        free = 0 if question.t <= task.watch.start_s else task.watch.last_until(question.t) + 1
        over_s = await _answer(task, writer, asked, number, free, until_s)
        if not asked.turns:
            reason = "it gets no answer before the next question or the end"
            raise Rejected(number, Rejection("question", "never_answered", reason, question.t, question.text))
        held.append(asked)
    return held


def shown_by(watch: Watch, time_s: float) -> float:
    """When the last frame at or before `time_s` arrived: what lies between two frames is seen at the second."""
    return watch.time(max(0, watch.last_until(time_s)))


def _check_question(task: Task, number: int, question: Question) -> None:
    opens = question.t <= task.watch.start_s  # it is asked before the first frame
    shown_s = task.watch.start_s - 1.0 if opens else shown_by(task.watch, question.t)
    seen = [caption.text for caption in task.timeline.seen(shown_s)]
    later = [caption.text for caption in task.timeline.later(shown_s)]
    words = leaked(question.text, seen, later)
    if words:
        raise Rejected(number, Rejection("question", "leak", ", ".join(words), question.t, question.text))
    words = clock_words(question.text, seen)
    if words:
        raise Rejected(number, Rejection("question", "clock", ", ".join(words), question.t, question.text))


async def _answer(task: Task, writer: Writer, asked: Asked, number: int, free: int, until_s: float) -> float:
    """Adds the turns of one question; returns when its last reply is over."""
    question, watch = asked.question, task.watch
    over_s, known, said = question.t, -1, None
    moments = [question.t] if question.at_once and question.t > watch.start_s else []
    moments += [watch.time(free), *(change.time_s for change in task.changes if change.frame > free)]
    for moment_s in moments:
        # what comes while a reply runs waits for its end, and for the latest of it
        now_s = moment_s if moment_s == question.t else max(moment_s, watch.time(free))
        if now_s >= until_s - 1e-6 or (free >= watch.frames() and now_s != question.t):
            break
        seen = task.timeline.seen(shown_by(watch, now_s))
        if len(seen) == known:
            continue  # nothing is known that was not known at the last decision
        decision = await writer.decide(Situation(question, now_s, seen, seen[known:] if said else seen, said))
        since_s = _since(task, seen, known, said)
        known = len(seen)
        if decision.action == "silence":
            continue
        rejection = _fault(task, question, decision, said, now_s, since_s)
        if rejection is not None:
            raise Rejected(number, rejection)
        evidence = _evidence(task, decision, seen, now_s)
        if decision.action == "confirm":
            asked.turns.append(Turn(now_s, since_s, decision, evidence))
            continue
        utterance = task.pace.say(decision.text, now_s)
        asked.turns.append(Turn(now_s, since_s, decision, evidence, utterance))
        said, free, over_s = decision.text, utterance.free_frame, utterance.over_s
        if not question.stands:
            break
    return over_s


def _since(task: Task, seen: tuple[Caption, ...], known: int, said: str | None) -> float:
    """The first frame that shows what a decision rests on: the first news after a reply, else the latest caption."""
    if not seen:
        return task.watch.start_s
    first = seen[known] if said is not None and known < len(seen) else seen[-1]
    return task.watch.time(task.watch.first_from(first.seen_s))


def _evidence(task: Task, decision: Decision, seen: tuple[Caption, ...], now_s: float) -> tuple[float, float]:
    """[from, to] within what has been shown; of states, the frames that show it."""
    start_s, end_s = decision.evidence or (seen[-1].start_s, seen[-1].end_s)
    watch = task.watch
    if task.timeline.states:
        start_s = watch.time(watch.first_from(start_s))
        end_s = watch.time(max(0, watch.first_from(end_s) - 1))  # a state ends before the frame that shows the next
    start_s = min(max(start_s, watch.start_s), now_s)
    return start_s, max(start_s, min(end_s, now_s))


def _fault(
    task: Task, question: Question, decision: Decision, said: str | None, now_s: float, since_s: float
) -> Rejection | None:
    """Why a decision cannot stand, or None."""

    def fault(reason: str, detail: str) -> Rejection:
        item = decision.action
        assert item != "silence"
        return Rejection(item, reason, detail, now_s, decision.text)

    shown_s = shown_by(task.watch, now_s)
    seen = [caption.text for caption in task.timeline.seen(shown_s)]
    if not seen:
        return fault("no_evidence", "nothing has been seen yet")
    if (decision.action == "answer") != (said is None):
        return fault("out_of_turn", "a reply stands already" if said else "there is no reply yet")
    if decision.action != "confirm" and not decision.text.strip():
        return fault("empty", "it says nothing")
    if decision.action == "revise" and decision.text == said:
        return fault("nothing_new", "it repeats the reply that stands")
    later = [caption.text for caption in task.timeline.later(shown_s)]
    words = leaked(decision.text, [*seen, question.text], later)
    if words:
        return fault("leak", ", ".join(words))
    words = clock_words(decision.text, [*seen, question.text])
    if words:
        return fault("clock", ", ".join(words))
    if decision.action == "revise" and now_s - since_s > LONGEST_WAIT_S:
        return fault("late", f"{now_s - since_s:.1f} s after its evidence, because the reply before it is long")
    return None
