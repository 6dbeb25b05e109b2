"""Figures of streaming behaviour, made from transcripts alone.

Definitions (the field's where it has any; see `docs/evaluation.md` for worked examples):

* A slot of the reference *speaks* iff its state is "speak" or "continue"; one of the model iff it emits any text in it.
  Slots whose reference is "unknown" are not scored. Precision, recall and F1 of both decisions are over all slots of
  all streams (micro average), because single streams hold too few replies.
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

An item that the reference's own transcript does not fulfil (a reply cut off by the user before it says anything, say)
cannot be asked of a model: it is left out and counted in `n_unscorable`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moss_train.evaluate.judges import Judge, TextJudge
from moss_train.evaluate.transcript import (
    Confirmation,
    Question,
    Revision,
    StreamTranscript,
    Utterance,
    model_utterances,
    reference_utterances,
)

NOT_MEASURED = float("nan")


@dataclass(frozen=True)
class _Stream:
    """One transcript with its replies assembled."""

    transcript: StreamTranscript
    said: list[Utterance]  #: the model's
    reference: list[Utterance]

    @classmethod
    def of(cls, transcript: StreamTranscript) -> "_Stream":
        return cls(transcript, model_utterances(transcript.slots), reference_utterances(transcript.slots))

    def window_end(self, slot: int, frames: int, own_event: str | None = None) -> int:
        """Ordinal one past the last slot of the window of `frames` frames that starts at `slot`.

        `own_event` is the reference reply that the window is about: its start does not close the window.
        """
        slots = self.transcript.slots
        others = {reply.slot for reply in self.reference if reply.event != own_event and reply.slot > slot}
        last_frame = slots[slot].frame + frames
        end = slot + 1
        while end < len(slots) and slots[end].frame <= last_frame and not slots[end].opens_turn and end not in others:
            end += 1
        return end

    def started(self, first: int, end: int) -> list[Utterance]:
        return [reply for reply in self.said if first <= reply.slot < end]


def answer_is_right(stream: _Stream, question: Question, judge: Judge, window_frames: int) -> bool:
    end = stream.window_end(question.answer_slot, window_frames, question.answer_event)
    first = max(question.asked_slot, question.evidence_slot)
    replies = stream.started(first, end)
    return bool(replies) and judge.same_answer(replies[-1].text, question.answer)


def revision_delay(stream: _Stream, revision: Revision, judge: Judge, window_frames: int) -> int | None:
    """Frames from the evidence to the first reply with the new answer; None when there is none in the window."""
    slots = stream.transcript.slots
    end = stream.window_end(revision.evidence_slot, window_frames, revision.id)
    for reply in stream.started(revision.evidence_slot, end):
        if judge.same_answer(reply.text, revision.new):
            return slots[reply.slot].frame - slots[revision.evidence_slot].frame
    return None


def answer_is_stale(stream: _Stream, revision: Revision, judge: Judge, window_frames: int) -> bool:
    end = stream.window_end(revision.evidence_slot, window_frames, revision.id)
    for reply in reversed(stream.started(revision.since_slot, end)):
        if judge.same_answer(reply.text, revision.new):
            return False
        if judge.same_answer(reply.text, revision.old):
            return True
    return False


def false_revisions(stream: _Stream, confirmation: Confirmation, judge: Judge, window_frames: int) -> list[Utterance]:
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


def decision_figures(transcripts: Iterable[StreamTranscript]) -> dict[str, float]:
    """Precision, recall and F1 of speaking, F1 of silence and balanced accuracy over all scored slots."""
    both = silent = missed = false = 0
    for transcript in transcripts:
        for slot in transcript.slots:
            if slot.reference_state == "unknown":
                continue
            if slot.reference_speaks:
                both += slot.speaks
                missed += not slot.speaks
            else:
                false += slot.speaks
                silent += not slot.speaks
    return {
        "speak_precision": _ratio(both, both + false),
        "speak_recall": _ratio(both, both + missed),
        "speak_f1": _ratio(2 * both, 2 * both + missed + false),
        "silence_precision": _ratio(silent, silent + missed),
        "silence_recall": _ratio(silent, silent + false),
        "silence_f1": _ratio(2 * silent, 2 * silent + missed + false),
        "balanced_accuracy": (_ratio(both, both + missed) + _ratio(silent, silent + false)) / 2,
        "n_slots": both + silent + missed + false,
    }


def streaming_figures(
    transcripts: Sequence[StreamTranscript], judge: Judge, window_frames: int = 2
) -> dict[str, float]:
    """All figures of a set of transcripts, by the names of design §7. A figure without items is NaN."""
    streams = [_Stream.of(transcript) for transcript in transcripts]
    references = [_Stream.of(transcript.as_reference()) for transcript in transcripts]
    right: list[tuple[bool, bool]] = []  # (evidence came after the question, answered rightly)
    delays: list[int | None] = []
    stale: list[bool] = []
    false: list[bool] = []
    unscorable = 0
    for stream, reference in zip(streams, references, strict=True):
        for question in stream.transcript.questions:
            if not answer_is_right(reference, question, judge, window_frames):
                unscorable += 1
                continue
            right.append((question.evidence_after, answer_is_right(stream, question, judge, window_frames)))
        for revision in stream.transcript.revisions:
            if revision_delay(reference, revision, judge, window_frames) is None:
                unscorable += 1
                continue
            delays.append(revision_delay(stream, revision, judge, window_frames))
            stale.append(answer_is_stale(stream, revision, judge, window_frames))
        for confirmation in stream.transcript.confirmations:
            if reference.started(confirmation.slot, confirmation.slot + 1):
                unscorable += 1  # the reference speaks just then, so silence is not what is asked
                continue
            false.append(bool(false_revisions(stream, confirmation, judge, window_frames)))
    made = [delay for delay in delays if delay is not None]
    after = [ok for late, ok in right if late]
    before = [ok for late, ok in right if not late]
    return {
        "n_streams": len(streams),
        "n_questions": len(right),
        "n_answers": len(after),
        "n_revisions": len(delays),
        "n_confirmations": len(false),
        "n_unscorable": unscorable,
        **decision_figures(transcripts),
        "answer_accuracy": _ratio(sum(ok for _, ok in right), len(right)),
        "answer_accuracy_evidence_after": _ratio(sum(after), len(after)),
        "answer_accuracy_evidence_before": _ratio(sum(before), len(before)),
        "revision_accuracy": _ratio(len(made), len(delays)),
        "revision_delay_frames": _ratio(sum(made), len(made)),
        "stale_rate": _ratio(sum(stale), len(stale)),
        "false_revision_rate": _ratio(sum(false), len(false)),
    }


def figure_names() -> list[str]:
    """The names of `streaming_figures`."""
    return list(streaming_figures([], TextJudge()))


def slot_errors(transcript: StreamTranscript) -> list[bool]:
    """Per slot, whether the model spoke where the reference is silent or the other way round."""
    return [slot.reference_state != "unknown" and slot.speaks != slot.reference_speaks for slot in transcript.slots]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else NOT_MEASURED
