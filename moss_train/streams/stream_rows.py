"""A stream's token row: its timeline written slot by slot, whole or from one slot to another.

`split.py` decides where a long stream is cut; `compiler.py` writes it whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moss_train.errors import SampleError
from moss_train.streams.augment import augment_stream
from moss_train.streams.compiled import CompiledStream, FrameRequest, Kind, Slot
from moss_train.streams.config import CompilerConfig
from moss_train.streams.contrasts import Contrast, find_contrasts
from moss_train.streams.jitter import draw_shifts
from moss_train.streams.media import MediaInfo, stream_frame_count, stream_frame_times
from moss_train.streams.row import RowWriter
from moss_train.streams.schema import StreamSample
from moss_train.streams.sight import Sight
from moss_train.streams.silence import Interval, thin_out
from moss_train.streams.template import TurnTemplate
from moss_train.streams.timeline import Piece, TimelineSlot, build_timeline
from moss_train.streams.tokenizer import StreamTokenizer

#: frames of one sample, split or not: bounds what a hostile or mistaken sample can make the compiler hold
MAX_SAMPLE_FRAMES = 1 << 18


@dataclass(frozen=True)
class StreamPlan:
    """All that is decided of a stream before its row is written."""

    sample: StreamSample
    tokenizer: StreamTokenizer
    config: CompilerConfig
    template: TurnTemplate
    prefix: list[int]  #: begin of text and the system turn
    arrivals: list[float]  #: seconds, one a frame
    timeline: list[TimelineSlot]
    shifts: list[int]  #: one a frame: by how many tokens it moves where the jitter's rule allows
    sight: Sight
    contrasts: dict[str, Contrast]  #: of revisions, by event


def plan_stream(
    sample: StreamSample,
    info: MediaInfo,
    tokenizer: StreamTokenizer,
    config: CompilerConfig,
    max_frames: int,
    variation: int | None = None,
) -> StreamPlan:
    """Places every event of the sample; SampleError when it does not fit its video, itself or `max_frames`.

    `variation` seeds what else is said than the sample says (`augment.py`). Windows, jitter and silences, which leave
    lengths alone, are those of a plan that is not augmented: see `drawn`.
    """
    arrivals = _arrivals(sample, info, config, max_frames)
    template = TurnTemplate(tokenizer)
    stale: Sequence[Interval] = ()
    if variation is not None:
        varied = augment_stream(sample, arrivals, config, tokenizer, np.random.Generator(np.random.PCG64(variation)))
        sample, stale = varied.sample, varied.stale
    timeline = build_timeline(sample, arrivals, config, tokenizer, stale)
    return StreamPlan(
        sample=sample,
        tokenizer=tokenizer,
        config=config,
        template=template,
        prefix=template.system_prefix(sample.system),
        arrivals=arrivals,
        timeline=timeline,
        shifts=[0] * len(arrivals),
        sight=Sight.of(config, None),
        contrasts=find_contrasts(sample, timeline, tokenizer),
    )


def drawn(plan: StreamPlan, rng: np.random.Generator | None, jitter: Sequence[bool] | None = None) -> StreamPlan:
    """The plan with windows, jitter and silences that `rng` draws, none without; the timeline given is changed in
    place. `jitter`, one decision a frame (one token early or not), replaces the drawn ones."""
    config = plan.config
    sight = Sight.of(config, rng)
    if rng is not None and config.augment.keep_silence < 1.0:
        # from a generator of its own: neither it nor the jitter, which draw more where there are more frames, shifts
        # what the other draws
        thin_out(plan.timeline, config.augment, np.random.Generator(np.random.PCG64(int(rng.integers(2**63)))))
    shifts = [-int(early) for early in jitter or ()]
    if jitter is None:
        shifts = draw_shifts(len(plan.arrivals), config.jitter_probability, config.jitter_shifts, rng)
    return replace(plan, sight=sight, shifts=shifts)


def write_stream(
    plan: StreamPlan, first: int = 0, end: int | None = None, context: Sequence[int] = (), part: int = 0
) -> CompiledStream:
    """The row of the slots [first, end) of the timeline, after the prefix and `context` (untrained ids).

    A row that does not begin the stream must begin with a frame; its frames count from 0.
    """
    end = len(plan.timeline) if end is None else end
    timeline = plan.timeline[first:end]
    row = RowWriter(plan.tokenizer)
    row.untrained([*plan.prefix, *context])
    decisions: list[int] = []  # position of the token that predicts each slot, as long as no frame is moved
    for index, slot in enumerate(timeline, start=first):
        opening = opening_ids(plan, slot, index)
        if index and slot.opens_turn:
            row.trained(opening[:1], _turn_end_kind(plan, index - 1))
            opening = opening[1:]
        row.untrained(opening)
        for thought in slot.thoughts:
            row.trained(thought.ids, Kind.THINK if thought.event.train else Kind.IGNORED)
        decisions.append(len(row.ids) - 1)
        _write_slot(row, slot, plan)
    if end == len(plan.timeline):
        row.trained(plan.template.close_turn(), _turn_end_kind(plan, end - 1))

    frames = [slot.frame for slot in timeline if slot.frame >= 0]
    # a frame that is thought about is not seen before what comes to mind
    shifts = [0 if slot.thoughts else plan.shifts[slot.frame] for slot in timeline if slot.frame >= 0]
    if first:
        shifts[0] = 0  # the token before it belongs to the part before
    row.jitter(shifts)
    anchors = [position for position, token in enumerate(row.ids) if token == plan.tokenizer.special.anchor]
    positions = [
        at if slot.frame < 0 or slot.thoughts else anchors[slot.frame - frames[0]]
        for slot, at in zip(timeline, decisions, strict=True)
    ]
    requests = tuple(FrameRequest(plan.sample.media[0].id, plan.arrivals[frame]) for frame in frames)
    slots = _describe_slots(row, timeline, positions, plan.tokenizer, frames[0] if frames else 0)
    return row.compiled(plan.sample.key, "stream", requests, plan.config, plan.sight, slots, part)


def opening_ids(plan: StreamPlan, slot: TimelineSlot, index: int) -> list[int]:
    """What stands before what slot `index` of the timeline says: an anchor, or the user's turn and a header."""
    if not slot.opens_turn:
        return [plan.tokenizer.special.anchor]
    turn = plan.template.user_turn(slot.question.text if slot.question else "")
    return [*plan.template.close_turn(), *turn] if index else turn


