"""When what is said: a stream's frames and user events as a row of slots, and its replies placed in them.

A slot is what stands after one anchor, or after the header of an assistant turn. It lasts from its own time
to that of the next slot. Nothing here knows labels or rows; `compiler.py` writes the row from the slots.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from moss_train.errors import ConfigError, SampleError
from moss_train.streams.config import CompilerConfig
from moss_train.streams.media import SAME_MOMENT_S
from moss_train.streams.schema import Reply, StreamSample, Thought, UserEvent
from moss_train.streams.silence import Interval, mark_silence
from moss_train.streams.tokenizer import StreamTokenizer


@dataclass
class Piece:
    """The part of a reply that stands in one slot."""

    event: Reply
    ids: list[int]
    starts: bool  #: the reply begins here, or goes on here after a pause
    stops: bool  #: a silence ends the reply (or its part before a pause) in this slot
    offset: int = 0  #: ids of the reply said in earlier slots


@dataclass
class ThinkUnit:
    """A thought that stands in a slot, its marks included."""

    event: Thought
    ids: list[int]


@dataclass
class TimelineSlot:
    """One opportunity to speak; without a piece it is silence."""

    frame: int  #: index of the frame whose anchor opens it; -1 after a header
    time_s: float
    end_s: float
    opens_turn: bool  #: it follows an assistant header
    question: UserEvent | None = None  #: what the user said before that header; None: an empty opening turn
    piece: Piece | None = None
    thoughts: list[ThinkUnit] = field(default_factory=list)  #: before anything is said
    taught: bool = True  #: if it is silence: known to be right
    stale: bool = False  #: if it is silence: the standing answer is known to be wrong
    confirms: bool = False  #: if it is silence: something changes and the standing answer holds
    thinned: bool = False  #: if it is silence: left untrained by `keep_silence`
    decides: bool = True  #: False: its frame came to be seen when it was too late to decide anything there


@dataclass
class _Emission:
    """What a reply says in which slot, in order; `cut` when the end of its turn breaks it off."""

    parts: list[tuple[int, list[int]]] = field(default_factory=list)
    cut: bool = False


def build_timeline(
    sample: StreamSample,
    arrivals: list[float],
    config: CompilerConfig,
    tokenizer: StreamTokenizer,
    stale: Sequence[Interval] = (),
) -> list[TimelineSlot]:
    """The slots of a stream whose frames arrive at `arrivals` (seconds, ascending), each with what it holds.

    In the intervals `stale` silence is known to be wrong. Raises SampleError when a reply has no slot to start in, or
    starts while another still runs, ConfigError for think units and a tokenizer without their marks.
    """
    table = _open_slots(sample, arrivals)
    slots = table.slots
    last_taken: tuple[int, Reply] | None = None
    question: UserEvent | None = None
    for index, event in enumerate(sample.events):
        if isinstance(event, UserEvent):
            question = event
        elif isinstance(event, Reply):
            start = _start_slot(sample, index, event, question, table)
            if last_taken is not None and start <= last_taken[0]:
                running_until = slots[last_taken[0]].time_s
                raise SampleError(
                    sample.key,
                    f"events[{index}].t: reply {event.id!r} starts at {slots[start].time_s} s while "
                    f"{last_taken[1].id!r} still runs (until after {running_until} s); one reply at a time: "
                    "move it, shorten the earlier one, or raise compiler.tokens_per_second",
                )
            last_taken = (_place(sample, index, event, start, table, config, tokenizer), event)
        elif isinstance(event, Thought) and config.think == "keep":
            slot = table.first_from(event.t)
            if slot is None:
                fault = f"no frame arrives at or after {event.t} s; move it to an earlier frame"
                raise SampleError(sample.key, f"events[{index}].t: {fault}")
            slots[slot].thoughts.append(ThinkUnit(event, _think_ids(sample, event, tokenizer)))
    if config.perceive == "blocked":
        _say_at_once(slots)
    mark_silence(sample, slots, config, stale)
    return slots


def _think_ids(sample: StreamSample, event: Thought, tokenizer: StreamTokenizer) -> list[int]:
    special = tokenizer.special
    said = tokenizer.encode(event.text) if event.text else [special.skip]
    ids = [special.think_start, *said, special.think_end]
    if None in ids:
        role = "skip" if None not in (special.think_start, special.think_end) else "think_start and think_end"
        raise ConfigError(
            f"sample {sample.key!r} holds think units, and no token of the tokenizer plays the role {role}: set "
            "tokenizer.think_tokens=true, or name tokens in tokenizer.special_ids, or compiler.think=drop"
        )
    return [int(token) for token in ids if token is not None]


def _say_at_once(slots: list[TimelineSlot]) -> None:
    """No new frames during a reply: all of it is said in its first slot, and the frames that arrive meanwhile come
    after it. Only at the last of them can be decided anew, and only if the reply was said to its end: when the user
    cut it, none of them was looked at in time."""
    first = 0
    while first < len(slots):
        piece, end = slots[first].piece, first + 1
        while piece is not None and end < len(slots):
            more = slots[end].piece
            if more is None or more.starts:
                break
            piece.ids, piece.stops = [*piece.ids, *more.ids], more.stops
            slots[end].piece, slots[end].decides = None, False
            end += 1
        if piece is not None and piece.stops and end > first + 1:
            slots[end - 1].decides = True
        first = end


@dataclass(frozen=True)
class _Table:
    """The slots of a stream, and where to find them: a long one has many slots and many replies."""

    slots: list[TimelineSlot]
    arrivals: list[float]
    of_frame: list[int]  #: frame -> its slot
    of_question: dict[str, int]  #: user event -> the slot after its header
    headers: list[int]  #: slots that open a turn, ascending

    def first_from(self, time_s: float) -> int | None:
        """The slot of the first frame that arrives at or after `time_s`."""
        frame = bisect_left(self.arrivals, time_s - SAME_MOMENT_S)
        return self.of_frame[frame] if frame < len(self.of_frame) else None

    def turn_end(self, slot: int) -> int:
        """The last slot of the turn of `slot`."""
        following = bisect_right(self.headers, slot)
        return (self.headers[following] if following < len(self.headers) else len(self.slots)) - 1


def _open_slots(sample: StreamSample, arrivals: list[float]) -> _Table:
    """Empty slots, in order."""
    start_s, end_s = sample.sampling.start_s, sample.sampling.end_s
    questions = [event for event in sample.events if isinstance(event, UserEvent)]
    opening = [event for event in questions if event.t <= start_s + SAME_MOMENT_S or event.t < arrivals[0]]
    later = questions[len(opening) :]
    slots = [TimelineSlot(-1, event.t, end_s, True, event) for event in opening]
    slots = slots or [TimelineSlot(-1, start_s, end_s, True)]
    for frame, arrival in enumerate(arrivals):
        slots.append(TimelineSlot(frame, arrival, end_s, False))
        following = arrivals[frame + 1] if frame + 1 < len(arrivals) else float("inf")
        while later and later[0].t < following - SAME_MOMENT_S:
            event = later.pop(0)
            slots.append(TimelineSlot(-1, event.t, end_s, True, event))
    for slot, following_slot in zip(slots, slots[1:], strict=False):
        slot.end_s = following_slot.time_s
    return _Table(
        slots,
        arrivals,
        of_frame=[index for index, slot in enumerate(slots) if slot.frame >= 0],
        of_question={slot.question.id: index for index, slot in enumerate(slots) if slot.question is not None},
        headers=[index for index, slot in enumerate(slots) if slot.opens_turn],
    )


def _start_slot(
    sample: StreamSample,
    index: int,
    reply: Reply,
    question: UserEvent | None,
    table: _Table,
) -> int:
    """The first slot a reply may start in."""
    if question is None and reply.evidence == [] and reply.t <= table.slots[0].time_s + SAME_MOMENT_S:
        return 0
    if question is not None and abs(reply.t - question.t) <= SAME_MOMENT_S:
        # the first frame arrives at the very time of an opening question: only a reply that rests on
        # nothing seen is said before it
        if question.t > sample.sampling.start_s + SAME_MOMENT_S or reply.evidence == []:
            return table.of_question[question.id]
    start = table.first_from(reply.t)
    if start is None:
        raise SampleError(
            sample.key,
            f"events[{index}].t: no frame arrives at or after {reply.t} s, so reply {reply.id!r} has no anchor to "
            "start at; move it to an earlier frame or raise sampling.end_s",
        )
    return start


def _place(
    sample: StreamSample,
    index: int,
    reply: Reply,
    start: int,
    table: _Table,
    config: CompilerConfig,
    tokenizer: StreamTokenizer,
) -> int:
    """Puts a reply into its slots; returns the last one it takes."""
    slots, limit = table.slots, table.turn_end(start)
    if reply.chunks is not None:
        texts = [(time_s, text) for time_s, text in reply.chunks]
        emission = _emit_at_times(texts, False, start, limit, slots, tokenizer)
    elif reply.words is not None:
        emission = _emit_at_times(_spaced_words(reply), True, start, limit, slots, tokenizer)
    else:
        emission = _emit_at_rate(reply.text, start, limit, slots, config, tokenizer)
    last = emission.parts[-1][0]
    following = slots[limit + 1].question if limit + 1 < len(slots) else None
    if reply.words is not None or reply.chunks is not None:
        # exact times say where each part starts, not when the last one is over
        emission.cut |= last == limit and following is not None and following.kind == "interrupt"
    if not reply.complete and last != limit:
        raise SampleError(
            sample.key,
            f"events[{index}].complete: reply {reply.id!r} breaks off at {slots[last].time_s} s, but its turn goes on "
            "(a reply without its silence must be the last of a turn); set it to true or add the user event that "
            "cuts it",
        )
    occupied = {slot for slot, _ in emission.parts}
    offset = 0
    for slot, ids in emission.parts:
        goes_on = slot + 1 in occupied
        cut_here = slot == limit and (emission.cut or not reply.complete)
        stops = not (goes_on or cut_here)
        slots[slot].piece = Piece(reply, ids, starts=slot - 1 not in occupied, stops=stops, offset=offset)
        offset += len(ids)
    return last


def _spaced_words(reply: Reply) -> list[tuple[float, str]]:
    words = [(start_s, word) for start_s, _, word in reply.words or []]
    if "".join(word for _, word in words) == reply.text:
        return words
    return [(start_s, word if index == 0 else " " + word) for index, (start_s, word) in enumerate(words)]


def _emit_at_times(
    texts: list[tuple[float, str]],
    join: bool,
    start: int,
    limit: int,
    slots: list[TimelineSlot],
    tokenizer: StreamTokenizer,
) -> _Emission:
    """Each text in the first slot from `start` on that is not before its time; the last frame's slot takes the rest.

    With `join` the texts of one slot are tokenised as one string, otherwise each alone.
    """
    emission = _Emission()
    slot = start
    grouped: list[tuple[int, list[str]]] = []
    for position, (time_s, text) in enumerate(texts):
        while position and slots[slot].time_s < time_s - SAME_MOMENT_S and slot < len(slots) - 1:
            slot += 1
        if position and slots[slot].opens_turn and slot < limit and slots[slot + 1].time_s <= time_s + SAME_MOMENT_S:
            slot += 1  # the first frame arrives at the very time of the opening header
        if slot > limit:
            emission.cut = True
            break
        if grouped and grouped[-1][0] == slot:
            grouped[-1][1].append(text)
        else:
            grouped.append((slot, [text]))
    for slot, parts in grouped:
        pieces = ["".join(parts)] if join else parts
        emission.parts.append((slot, [token for piece in pieces for token in tokenizer.encode(piece)]))
    return emission


def _emit_at_rate(
    text: str, start: int, limit: int, slots: list[TimelineSlot], config: CompilerConfig, tokenizer: StreamTokenizer
) -> _Emission:
    """At most tokens_per_second x (time since the reply began) tokens by the end of each slot, but one in each."""
    emission = _Emission()
    ids = tokenizer.encode(text)
    said = 0
    for slot in range(start, limit + 1):
        elapsed_s = slots[slot].end_s - slots[start].time_s
        until = max(said + 1, int(config.tokens_per_second * elapsed_s + 1e-6))
        if slot == len(slots) - 1:  # nothing arrives any more that could end the slot
            until = len(ids)
        emission.parts.append((slot, ids[said:until]))
        said = min(until, len(ids))
        if said == len(ids):
            return emission
    emission.cut = True
    return emission
