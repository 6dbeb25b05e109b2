"""Which of a stream's silences are taught, and how much: known to be right, wrong by now, confirmed, or thinned out."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moss_train.streams.config import AugmentationConfig, CompilerConfig
from moss_train.streams.media import SAME_MOMENT_S
from moss_train.streams.schema import Confirm, Reply, SilenceInterval, StreamSample

if TYPE_CHECKING:
    from moss_train.streams.timeline import TimelineSlot

#: an interval of seconds, begin <= t < end
Interval = tuple[float, float]


def mark_silence(
    sample: StreamSample, slots: "list[TimelineSlot]", config: CompilerConfig, stale: Sequence[Interval] = ()
) -> None:
    """Marks the slots whose silence is not simply right.

    Stale is the silence between a revision's evidence and the revision (`stale_silence_guard`), and that of the
    intervals `stale`. A confirmation says of the silence in the slot of the first frame from its time on that it is
    right.
    """
    if sample.silence == "explicit":
        known = _Intervals((event.t, event.t_end) for event in sample.events if isinstance(event, SilenceInterval))
        for slot in slots:
            slot.taught = slot.time_s in known
    frames = [slot for slot in slots if slot.frame >= 0]
    times_s = [slot.time_s for slot in frames]
    for event in sample.events:
        if isinstance(event, Confirm):
            place = bisect_left(times_s, event.t - SAME_MOMENT_S)
            if place < len(frames):
                frames[place].confirms = frames[place].taught = True
    wrong = list(stale)
    if config.stale_silence_guard:
        wrong += [
            (event.evidence[1], event.t)
            for event in sample.events
            if isinstance(event, Reply) and event.kind == "revise" and event.evidence
        ]
    if wrong:
        intervals = _Intervals(wrong)
        for slot in slots:
            slot.stale = slot.time_s in intervals


def thin_out(slots: "list[TimelineSlot]", config: AugmentationConfig, rng: np.random.Generator) -> None:
    """Leaves idle silences untrained but for a share of `keep_silence`, and for those near a transition: the first and
    the last slot of a reply, a user's turn, a confirmation."""
    transitions = [
        slot.time_s
        for slot in slots
        if slot.opens_turn or slot.confirms or (slot.piece is not None and (slot.piece.starts or slot.piece.stops))
    ]
    kept = (rng.random(len(slots)) < config.keep_silence).tolist()
    reach_s = config.keep_silence_within_s + SAME_MOMENT_S
    for slot, keep in zip(slots, kept, strict=True):
        place = bisect_left(transitions, slot.time_s - reach_s)
        near = place < len(transitions) and transitions[place] <= slot.time_s + reach_s
        slot.thinned = slot.piece is None and not keep and not near


class _Intervals:
    """Moments from <= t < to of any of the given intervals."""

    def __init__(self, intervals: Iterable[Interval]):
        self._starts: list[float] = []
        self._ends: list[float] = []
        for start_s, end_s in sorted(intervals):
            if self._ends and start_s <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end_s)
            elif start_s < end_s:
                self._starts.append(start_s)
                self._ends.append(end_s)

    def __contains__(self, time_s: float) -> bool:
        place = bisect_right(self._starts, time_s + SAME_MOMENT_S) - 1
        return place >= 0 and time_s < self._ends[place] - SAME_MOMENT_S
