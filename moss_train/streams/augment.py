"""Streams in which something else is said than the sample says: wrong replies and their correction, interruptions.

Corruption follows VideoLLM-online's `augment` (showlab/videollm-online, `data/stream.py`, line 17): a past reply is
replaced by another one or left out, which is not learned; sometimes the right one is given a frame later, which is;
otherwise the silence on it is not learned either. An augmented stream is a sample like any other: it keeps all rules
of `rules.py` and is compiled in the same way. What does not fit is left as it was.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from pydantic_core import PydanticCustomError

from moss_train.errors import SampleError
from moss_train.streams import rules
from moss_train.streams.config import AugmentationConfig, CompilerConfig
from moss_train.streams.media import SAME_MOMENT_S
from moss_train.streams.schema import Confirm, Event, Reply, StreamSample, UserEvent
from moss_train.streams.silence import Interval
from moss_train.streams.timeline import TimelineSlot, build_timeline
from moss_train.streams.tokenizer import StreamTokenizer

#: replies, or places to interrupt, that are tried before a stream is left as it is
MOST_TRIES = 8


@dataclass(frozen=True)
class Augmented:
    """A stream with what is known of it beyond its events."""

    sample: StreamSample
    stale: tuple[Interval, ...] = ()  #: seconds in which silence is wrong


def augment_stream(
    sample: StreamSample,
    arrivals: Sequence[float],
    config: CompilerConfig,
    tokenizer: StreamTokenizer,
    rng: np.random.Generator,
) -> Augmented:
    """A variant of the stream, corrupted or interrupted or both; the stream itself where nothing of that fits it."""
    # where replies begin and end does not depend on when frames are seen
    stage = _Stage(list(arrivals), replace(config, perceive="overlapped"), tokenizer)
    varied = Augmented(sample)
    if stage.play(sample) is None:
        return varied  # its fault is found when it is compiled, and not made good here
    corrupts, interrupts = _draw_kind(config.augment, rng)
    if corrupts:
        varied = next(_corruptions(varied, stage, rng), varied)
    if interrupts:
        varied = next(_interruptions(varied, stage, rng), varied)
    return varied


def _draw_kind(augment: AugmentationConfig, rng: np.random.Generator) -> tuple[bool, bool]:
    """Whether the stream is corrupted, and whether it is interrupted, given that it is one of them."""
    corrupts, interrupts = augment.corruption, augment.interruption
    chances = [corrupts * (1 - interrupts), interrupts * (1 - corrupts), corrupts * interrupts]
    drawn = rng.random() * sum(chances)
    if drawn < chances[0]:
        return True, False
    return drawn >= chances[0] + chances[1], True


@dataclass(frozen=True)
class _Stage:
    """On what a stream is played."""

    arrivals: list[float]
    config: CompilerConfig
    tokenizer: StreamTokenizer

    def play(self, sample: StreamSample) -> list[TimelineSlot] | None:
        """The timeline; None when the sample breaks a rule or does not fit its video."""
        try:
            rules.check_stream(sample)
            return build_timeline(sample, self.arrivals, self.config, self.tokenizer)
        except (PydanticCustomError, SampleError):
            return None


def _corruptions(varied: Augmented, stage: _Stage, rng: np.random.Generator) -> Iterator[Augmented]:
    """The stream with one of its replies corrupted, in a random order of the replies; those that are valid."""
    sample, augment = varied.sample, stage.config.augment
    replies = [event for event in sample.events if isinstance(event, Reply)]
    victims = [reply for reply in replies if reply.train and not reply.stale and reply.complete]
    for place in rng.permutation(len(victims))[:MOST_TRIES]:
        victim = victims[int(place)]
        emptied, corrected = rng.random(2) < (augment.corruption_emptied, augment.correction)
        others = {reply.text for reply in replies} | set(augment.corruption_texts)
        texts = sorted(text for text in others if text.strip().casefold() != victim.text.strip().casefold())
        text = texts[int(rng.integers(len(texts)))] if texts else None
        made = _corrupt(sample, victim, None if emptied else text, bool(corrected), stage)
        if made is not None:
            yield Augmented(made.sample, varied.stale + made.stale)


def _corrupt(sample: StreamSample, victim: Reply, text: str | None, corrected: bool, stage: _Stage) -> Augmented | None:
    """The stream in which `victim` says `text` (None: nothing) instead; None where that cannot be."""
    at = sample.events.index(victim)
    replaced = any(isinstance(event, Reply) and event.supersedes == victim.id for event in sample.events)
    if text is None:
        # what was never said can only be replaced after it has been said
        corrected = corrected or replaced
    plain_words = {"chunks": None, "words": None}
    wrong = None
    if text is not None:
        name = _unused(f"{victim.id}~wrong", sample) if corrected else victim.id
        wrong = victim.model_copy(update={"id": name, "text": text, "stale": True, **plain_words})
    if not corrected:
        following = (event.t for event in sample.events[at + 1 :] if isinstance(event, Reply | UserEvent))
        until_s = next(following, sample.sampling.end_s)
        events = [wrong if event is victim else event for event in sample.events if not _confirms(event, victim)]
        return _valid(sample, [event for event in events if event is not None], (victim.t, until_s), stage)

    late_s = _next_frame(sample, victim, wrong, stage)
    if late_s is None:
        return None
    right = victim.model_copy(update={"t": late_s, **plain_words})
    if wrong is not None:
        prefix = stage.config.augment.correction_prefix
        more = {"kind": "revise", "supersedes": wrong.id, "text": prefix + victim.text, "evidence": None}
        right = right.model_copy(update=more)
    # until the right reply is given there is nothing to confirm
    after = [e for e in sample.events[at + 1 :] if not (_confirms(e, victim) and e.t <= late_s + SAME_MOMENT_S)]
    place = bisect_left([event.t for event in after], late_s)
    said = [] if wrong is None else [wrong]
    events = [*sample.events[:at], *said, *after[:place], right, *after[place:]]
    return _valid(sample, events, (victim.t, late_s), stage)


def _valid(sample: StreamSample, events: list[Event], stale: Interval, stage: _Stage) -> Augmented | None:
    """The stream with other events; None when they break a rule or do not fit."""
    made = sample.model_copy(update={"events": events})
    return Augmented(made, (stale,)) if stage.play(made) is not None else None


def _next_frame(sample: StreamSample, victim: Reply, wrong: Reply | None, stage: _Stage) -> float | None:
    """When the frame arrives after the wrong reply (or after the frame at which nothing was said); None when the turn
    is over by then, or the wrong reply does not fit."""
    if wrong is not None:  # under the old name, since others refer to it
        stand_in = wrong.model_copy(update={"id": victim.id})
        events = [stand_in if event is victim else event for event in sample.events]
        sample = sample.model_copy(update={"events": events})
    slots = stage.play(sample)
    if slots is None:
        return None
    own = [index for index, slot in enumerate(slots) if slot.piece is not None and slot.piece.event.id == victim.id]
    following = (own[-1] if wrong is not None else own[0]) + 1
    return slots[following].time_s if following < len(slots) and not slots[following].opens_turn else None


def _confirms(event: Event, reply: Reply) -> bool:
    return isinstance(event, Confirm) and event.confirms == reply.id


def _interruptions(varied: Augmented, stage: _Stage, rng: np.random.Generator) -> Iterator[Augmented]:
    """The stream with one of its replies cut by the user, at frames in a random order; those that are valid."""
    sample, texts = varied.sample, stage.config.augment.interruption_texts
    slots = stage.play(sample)
    if slots is None:
        return
    # after which slots a reply goes on
    places = [
        index
        for index, (slot, following) in enumerate(zip(slots, slots[1:], strict=False))
        if slot.piece is not None
        and following.piece is not None
        and not following.piece.starts
        and slot.piece.event.train
        and not slot.piece.event.stale
        and slot.piece.event.complete
    ]
    for place in rng.permutation(len(places))[:MOST_TRIES]:
        slot, following = slots[places[int(place)]], slots[places[int(place)] + 1]
        text = texts[int(rng.integers(len(texts)))]
        cut_s = (slot.time_s + following.time_s) / 2
        if min(cut_s - slot.time_s, following.time_s - cut_s) <= SAME_MOMENT_S:
            continue
        if any(abs(event.t - cut_s) <= SAME_MOMENT_S for event in sample.events):
            continue
        stop = UserEvent(id=_unused("~stop", sample), t=cut_s, role="user", kind="interrupt", text=text)
        at = bisect_left([event.t for event in sample.events], cut_s)
        made = sample.model_copy(update={"events": [*sample.events[:at], stop, *sample.events[at:]]})
        played = stage.play(made)
        if played is None:
            continue
        ends = [s.piece.stops for s in played if s.piece is not None and s.piece.event.id == slot.piece.event.id]
        if not ends[-1]:  # else the rest of it is not missed
            yield Augmented(made, varied.stale)


def _unused(name: str, sample: StreamSample) -> str:
    taken = {event.id for event in sample.events}
    return next(one for one in (name, *(f"{name}{number}" for number in range(len(taken)))) if one not in taken)
