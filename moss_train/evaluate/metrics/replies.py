"""The replies of one stream and the stretches of it that they are judged in; what all figures are made from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moss_train.evaluate.transcript import StreamTranscript, Utterance, model_utterances, reference_utterances

NOT_MEASURED = math.nan


@dataclass(frozen=True)
class Segment:
    """The stretch in which one reply of the reference stands: from the slot in which it begins to the one in which the
    reference begins another, the user takes a turn, or the stream ends."""

    reply: Utterance  #: the reference's
    first: int  #: ordinals of its slots: [first, end)
    end: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class StreamReplies:
    """One transcript with its replies assembled."""

    transcript: StreamTranscript
    said: list[Utterance]  #: the model's
    reference: list[Utterance]

    @classmethod
    def of(cls, transcript: StreamTranscript) -> "StreamReplies":
        return cls(transcript, model_utterances(transcript.slots), reference_utterances(transcript.slots))

    def time_s(self, slot: int) -> float:
        return self.transcript.slots[slot].time_s

    @property
    def end_s(self) -> float:
        """When the stream ends; the last slot lasts as long as the one before where the transcript does not say."""
        slots = self.transcript.slots
        if self.transcript.end_s is not None:
            return self.transcript.end_s
        return slots[-1].time_s + (slots[-1].time_s - slots[-2].time_s if len(slots) > 1 else 0.0)

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
        """The model's replies that begin in the slots [first, end)."""
        return [reply for reply in self.said if first <= reply.slot < end]

    def segments(self) -> list[Segment]:
        """The segments of all replies of the reference, in order; they do not overlap."""
        slots, found = self.transcript.slots, []
        onsets = {reply.slot for reply in self.reference}
        for reply in self.reference:
            end = reply.slot + 1
            while end < len(slots) and end not in onsets and not slots[end].opens_turn:
                end += 1
            end_s = slots[end].time_s if end < len(slots) else self.end_s
            found.append(Segment(reply, reply.slot, end, self.time_s(reply.slot), end_s))
        return found


def ratio(part: float, whole: float) -> float:
    """part / whole; NaN, not measured, when there is nothing to divide by."""
    return part / whole if whole else NOT_MEASURED


def mean(values: Sequence[float]) -> float:
    return ratio(math.fsum(values), len(values))
