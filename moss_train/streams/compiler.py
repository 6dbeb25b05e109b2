"""The stream compiler: one checked sample and the facts of its media become one token row.

Layouts, labels and visibility follow the reference (model_facts C.2-C.4, G.2); the oracle in
`tests/streams/oracle.py` is written from those notes alone and must agree with what stands here.
"""

from collections.abc import Sequence

import numpy as np

from moss_train.errors import SampleError
from moss_train.streams.compiled import IGNORED_LABEL, CompiledStream, FrameRequest, Kind, Slot
from moss_train.streams.config import CompilerConfig
from moss_train.streams.jitter import draw_decisions, swap_anchors
from moss_train.streams.media import (
    PLACEHOLDERS,
    MediaInfo,
    offline_frame_times,
    stream_frame_count,
    stream_frame_times,
)
from moss_train.streams.schema import CaptionSample, ConversationSample, Media, Sample, StreamSample
from moss_train.streams.template import TurnTemplate
from moss_train.streams.timeline import Piece, TimelineSlot, build_timeline
from moss_train.streams.tokenizer import StreamTokenizer

__all__ = ["TurnTemplate", "compile_sample"]


def compile_sample(
    sample: Sample,
    media: dict[str, MediaInfo],
    tokenizer: StreamTokenizer,
    config: CompilerConfig,
    rng: np.random.Generator | None = None,
    jitter: Sequence[bool] | None = None,
) -> CompiledStream:
    """The row of one sample. `media` maps media ids to what the index knows of them.

    `rng` draws the augmentations (arrival jitter); None means none. `jitter`, one decision a frame, replaces
    the drawn ones. Raises SampleError when the sample does not fit its media or the configuration.
    """
    missing = [medium.id for medium in sample.media if medium.id not in media]
    if missing:
        raise SampleError(sample.key, f"media: nothing is known of {', '.join(missing)}; index the source again")
    if isinstance(sample, StreamSample):
        return _compile_stream(sample, media, tokenizer, config, rng, jitter)
    row = _Row(tokenizer)
    frames = _offline_frames(sample, media, config)
    if isinstance(sample, CaptionSample):
        _write_caption(row, sample, frames, tokenizer, config)
        kind = "caption"
    else:
        _write_conversation(row, sample, frames, tokenizer, config)
        kind = "conversation"
    requests = tuple(request for of_medium in frames for request in of_medium)
    return row.compiled(sample.key, kind, requests, config)


class _Row:
    """The row while it is written: ids and, for every token, what it teaches as a target (not yet shifted)."""

    def __init__(self, tokenizer: StreamTokenizer):
        self._special = tokenizer.special
        self.ids: list[int] = []
        self.kinds: list[Kind] = []

    def untrained(self, ids: Sequence[int]) -> None:
        self.trained(ids, Kind.IGNORED)

    def trained(self, ids: Sequence[int], kind: Kind) -> None:
        self.ids += ids
        self.kinds += [kind] * len(ids)

    def anchors(self, count: int) -> None:
        self.untrained([self._special.anchor] * count)

    def jitter(self, decisions: Sequence[bool]) -> None:
        def swap(first: int, second: int) -> None:
            for column in (self.ids, self.kinds):
                column[first], column[second] = column[second], column[first]

        special = self._special
        swap_anchors(self.ids, decisions, special.anchor, special.silence, special.end_header, swap)

    def compiled(
        self,
        key: str,
        kind: str,
        frames: tuple[FrameRequest, ...],
        config: CompilerConfig,
        slots: tuple[Slot, ...] = (),
    ) -> CompiledStream:
        """Shifts the targets to the positions that predict them and derives visibility from the anchors."""
        ids_T = np.asarray(self.ids, dtype=np.int32)
        kinds_T = np.zeros(len(ids_T), dtype=np.uint8)
        kinds_T[:-1] = self.kinds[1:]
        labels_T = np.full(len(ids_T), IGNORED_LABEL, dtype=np.int32)
        labels_T[:-1] = ids_T[1:]
        labels_T[kinds_T == Kind.IGNORED] = IGNORED_LABEL
        is_anchor_T = ids_T == self._special.anchor
        hi_T = np.cumsum(is_anchor_T, dtype=np.int32)
        lo_T = np.zeros_like(hi_T) if config.window is None else np.maximum(0, hi_T - np.int32(config.window))
        return CompiledStream(
            key=key,
            kind=kind,
            ids=ids_T,
            labels=labels_T,
            kinds=kinds_T,
            weights=(kinds_T != Kind.IGNORED).astype(np.float32),
            visible_lo=lo_T,
            visible_hi=hi_T,
            positions=np.arange(len(ids_T), dtype=np.int32),
            frame_positions=np.flatnonzero(is_anchor_T).astype(np.int32),
            frames=frames,
            sinks=config.sinks,
            slots=slots,
        )


