"""VideoLLM-online's four figures, from teacher-forced transcripts (its `stream_evaluate`).

A *turn* is one reply of the reference and the slots in which the model had to decide before it: from the slot after
the reply before to the one in which the reply begins. Slots marked unknown are no decisions. With n of them and k̂
(from 0) the first at which the model speaks, diff = n − k̂ − 1: 0 on time, above 0 early. Where it speaks at none, it is
shown frame after frame with silence between them, min(frames up to the end of the next turn, n − 1) of them, and diff
is minus the number after which it speaks; all of them when it does not, which is 0 for a turn of one decision, as in
the original. The user's next turn ends that, since another question is asked then.

* LM-PPL = exp(Σ cross-entropy / labels) over the labels of all replies, their stop silence included. (The original
  takes the mean of the exponentials of single turns, which one odd turn spoils.)
* LM-Correctness of a turn = labels right before the first wrong one / labels; mean over turns.
* TimeDiff of a turn = |diff| as time; mean over turns.
* Fluency of a turn with N_v decisions and N_l labels, N = N_v + N_l: (N_v + c) / N on time, c the labels right before
  the first wrong one; (N_v − diff) / N early; (N_v − 1) / N late; mean over turns.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moss_train.evaluate.metrics.replies import NOT_MEASURED, StreamReplies, mean
from moss_train.evaluate.transcript import RolledForward, StreamTranscript, Utterance


@dataclass(frozen=True)
class Turn:
    """One reply of the reference and the decisions that lead to it."""

    reply: Utterance
    decisions: tuple[int, ...]  #: ordinals of slots; the last is the one in which the reply begins

    def first_spoken(self, transcript: StreamTranscript) -> int | None:
        """k̂: the first decision at which the model speaks, from 0; None when there is none."""
        return next((k for k, slot in enumerate(self.decisions) if transcript.slots[slot].speaks), None)


def turns_of(transcript: StreamTranscript) -> Iterator[Turn]:
    """The turns with a reply of which anything is trained, in order."""
    begin = 0
    for reply in StreamReplies.of(transcript).reference:
        decisions = [
            slot for slot in range(begin, reply.slot + 1) if transcript.slots[slot].reference_state != "unknown"
        ]
        begin = reply.last_slot + 1
        if transcript.slots[reply.slot].labels:
            yield Turn(reply, tuple(decisions))


def frames_to_roll(transcript: StreamTranscript, turn: Turn) -> int:
    """How many further frames a model that missed the turn is shown."""
    slots = transcript.slots
    later = [reply.slot for reply in StreamReplies.of(transcript).reference if reply.slot > turn.reply.slot]
    end = later[0] + 1 if later else len(slots)
    count, slot = 0, turn.reply.slot + 1
    while slot < end and not slots[slot].opens_turn and count < len(turn.decisions) - 1:
        count, slot = count + 1, slot + 1
    return count


def language_figures(transcripts: Iterable[StreamTranscript]) -> dict[str, float]:
    """`lm_ppl`, `lm_correctness`, `time_diff_s`, `fluency` over all streams' turns, and `n_turns`."""
    nll = 0.0
    labels = 0
    correctness: list[float] = []
    differences_s: list[float] = []
    fluency: list[float] = []
    for transcript in transcripts:
        rolled = {missed.slot: missed for missed in transcript.rolled}
        for turn in turns_of(transcript):
            own = transcript.slots[turn.reply.slot : turn.reply.last_slot + 1]
            count, right = sum(slot.labels for slot in own), _right_before_the_first_wrong(own)
            nll += math.fsum(slot.labels_nll for slot in own)
            labels += count
            correctness.append(right / count)
            diff, seconds = _difference(transcript, turn, rolled)
            differences_s.append(seconds)
            good = len(turn.decisions)
            good += right if diff == 0 else -diff if diff > 0 else -1
            fluency.append(good / (len(turn.decisions) + count))
    return {
        "lm_ppl": math.exp(nll / labels) if labels else NOT_MEASURED,
        "lm_correctness": mean(correctness),
        "time_diff_s": mean(differences_s),
        "fluency": mean(fluency),
        "n_turns": len(correctness),
    }


def _difference(transcript: StreamTranscript, turn: Turn, rolled: dict[int, RolledForward]) -> tuple[int, float]:
    """diff in slots (above 0: early), and its size in seconds."""
    slots, onset = transcript.slots, turn.reply.slot
    spoken = turn.first_spoken(transcript)
    if spoken is not None:
        return len(turn.decisions) - spoken - 1, slots[onset].time_s - slots[turn.decisions[spoken]].time_s
    missed = rolled.get(onset)
    if missed is None:
        return 0, 0.0
    late = missed.spoke_after if missed.spoke_after is not None else missed.frames
    return -late, slots[onset + late].time_s - slots[onset].time_s


def _right_before_the_first_wrong(slots) -> int:
    right = 0
    for slot in slots:
        right += slot.labels_right
        if slot.labels_right < slot.labels:
            break
    return right
