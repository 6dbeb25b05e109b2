"""What the figures hold for or against each single reply, so that a report can show it where it happened.

Nothing is judged anew here: stale answers and false revisions are those that `metrics` counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moss_train.evaluate.judges import Judge
from moss_train.evaluate.metrics import slot_errors
from moss_train.evaluate.metrics.replies import StreamReplies
from moss_train.evaluate.metrics.revision import accurate_revision, answer_is_stale, false_revisions, right_answer
from moss_train.evaluate.transcript import StreamTranscript, Utterance, model_utterances, reference_utterances


@dataclass(frozen=True)
class Due:
    """Something is to be said from `slot` on: the evidence of a question is there, or the evidence changes."""

    slot: int  #: ordinal of the first slot at which the question was asked and its evidence complete
    answer: str
    revises: bool
    missed: bool  #: the model does not say it within the window, as `answer_accuracy` and `revision_accuracy` count


@dataclass(frozen=True)
class Finding:
    """One reply, and what is known about it."""

    reply: Utterance
    replaces: int | None = None  #: index of the reply of the same side and turn whose answer this one changes
    due: Due | None = None  #: what it can be an answer to; None when nothing was asked, or its evidence came later
    delay_frames: int | None = None  #: from `due` to the reply's first slot
    delay_s: float | None = None
    right: bool | None = None  #: gives the answer that is due; None without one
    early: bool = False  #: a question was open whose evidence came only later
    stale: bool = False
    false_revision: bool = False


def dues(transcript: StreamTranscript, judge: Judge, window_frames: int) -> list[Due]:
    """All that is to be said, in order of time."""
    stream = StreamReplies.of(transcript)
    found = [
        Due(
            max(question.asked_slot, question.evidence_slot),
            question.answer,
            False,
            right_answer(stream, question, judge, window_frames) is None,
        )
        for question in transcript.questions
    ]
    found += [
        Due(
            revision.evidence_slot,
            revision.new,
            True,
            accurate_revision(stream, revision, judge, window_frames) is None,
        )
        for revision in transcript.revisions
    ]
    return sorted(found, key=lambda due: due.slot)


def model_findings(transcript: StreamTranscript, judge: Judge, window_frames: int) -> list[Finding]:
    """The model's replies in order, as `model_utterances` has them.

    A reply that differs from the one before it in its turn replaces that one.
    """
    replies = model_utterances(transcript.slots)
    turns = [turn.slot for turn in transcript.turns]
    replaced: list[int | None] = [None] * len(replies)
    for number in range(1, len(replies)):
        earlier, reply = replies[number - 1], replies[number]
        same_turn = not any(earlier.slot < turn <= reply.slot for turn in turns)
        if same_turn and not same_words_or_answer(judge, reply.text, earlier.text):
            replaced[number] = number - 1
    return _findings(
        transcript,
        replies,
        replaced,
        dues(transcript, judge, window_frames),
        judge,
        _stale_slots(transcript, judge, window_frames),
        _false_slots(transcript, judge, window_frames),
    )


def reference_findings(transcript: StreamTranscript, judge: Judge, window_frames: int) -> list[Finding]:
    """The reference's replies in order; what each replaces is what its event says."""
    replies = reference_utterances(transcript.slots)
    starts = {reply.slot: number for number, reply in enumerate(replies)}
    since = {revision.id: revision.since_slot for revision in transcript.revisions}
    replaced = [None if reply.event is None else starts.get(since.get(reply.event, -1)) for reply in replies]
    return _findings(transcript, replies, replaced, dues(transcript, judge, window_frames), judge, set(), set())


def slot_faults(transcript: StreamTranscript, judge: Judge) -> list[str | None]:
    """Per slot "timing" where the model speaks and the reference is silent or the other way round, "answer" where both
    speak but do not say the same, else None."""
    said, asked = (
        _text_by_slot(model_utterances(transcript.slots)),
        _text_by_slot(reference_utterances(transcript.slots)),
    )
    faults: list[str | None] = []
    for ordinal, mistimed in enumerate(slot_errors(transcript)):
        if mistimed:
            faults.append("timing")
        elif ordinal in said and ordinal in asked:
            same = same_words_or_answer(judge, said[ordinal], asked[ordinal])
            faults.append(None if same else "answer")
        else:
            faults.append(None)
    return faults


def same_words_or_answer(judge: Judge, said: str, reference: str) -> bool:
    """Equal words give the same answer, also where the judge finds no answer in them."""
    return said.strip() == reference.strip() or judge.same_answer(said, reference)


def _findings(
    transcript: StreamTranscript,
    replies: Sequence[Utterance],
    replaced: Sequence[int | None],
    expected: Sequence[Due],
    judge: Judge,
    stale: set[int],
    false: set[int],
) -> list[Finding]:
    found = []
    for reply, replaces in zip(replies, replaced, strict=True):
        turn = max((turn.slot for turn in transcript.turns if turn.slot <= reply.slot), default=0)
        open_dues = [due for due in expected if turn <= due.slot <= reply.slot]
        due = open_dues[-1] if open_dues else None
        start, since = transcript.slots[reply.slot], transcript.slots[due.slot] if due else None
        early = any(q.asked_slot <= reply.slot < q.evidence_slot and q.asked_slot >= turn for q in transcript.questions)
        found.append(
            Finding(
                reply,
                replaces,
                due,
                start.frame - since.frame if since else None,
                start.time_s - since.time_s if since else None,
                same_words_or_answer(judge, reply.text, due.answer) if due else None,
                early and due is None,
                reply.slot in stale,
                reply.slot in false,
            )
        )
    return found


def _stale_slots(transcript: StreamTranscript, judge: Judge, window_frames: int) -> set[int]:
    """First slots of the replies that `stale_rate` counts: the old answer, still standing when the window ends."""
    stream, found = StreamReplies.of(transcript), set()
    for revision in transcript.revisions:
        if answer_is_stale(stream, revision, judge, window_frames):
            end = stream.window_end(revision.evidence_slot, window_frames, revision.id)
            old = [r for r in stream.started(revision.since_slot, end) if judge.same_answer(r.text, revision.old)]
            found.add(old[-1].slot)
    return found


def _false_slots(transcript: StreamTranscript, judge: Judge, window_frames: int) -> set[int]:
    """First slots of the replies that `false_revision_rate` counts."""
    stream, reference = StreamReplies.of(transcript), StreamReplies.of(transcript.as_reference())
    return {
        reply.slot
        for confirmation in transcript.confirmations
        if not reference.started(confirmation.slot, confirmation.slot + 1)
        for reply in false_revisions(stream, confirmation, judge, window_frames)
    }


def _text_by_slot(replies: Sequence[Utterance]) -> dict[int, str]:
    return {slot: reply.text for reply in replies for slot in range(reply.slot, reply.last_slot + 1)}
