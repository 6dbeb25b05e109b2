"""The rules of public benchmarks: StreamingBench's proactive output, MMDuet's spans, OVO-Bench's probes.

Sources: the benchmarks' code; docs/evaluation.md says what of it was not verified.

* Proactive output (StreamingBench): the model is polled each second from the question to 4 s after the ground truth's
  time t; t̂ is the first poll at which it has spoken. The time is right iff |t̂ − t| ≤ 2 s; the output is right iff the
  time is and what it says contains the ground truth's words.
* In-span score (MMDuet): a judge gives 1 to 5 to each reply that begins inside the gold span, here the segment in which
  the reference's reply stands (`replies.Segment`); a span's score is the mean of its replies' scores, 1 without any.
* PAUC (the reward of MMDuet2): over the span [0, x_max] a step curve, 0.5 at first, then the best score so far less 1
  (0 to y_max = 4); PAUC = area / (x_max · y_max). Replies outside all spans are counted apart, `out_of_span_rate`.
* OVO-Bench: backward and real-time tasks are multiple choice; of the forward ones REC is an exact count, SSR and CRR
  are yes or no. A task's score is its accuracy, a category's the mean of its tasks', the total the mean of the three.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moss_train.evaluate.judges import Judge, score_of, words
from moss_train.evaluate.metrics.replies import NOT_MEASURED, Segment, StreamReplies, mean, ratio
from moss_train.evaluate.transcript import Question

PROACTIVE_TOLERANCE_S = 2.0
PROACTIVE_PATIENCE_S = 4.0  #: how long after the ground truth's time the model is polled
_PAUC_START, _PAUC_TOP = 0.5, 4.0

#: OVO-Bench's category → its tasks
OVO_TASKS: dict[str, tuple[str, ...]] = {
    "backward": ("EPM", "ASI", "HLD"),
    "realtime": ("OCR", "ACR", "ATR", "STU", "FPD", "OJR"),
    "forward": ("REC", "SSR", "CRR"),
}
_LETTER = re.compile(r"\b([A-H])\b")
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()


def proactive_time_s(stream: StreamReplies, question: Question, poll_s: float | None) -> float | None:
    """t̂: when the model is first found to have spoken after the question; None when not by the last poll.

    `poll_s` None looks at every moment instead of polling. The user's next turn ends the search.
    """
    slots = stream.transcript.slots
    asked_s, due_s = stream.time_s(question.asked_slot), stream.time_s(question.answer_slot)
    next_turn = next((at for at in range(question.asked_slot + 1, len(slots)) if slots[at].opens_turn), len(slots))
    replies = stream.started(question.asked_slot, next_turn)
    if not replies:
        return None
    found_s = stream.time_s(replies[0].slot)
    if poll_s is not None:
        found_s = asked_s + math.ceil((found_s - asked_s) / poll_s - 1e-6) * poll_s
    return found_s if found_s <= due_s + PROACTIVE_PATIENCE_S + 1e-6 else None


def proactive_figures(streams: Iterable[StreamReplies], poll_s: float | None = None) -> dict[str, float]:
    """`proactive_time_accuracy` and `proactive_accuracy` over the questions that must wait for their evidence, less
    those that the reference itself does not answer."""
    timely: list[float] = []
    right: list[float] = []
    for stream in streams:
        reference = StreamReplies.of(stream.transcript.as_reference())
        for question in stream.transcript.questions:
            if question.evidence_after and _proactive(reference, question, poll_s)[1]:
                in_time, is_right = _proactive(stream, question, poll_s)
                timely.append(in_time)
                right.append(is_right)
    return {"proactive_time_accuracy": mean(timely), "proactive_accuracy": mean(right)}


def _proactive(stream: StreamReplies, question: Question, poll_s: float | None) -> tuple[bool, bool]:
    """Whether the time is right, and whether the output is."""
    found_s = proactive_time_s(stream, question, poll_s)
    if found_s is None or abs(found_s - stream.time_s(question.answer_slot)) > PROACTIVE_TOLERANCE_S + 1e-6:
        return False, False
    first = next(reply for reply in stream.said if reply.slot >= question.asked_slot)
    return True, contains(first.text, question.answer)


def contains(said: str, reference: str) -> bool:
    """Whether the words of `reference` stand in `said` one after another; case and punctuation do not count."""
    said_words, wanted = words(said), words(reference)
    places = range(len(said_words) - len(wanted) + 1)
    return bool(wanted) and any(said_words[at : at + len(wanted)] == wanted for at in places)


def span_figures(streams: Iterable[StreamReplies], judge: Judge) -> dict[str, float]:
    """`in_span_score` (1 to 5), `pauc` (0.125 to 1), means over all spans, and `out_of_span_rate` of all replies."""
    scores: list[float] = []
    areas: list[float] = []
    outside = said = 0
    for stream in streams:
        inside = 0
        for segment in stream.segments():
            points = _scores_in(stream, segment, judge)
            inside += len(points)
            scores.append(mean([score for _, score in points]) if points else 1.0)
            if segment.end_s > segment.start_s:
                areas.append(pauc(points, segment.end_s - segment.start_s))
        said += len(stream.said)
        outside += len(stream.said) - inside
    return {"in_span_score": mean(scores), "pauc": mean(areas), "out_of_span_rate": ratio(outside, said)}


def _scores_in(stream: StreamReplies, segment: Segment, judge: Judge) -> list[tuple[float, float]]:
    """(seconds from the span's beginning, score) of each reply that begins in a segment."""
    return [
        (stream.time_s(reply.slot) - segment.start_s, score_of(judge, reply.text, segment.reply.text))
        for reply in stream.started(segment.first, segment.end)
    ]


def pauc(points: Sequence[tuple[float, float]], length_s: float) -> float:
    """Area under the step curve of the best score, as a share of the whole. `points`: (seconds, score 1 to 5)."""
    area, since_s, height = 0.0, 0.0, _PAUC_START
    for at_s, score in sorted(points):
        area += height * (at_s - since_s)
        since_s, height = at_s, max(height, score - 1)
    return (area + height * (length_s - since_s)) / (length_s * _PAUC_TOP)


@dataclass(frozen=True)
class ProbeAnswer:
    """What a model said when it was asked at one moment of a clip."""

    key: str
    task: str  #: `EPM`, …: one of `OVO_TASKS`
    said: str
    answer: str  #: the option's letter, the count, or "yes" / "no"

    @property
    def right(self) -> bool:
        if self.task == "REC":
            return count_in(self.said) == int(self.answer)
        if self.task in ("SSR", "CRR"):
            found = [word for word in words(self.said) if word in ("yes", "no")]
            return bool(found) and found[0] == self.answer
        return letter_in(self.said) == self.answer


def letter_in(said: str) -> str | None:
    """The first option letter that stands alone: of "(B) A cat." it is B."""
    found = _LETTER.search(said)
    return found[1] if found else None


def count_in(said: str) -> int | None:
    """The first whole number, in digits or (up to ten) as a word."""
    for word in words(said):
        if word.isascii() and word.isdigit():
            return int(word)
        if word in _NUMBER_WORDS:
            return _NUMBER_WORDS.index(word)
    return None


def ovo_figures(answers: Sequence[ProbeAnswer]) -> dict[str, float]:
    """`ovo_<task>`, `ovo_<category>` and `ovo_total`, each NaN without its parts, and `n_probes`.

    A category is the mean of those of its tasks that were asked, the total of those categories.
    """
    figures: dict[str, float] = {}
    categories: list[float] = []
    for category, tasks in OVO_TASKS.items():
        asked: list[float] = []
        for task in tasks:
            right = [answer.right for answer in answers if answer.task == task]
            figures[f"ovo_{task.lower()}"] = mean(right)
            if right:
                asked.append(figures[f"ovo_{task.lower()}"])
        figures[f"ovo_{category}"] = mean(asked)
        if asked:
            categories.append(figures[f"ovo_{category}"])
    return figures | {"ovo_total": mean(categories) if categories else NOT_MEASURED, "n_probes": len(answers)}