# --- streams ---------------------------------------------------------------------------------------------


def _compile_stream(
    sample: StreamSample,
    media: dict[str, MediaInfo],
    tokenizer: StreamTokenizer,
    config: CompilerConfig,
    rng: np.random.Generator | None,
    jitter: Sequence[bool] | None,
) -> CompiledStream:
    arrivals = _arrivals(sample, media[sample.media[0].id], config)
    timeline = build_timeline(sample, arrivals, config, tokenizer)
    template = TurnTemplate(tokenizer)
    row = _Row(tokenizer)
    row.untrained(template.system_prefix(sample.system))
    decisions: list[int] = []  # position of the token that predicts each slot, headers only
    for index, slot in enumerate(timeline):
        if slot.opens_turn:
            if index:
                row.untrained(template.close_turn())
            row.untrained(template.user_turn(slot.question.text if slot.question else ""))
        else:
            row.anchors(1)
        decisions.append(len(row.ids) - 1)
        _write_slot(row, slot, tokenizer)
    row.untrained(template.close_turn())  # the turn's end is external: it is never trained in a stream

    row.jitter(draw_decisions(len(arrivals), config.jitter_probability, rng) if jitter is None else jitter)
    anchors = [position for position, token in enumerate(row.ids) if token == tokenizer.special.anchor]
    decisions = [anchors[slot.frame] if slot.frame >= 0 else at for slot, at in zip(timeline, decisions, strict=True)]
    frames = tuple(FrameRequest(sample.media[0].id, time_s) for time_s in arrivals)
    return row.compiled(sample.key, "stream", frames, config, _describe_slots(row, timeline, decisions, tokenizer))


def _arrivals(sample: StreamSample, info: MediaInfo, config: CompilerConfig) -> list[float]:
    sampling = sample.sampling
    fps = sampling.fps or config.fps
    count = stream_frame_count(fps, sampling.start_s, sampling.end_s)
    if count > config.max_frames:
        raise SampleError(
            sample.key,
            f"sampling: {count} frames at {fps} fps exceed compiler.max_frames={config.max_frames}; "
            "split the stream, lower its fps, or raise the limit",
        )
    arrivals = stream_frame_times(fps, sampling.start_s, sampling.end_s)
    if arrivals[-1] > info.duration_s:
        raise SampleError(
            sample.key,
            f"sampling.end_s: the frame at {arrivals[-1]} s lies beyond the video's {info.duration_s} s; lower end_s",
        )
    return arrivals


def _write_slot(row: _Row, slot: TimelineSlot, tokenizer: StreamTokenizer) -> None:
    silence = [tokenizer.special.silence]
    piece = slot.piece
    if piece is None:
        kind = Kind.STALE if slot.stale else Kind.IDLE_SILENCE
        row.trained(silence, kind if slot.taught else Kind.IGNORED)
        return
    first, rest = _reply_kinds(piece)
    row.trained(piece.ids[:1], first)
    row.trained(piece.ids[1:], rest)
    if piece.stops:
        row.trained(silence, Kind.STOP_SILENCE if piece.event.train else Kind.IGNORED)


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
    row: _Row, timeline: list[TimelineSlot], decisions: list[int], tokenizer: StreamTokenizer
) -> tuple[Slot, ...]:
    """The slots as evaluation reads them, from the row as it finally stands."""
    special = tokenizer.special
    breaks = {special.anchor, special.end_of_turn, special.silence}
    slots = []
    for slot, position in zip(timeline, decisions, strict=True):
        end = position + 1
        while row.ids[end] not in breaks:
            end += 1
        said = row.ids[position + 1 : end]
        if slot.piece is not None and said:
            state = "speak" if slot.piece.starts else "continue"
        else:  # a jittered frame may have taken a slot's only token
            state = "silence" if slot.piece is None and slot.taught and not slot.stale else "unknown"
        slots.append(
            Slot(
                frame=slot.frame,
                position=position,
                time_s=slot.time_s,
                state=state,
                text=tokenizer.decode(said) if said else "",
                ends=slot.piece is not None and slot.piece.stops,
                event_id=slot.piece.event.id if slot.piece is not None else None,
            )
        )
    return tuple(slots)