def said_length(slot: TimelineSlot) -> int:
    """Tokens that a slot thinks and says, its silence included."""
    thought = sum(len(unit.ids) for unit in slot.thoughts)
    return thought + (1 if slot.piece is None else len(slot.piece.ids) + slot.piece.stops)


def _arrivals(sample: StreamSample, info: MediaInfo, config: CompilerConfig, max_frames: int) -> list[float]:
    sampling = sample.sampling
    fps = sampling.fps or config.fps
    count = len(sampling.times_s or ()) or stream_frame_count(fps, sampling.start_s, sampling.end_s)
    if count > max_frames:
        limit = f"compiler.max_frames={max_frames}" if max_frames < MAX_SAMPLE_FRAMES else f"the limit of {max_frames}"
        raise SampleError(
            sample.key,
            f"sampling: {count} frames{'' if sampling.times_s else f' at {fps} fps'} exceed {limit}; "
            "ask for fewer, raise the limit, or have long streams cut (data.over_budget=split)",
        )
    arrivals = sampling.times_s or stream_frame_times(fps, sampling.start_s, sampling.end_s)
    if arrivals[-1] > info.duration_s:
        raise SampleError(
            sample.key,
            f"sampling: the frame at {arrivals[-1]} s lies beyond the video's {info.duration_s} s; lower end_s or "
            "drop the time",
        )
    return arrivals


def _turn_end_kind(plan: StreamPlan, index: int) -> Kind:
    """What the end of a turn teaches whose last slot is `index`: nothing inside a reply, which the user has cut."""
    piece = plan.timeline[index].piece
    cut = piece is not None and not piece.stops
    return Kind.TEXT if plan.config.train_turn_end_streams and not cut else Kind.IGNORED


def _write_slot(row: RowWriter, slot: TimelineSlot, plan: StreamPlan) -> None:
    silence = [plan.tokenizer.special.silence]
    piece = slot.piece
    if piece is None:
        kind = Kind.STALE if slot.stale else Kind.IDLE_SILENCE
        weight = plan.config.confirmation_weight if slot.confirms and not slot.stale else 1.0
        row.trained(silence, kind if _note(slot) not in UNTRAINED_NOTES else Kind.IGNORED, weight)
        return
    begin = len(row.ids)
    first, rest = _reply_kinds(piece)
    row.trained(piece.ids[:1], first)
    row.trained(piece.ids[1:], rest)
    if piece.stops:
        row.trained(silence, Kind.STOP_SILENCE if piece.event.train else Kind.IGNORED)
    contrast = plan.contrasts.get(piece.event.id)
    if contrast is not None and not piece.event.stale:
        place = contrast.place - piece.offset
        if 0 <= place < len(piece.ids) or (place == len(piece.ids) and piece.stops and contrast.ends):
            row.contrasts[begin + place] = contrast.token


#: notes of slots whose silence is not trained
UNTRAINED_NOTES = ("unknown", "blocked", "thinned")


def _note(slot: TimelineSlot) -> str:
    """`Slot.note`: what is special about the silence of a slot."""
    if slot.piece is not None:
        return ""
    if not slot.decides:
        return "blocked"
    if not slot.taught:
        return "unknown"
    if slot.stale:
        return "stale"
    if slot.confirms:
        return "confirm"
    return "thinned" if slot.thinned else ""


def _reply_kinds(piece: Piece) -> tuple[Kind, Kind]:
    """What the first and the other tokens of a piece teach."""
    if not piece.event.train:
        return Kind.IGNORED, Kind.IGNORED
    if piece.event.stale:
        return Kind.STALE, Kind.STALE
    if piece.event.kind == "revise":
        return Kind.REVISION, Kind.REVISION
    return (Kind.ONSET if piece.starts else Kind.TEXT), Kind.TEXT


def _describe_slots(
    row: RowWriter, timeline: list[TimelineSlot], decisions: list[int], tokenizer: StreamTokenizer, first_frame: int
) -> tuple[Slot, ...]:
    """The slots as evaluation reads them, from the row as it finally stands; frames count from `first_frame`."""
    special = tokenizer.special
    breaks = {special.anchor, special.end_of_turn, special.silence}
    slots = []
    for slot, position in zip(timeline, decisions, strict=True):
        end = position + 1
        while end < len(row.ids) and row.ids[end] not in breaks:
            end += 1
        said = row.ids[position + 1 : end]
        if slot.piece is not None and said:
            state = "speak" if slot.piece.starts else "continue"
        else:  # a jittered frame may have taken a slot's only token
            state = "silence" if slot.piece is None and _note(slot) in ("", "confirm", "thinned") else "unknown"
        slots.append(
            Slot(
                frame=slot.frame - first_frame if slot.frame >= 0 else -1,
                position=position,
                time_s=slot.time_s,
                state=state,
                text=tokenizer.decode(said) if said else "",
                ends=slot.piece is not None and slot.piece.stops,
                event_id=slot.piece.event.id if slot.piece is not None else None,
                note=_note(slot),
            )
        )
    return tuple(slots)
