"""Answers, and what becomes of them when the evidence changes.

* A *window* of N frames after slot s holds the slots whose frame is at most `frame(s) + N`. It closes early when the
  user takes a turn or the reference starts another reply, since then another answer is due.
* *Answer*: the last reply that the model starts in the window after the reference's answer, and not before both the
  question and its evidence, gives the reference's answer. So a wrong reply that is corrected in time counts as right,
  a right one that is spoilt in time counts as wrong, and a lucky guess before the evidence does not count.
* *Revision*: any reply started in [evidence, evidence + N] gives the new answer; its delay is counted in frames from
  the evidence (mean over the accurate revisions). *Stale*: the last reply up to the window's end that gives the old or
  the new answer gives the old one.
* *False revision*: after something changed that does not change the answer, the model says something in the window that
  belongs to a reply which neither gives the answer that still holds nor repeats the model's own reply before it.
* *Restated*: a reply that gives the answer which the model's reply before it, in the same turn, gave already.
* *Latency*, in seconds of the stream: from when a question can be answered (asked, and its evidence seen) to the reply
  that answers it rightly; from the evidence to the accurate revision.

An item that the reference's own transcript does not fulfil (a reply cut off by the user before it says anything, say)
cannot be asked of a model: it is left out and counted in `n_unscorable`.
"""

from collections.abc import Sequence

from moss_train.evaluate.judges import Judge
from moss_train.evaluate.metrics.replies import StreamReplies, mean, ratio
from moss_train.evaluate.transcript import Confirmation, Question, Revision, Utterance


def right_answer(stream: StreamReplies, question: Question, judge: Judge, window_frames: int) -> Utterance | None:
    """The reply that answers the question rightly; None when it is not answered so."""
    end = stream.window_end(question.answer_slot, window_frames, question.answer_event)
    first = max(question.asked_slot, question.evidence_slot)
    replies = stream.started(first, end)
    return replies[-1] if replies and judge.same_answer(replies[-1].text, question.answer) else None


def accurate_revision(stream: StreamReplies, revision: Revision, judge: Judge, window_frames: int) -> Utterance | None:
    """The first reply with the new answer; None when there is none in the window."""
    end = stream.window_end(revision.evidence_slot, window_frames, revision.id)
    for reply in stream.started(revision.evidence_slot, end):
        if judge.same_answer(reply.text, revision.new):
            return reply
    return None


def answer_is_stale(stream: StreamReplies, revision: Revision, judge: Judge, window_frames: int) -> bool:
    end = stream.window_end(revision.evidence_slot, window_frames, revision.id)
    for reply in reversed(stream.started(revision.since_slot, end)):
        if judge.same_answer(reply.text, revision.new):
            return False
        if judge.same_answer(reply.text, revision.old):
            return True
    return False


def false_revisions(
    stream: StreamReplies, confirmation: Confirmation, judge: Judge, window_frames: int
) -> list[Utterance]:
    """The replies heard after a confirmation that change an answer which still holds."""
    end = stream.window_end(confirmation.slot, window_frames)
    wrong, standing = [], None
    for reply in stream.said:
        if reply.slot >= end:
            break
        if reply.last_slot >= confirmation.slot:
            repeats = standing is not None and judge.same_answer(reply.text, standing)
            if not repeats and not judge.same_answer(reply.text, confirmation.answer):
                wrong.append(reply)
        standing = reply.text
    return wrong


def restatements(stream: StreamReplies, judge: Judge) -> int:
    """How many of the model's replies say again what its reply before, in the same turn, said."""
    turns = [ordinal for ordinal, slot in enumerate(stream.transcript.slots) if slot.opens_turn]
    count = 0
    for before, reply in zip(stream.said, stream.said[1:], strict=False):
        same_turn = not any(before.slot < turn <= reply.slot for turn in turns)
        count += same_turn and judge.same_answer(reply.text, before.text)
    return count


def answer_figures(streams: Sequence[StreamReplies], judge: Judge, window_frames: int) -> dict[str, float]:
    """Accuracy, delays and rates of answers, revisions and confirmations, with their counts."""
    references = [StreamReplies.of(stream.transcript.as_reference()) for stream in streams]
    right: list[tuple[bool, bool]] = []  # (evidence came after the question, answered rightly)
    latencies_s: list[float] = []
    delays: list[int] = []
    revision_latencies_s: list[float] = []
    stale: list[bool] = []
    false: list[bool] = []
    unscorable = 0
    for stream, reference in zip(streams, references, strict=True):
        slots = stream.transcript.slots
        for question in stream.transcript.questions:
            if right_answer(reference, question, judge, window_frames) is None:
                unscorable += 1
                continue
            reply = right_answer(stream, question, judge, window_frames)
            right.append((question.evidence_after, reply is not None))
            if reply is not None:
                since = max(question.asked_slot, question.evidence_slot)
                latencies_s.append(slots[reply.slot].time_s - slots[since].time_s)
        for revision in stream.transcript.revisions:
            if accurate_revision(reference, revision, judge, window_frames) is None:
                unscorable += 1
                continue
            reply = accurate_revision(stream, revision, judge, window_frames)
            if reply is not None:
                delays.append(slots[reply.slot].frame - slots[revision.evidence_slot].frame)
                revision_latencies_s.append(slots[reply.slot].time_s - slots[revision.evidence_slot].time_s)
            stale.append(answer_is_stale(stream, revision, judge, window_frames))
        for confirmation in stream.transcript.confirmations:
            if reference.started(confirmation.slot, confirmation.slot + 1):
                unscorable += 1  # the reference speaks just then, so silence is not what is asked
                continue
            false.append(bool(false_revisions(stream, confirmation, judge, window_frames)))
    after = [ok for late, ok in right if late]
    before = [ok for late, ok in right if not late]
    return {
        "n_questions": len(right),
        "n_answers": len(after),
        "n_revisions": len(stale),
        "n_confirmations": len(false),
        "n_unscorable": unscorable,
        "answer_accuracy": ratio(sum(ok for _, ok in right), len(right)),
        "answer_accuracy_evidence_after": ratio(sum(after), len(after)),
        "answer_accuracy_evidence_before": ratio(sum(before), len(before)),
        "answer_latency_s": mean(latencies_s),
        "revision_accuracy": ratio(len(delays), len(stale)),
        "revision_delay_frames": mean(delays),
        "revision_latency_s": mean(revision_latencies_s),
        "stale_rate": ratio(sum(stale), len(stale)),
        "false_revision_rate": ratio(sum(false), len(false)),
        "restate_rate": ratio(
            sum(restatements(stream, judge) for stream in streams), sum(len(stream.said) for stream in streams)
        ),
    }