# --- captions and conversations --------------------------------------------------------------------------


def _offline_frames(
    sample: CaptionSample | ConversationSample, media: dict[str, MediaInfo], config: CompilerConfig
) -> list[list[FrameRequest]]:
    """The frames of each medium, in the order of `sample.media`."""
    return [_frames_of(sample, medium, media[medium.id], config) for medium in sample.media]


def _frames_of(
    sample: CaptionSample | ConversationSample, medium: Media, info: MediaInfo, config: CompilerConfig
) -> list[FrameRequest]:
    if medium.kind == "image":
        return [FrameRequest(medium.id, 0.0)]
    sampling = sample.sampling
    fps = (sampling and sampling.fps) or config.fps
    max_frames = min((sampling and sampling.max_frames) or config.max_frames, config.max_frames)
    min_frames = min((sampling and sampling.min_frames) or config.min_frames, max_frames)
    start_s, end_s = (sampling.start_s, sampling.end_s) if sampling else (0.0, None)
    times = offline_frame_times(info, fps, min_frames, max_frames, start_s, end_s)
    if not times:
        raise SampleError(
            sample.key,
            f"sampling: video {medium.id!r} ({info.duration_s} s) has no frame from {start_s} s on; mend the range",
        )
    return [FrameRequest(medium.id, time_s) for time_s in times]


def _split_at_media(text: str) -> list[str]:
    """The stretches of text around the placeholders: one more than there are placeholders."""
    for placeholder in PLACEHOLDERS.values():
        text = text.replace(placeholder, _CUT)
    return text.split(_CUT)


_CUT = PLACEHOLDERS["video"]


def _write_text(
    row: _Row,
    text: str,
    frame_counts: list[int],
    kind: Kind,
    tokenizer: StreamTokenizer,
    first: list[int] | None = None,
) -> None:
    """Text with its media; each placeholder takes the next of `frame_counts`. `first` replaces the ids of stretch 0."""
    for index, stretch in enumerate(_split_at_media(text)):
        if index:
            row.anchors(frame_counts.pop(0))
        ids = first if index == 0 and first is not None else tokenizer.encode(stretch) if stretch else []
        row.trained(ids, kind)


def _write_caption(
    row: _Row,
    sample: CaptionSample,
    frames: list[list[FrameRequest]],
    tokenizer: StreamTokenizer,
    config: CompilerConfig,
) -> None:
    template, special = TurnTemplate(tokenizer), tokenizer.special
    counts = [len(of_medium) for of_medium in frames]
    prompt, text = sample.prompt, sample.text
    if len(_split_at_media(prompt + text)) == 1:
        prompt = "".join(PLACEHOLDERS[medium.kind] for medium in sample.media) + prompt
    row.untrained(template.system_prefix(None))
    if config.pretrain_template:
        _write_text(row, prompt, counts, Kind.IGNORED, tokenizer)
        _write_text(row, text, counts, Kind.TEXT, tokenizer)
        row.trained([special.end_of_text], Kind.TEXT)
    else:
        _write_turns(row, [(prompt, text, True)], counts, tokenizer, config)


def _write_conversation(
    row: _Row,
    sample: ConversationSample,
    frames: list[list[FrameRequest]],
    tokenizer: StreamTokenizer,
    config: CompilerConfig,
) -> None:
    row.untrained(TurnTemplate(tokenizer).system_prefix(sample.system))
    pairs = zip(sample.messages[::2], sample.messages[1::2], strict=True)
    turns = [(user.content, assistant.content, assistant.train) for user, assistant in pairs]
    _write_turns(row, turns, [len(of_medium) for of_medium in frames], tokenizer, config)


def _write_turns(
    row: _Row,
    turns: list[tuple[str, str, bool]],
    counts: list[int],
    tokenizer: StreamTokenizer,
    config: CompilerConfig,
) -> None:
    """(user text, answer, whether the answer is trained) of each exchange."""
    template = TurnTemplate(tokenizer)
    for question, answer, train in turns:
        opening = template.open_user(_split_at_media(question)[0])
        _write_text(row, question, counts, Kind.IGNORED, tokenizer, first=opening)
        row.untrained(template.end_user())
        kind = Kind.TEXT if train else Kind.IGNORED
        _write_text(row, answer, counts, kind, tokenizer)
        row.trained(template.close_turn(), kind if config.train_turn_end_offline else Kind.IGNORED)
