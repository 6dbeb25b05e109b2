"""Which clips a page shows, when it cannot show all."""

from collections import Counter
from collections.abc import Sequence

from moss_train.evaluate.metrics import slot_errors
from moss_train.evaluate.transcript import StreamTranscript

_NOTHING = "nobody asks"


def choose_clips(transcripts: Sequence[StreamTranscript], count: int = 12) -> list[StreamTranscript]:
    """`count` clips that show as much different behaviour as possible, mistakes among them, in their old order."""
    features = [_features(transcript) for transcript in transcripts]
    shown: Counter[str] = Counter()
    chosen: list[int] = []
    rest = list(range(len(transcripts)))
    while rest and len(chosen) < count:
        best = max(rest, key=lambda index: (sum(_worth(feature, shown) for feature in features[index]), -index))
        rest.remove(best)
        chosen.append(best)
        shown.update(features[best])
    return [transcripts[index] for index in sorted(chosen)]


def _worth(feature: str, shown: Counter[str]) -> float:
    """How much another clip with this feature would add to those chosen."""
    interest = 0.3 if feature == _NOTHING else 1.0
    return interest / (1 + shown[feature]) ** 2


def _features(transcript: StreamTranscript) -> set[str]:
    marks = {
        "revision": transcript.revisions,
        "confirmation": transcript.confirmations,
        "interruption": [turn for turn in transcript.turns if turn.interrupts],
        "evidence after": [question for question in transcript.questions if question.evidence_after],
        "evidence before": [question for question in transcript.questions if not question.evidence_after],
        "two questions": transcript.questions[1:],
        "long reply": [slot for slot in transcript.slots if slot.reference_state == "continue"],
        "mistake": [error for error in slot_errors(transcript) if error],
    }
    found = {name for name, items in marks.items() if items}
    return found or {_NOTHING}
