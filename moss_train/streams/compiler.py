"""The compiler: one checked sample and the facts of its media become one token row.

Captions and conversations are written here, streams in `stream_rows.py`.
Layouts, labels and visibility follow the reference (model_facts C.2-C.4, G.2); the oracle in
`tests/streams/oracle.py` is written from those notes alone and must agree with what stands here.
"""

from collections.abc import Sequence

import numpy as np

from moss_train.errors import SampleError
from moss_train.streams.compiled import CompiledStream, FrameRequest, Kind
from moss_train.streams.config import CompilerConfig
from moss_train.streams.media import (
    PLACEHOLDERS,
    MediaInfo,
    offline_frame_times,
    stream_frame_count,
    stream_frame_times,
)
from moss_train.streams.row import RowWriter
from moss_train.streams.schema import CaptionSample, ConversationSample, Media, OfflineSampling, Sample, StreamSample
from moss_train.streams.sight import Sight
from moss_train.streams.stream_rows import drawn, plan_stream, write_stream
from moss_train.streams.template import TurnTemplate
from moss_train.streams.tokenizer import StreamTokenizer


def compile_sample(
    sample: Sample,
    media: dict[str, MediaInfo],
    tokenizer: StreamTokenizer,
    config: CompilerConfig,
    rng: np.random.Generator | None = None,
    jitter: Sequence[bool] | None = None,
    variation: int | None = None,
) -> CompiledStream:
    """The row of one sample. `media` maps media ids to what the index knows of them.

    `rng` draws the augmentations that leave its length alone (windows, arrival jitter, silences); None means none.
    `jitter`, one decision a frame (one token early or not), replaces the drawn ones. `variation` is the seed of those
    that change what is said (`augment.py`). Raises SampleError when the sample does not fit its media or the
    configuration.
    """
    check_known(sample, media)
    if isinstance(sample, StreamSample):
        info = media[sample.media[0].id]
        plan = plan_stream(sample, info, tokenizer, config, config.max_frames, variation)
        return write_stream(drawn(plan, rng, jitter))
    row = RowWriter(tokenizer)
    frames = _offline_frames(sample, media, config)
    if isinstance(sample, CaptionSample):
        _write_caption(row, sample, frames, tokenizer, config)
        kind = "caption"
    else:
        _write_conversation(row, sample, frames, tokenizer, config)
        kind = "conversation"
    requests = tuple(request for of_medium in frames for request in of_medium)
    return row.compiled(sample.key, kind, requests, config, Sight.whole(config))


def check_known(sample: Sample, media: dict[str, MediaInfo]) -> None:
    """SampleError unless every medium of the sample is described."""
    missing = [medium.id for medium in sample.media if medium.id not in media]
    if missing:
        raise SampleError(sample.key, f"media: nothing is known of {', '.join(missing)}; index the source again")


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
    times_s = _offline_times(sample, info, config)
    if not times_s:
        start_s = sample.sampling.start_s if sample.sampling else 0.0
        raise SampleError(
            sample.key,
            f"sampling: video {medium.id!r} ({info.duration_s} s) has no frame from {start_s} s on; mend the range",
        )
    return [FrameRequest(medium.id, time_s) for time_s in times_s]


def _offline_times(sample: CaptionSample | ConversationSample, info: MediaInfo, config: CompilerConfig) -> list[float]:
    """The times (seconds) of a video's frames, as the sample or else the configuration wants them."""
    sampling = sample.sampling or OfflineSampling()
    max_frames = min(sampling.max_frames or config.max_frames, config.max_frames)
    if sampling.times_s is not None:
        _refuse_beyond(sample, "sampling.times_s", len(sampling.times_s), max_frames)
        if sampling.times_s[-1] > info.duration_s:
            fault = f"{sampling.times_s[-1]} s lies beyond the video's {info.duration_s} s; remove it"
            raise SampleError(sample.key, f"sampling.times_s: {fault}")
        return sampling.times_s
    fps = sampling.fps or config.fps
    if config.sampling == "fixed_rate":
        end_s = info.duration_s if sampling.end_s is None else min(sampling.end_s, info.duration_s)
        if end_s <= sampling.start_s:
            return []
        _refuse_beyond(sample, "sampling", stream_frame_count(fps, sampling.start_s, end_s), max_frames)
        return stream_frame_times(fps, sampling.start_s, end_s)
    min_frames = min(sampling.min_frames or config.min_frames, max_frames)
    rate = None if config.sampling == "uniform" else fps
    return offline_frame_times(info, rate, min_frames, max_frames, sampling.start_s, sampling.end_s)


def _refuse_beyond(sample: Sample, where: str, count: int, max_frames: int) -> None:
    if count > max_frames:
        raise SampleError(
            sample.key,
            f"{where}: {count} frames exceed the limit of {max_frames}; ask for fewer or raise compiler.max_frames",
        )


def _split_at_media(text: str) -> list[str]:
    """The stretches of text around the placeholders: one more than there are placeholders."""
    for placeholder in PLACEHOLDERS.values():
        text = text.replace(placeholder, _CUT)
    return text.split(_CUT)


_CUT = PLACEHOLDERS["video"]


def _write_text(
    row: RowWriter,
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
    row: RowWriter,
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
    row: RowWriter,
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
    row: RowWriter,
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
