"""Rewriting a clip to the rate, size and keyframe gap that training needs, its time stamps kept exactly.

The pictures that are kept are those on screen at k / fps in the old clip, scaled and turned as a decoder for training
would hand them over, under the very stamps that they had (counted from the first picture's). So the picture on screen
at k / fps in the new clip is, but for the codec's loss, the one that was on screen then in the old.
"""

import io
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from moss_train.data.decoding.decode import decode_arrays
from moss_train.data.decoding.pictures import DecodeLimits, fitted_size
from moss_train.data.decoding.probe import MediaProbe, open_video, probe_media
from moss_train.errors import ConfigError, SampleError

CODECS = ("h264", "mjpeg")
#: decoded pictures that are held at once, bytes
BATCH_BYTES = 256_000_000
#: a new clip's clock, where the old one's allows: rounding to it stays within what counts as the same moment
LEAST_TICKS_PER_S = 1_000_000
MOST_TICKS_PER_S = 10_000_000
#: between two pictures of an MP4
MOST_TICKS = 2**31 - 1
#: no clip counts as better than this: identical pictures would count as infinitely good
BEST_PSNR_DB = 99.0


@dataclass
class TranscodeConfig:
    """How `data pack` rewrites clips."""

    fps: float | None = None
    """Rewrite clips to so many pictures a second, the highest rate at which training will show them: those on screen
    at k / fps, with the time stamps that they had. null: clips are packed as they are."""
    size: int = 448
    """Longer side of the new pictures, the model's image size; smaller clips keep their size."""
    keyframe_gap: int = 8
    """Most pictures from one keyframe to the next: what a reader may have to decode for one picture."""
    codec: str = "h264"
    """`h264` (small) or `mjpeg` (each picture for itself; cheaper to read here and there), both in MP4."""
    crf: int = 20
    """Quality of h264: 0 (best) to 51; 20 is about 40 dB."""
    qscale: int = 2
    """Quality of mjpeg: 2 (best) to 31."""
    timeout_s: float = 1800.0
    """A process that takes longer over one clip is ended and the sample left out; seconds."""
    max_pixels: int = 40_000_000
    """Larger pictures are not decoded."""

    def validate(self) -> None:
        if self.fps is None:
            for name, default in asdict(TranscodeConfig()).items():
                if getattr(self, name) != default:
                    raise ConfigError(f"transcode.{name} is set, but transcode.fps, which asks for it, is not")
            return
        for name, low, high in (
            ("fps", 0.01, 120),
            ("size", 16, 4096),
            ("keyframe_gap", 1, 1000),
            ("crf", 0, 51),
            ("qscale", 2, 31),
            ("timeout_s", 0.001, math.inf),
            ("max_pixels", 1, math.inf),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"transcode.{name}={getattr(self, name)} must lie in {low} … {high}")
        if self.size % 2:
            raise ConfigError(f"transcode.size={self.size} must be even: h264 halves the colours")
        if self.codec not in CODECS:
            raise ConfigError(f"transcode.codec={self.codec!r} is not one of {', '.join(CODECS)}")


@dataclass(frozen=True)
class ClipFigures:
    """What transcoding made of one clip."""

    pictures_before: int
    pictures: int
    bytes_before: int
    bytes_after: int
    psnr_db: float  #: over all pictures, of the new ones against the scaled old ones
    worst_psnr_db: float  #: of the worst picture
    cpu_before_s: float  #: to decode the pictures at k / fps from the old clip
    cpu_after_s: float  #: the same from the new clip
    rewritten: bool = True  #: False: the clip was as asked for already, and stayed

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def transcode_clip(data: bytes, key: str, config: TranscodeConfig) -> tuple[bytes, ClipFigures]:
    """The new clip and what became of it; a still, or a clip that is as asked for, comes back as it is.

    The same bytes give the same bytes. Raises SampleError when the clip cannot be decoded.
    """
    facts = probe_media(data, key, config.max_pixels)
    if facts.container == "image" or _is_as_asked(facts, config):
        count, size = facts.frame_count, len(data)
        return data, ClipFigures(count, count, size, size, BEST_PSNR_DB, BEST_PSNR_DB, 0.0, 0.0, rewritten=False)
    size = min(config.size, max(facts.width, facts.height))
    times_s = np.arange(max(1, math.ceil((facts.duration_s - 1e-6) * config.fps))) / config.fps
    old = _Clip(data, key, facts, times_s, size, config.max_pixels)
    new_data = _encode(old, config)
    new = _Clip(new_data, key, probe_media(new_data, key), times_s, size, config.max_pixels)
    errors: list[float] = []
    for before, after in zip(old.batches(), new.batches(), strict=True):
        if np.abs(before.times_s - after.times_s).max() > 1e-6:
            raise SampleError(key, "its time stamps cannot be kept: the new clip would show other pictures")
        for picture in np.flatnonzero(before.is_new):
            shown = before.pictures[picture]
            difference = shown.astype(np.int16) - after.pictures[picture, : shown.shape[0], : shown.shape[1]]
            errors.append(float(np.square(difference, dtype=np.int32).mean()))
    return new_data, ClipFigures(
        pictures_before=facts.frame_count,
        pictures=len(errors),
        bytes_before=len(data),
        bytes_after=len(new_data),
        psnr_db=psnr_db(float(np.mean(errors))),
        worst_psnr_db=psnr_db(max(errors)),
        cpu_before_s=old.cpu_s,
        cpu_after_s=new.cpu_s,
    )


def psnr_db(squared_error: float) -> float:
    """Decibels of a mean squared error of 8-bit levels."""
    return min(BEST_PSNR_DB, 10 * math.log10(255**2 / squared_error)) if squared_error > 0 else BEST_PSNR_DB


def _is_as_asked(facts: MediaProbe, config: TranscodeConfig) -> bool:
    """Whether transcoding would only cost quality."""
    return (
        (facts.container, facts.codec, facts.rotation) == ("mp4", config.codec, 0)
        and facts.pts_ok
        and facts.gops_closed
        and facts.max_keyframe_gap <= config.keyframe_gap
        and max(facts.width, facts.height) <= config.size
        and facts.frame_count <= math.ceil(facts.duration_s * config.fps)
    )


@dataclass(frozen=True)
class _Batch:
    """Pictures at some of the times k / fps, in order."""

    pictures: np.ndarray  #: uint8 RGB [F, H, W, 3], upright, as large as they are shown in training
    times_s: np.ndarray  #: float64 [F], their time stamps
    is_new: np.ndarray  #: bool [F], False where the picture of the time before is still on screen


class _Clip:
    """The pictures of a clip at given times, decoded some at a time, as a training's decoder gives them."""

    def __init__(self, data: bytes, key: str, facts: MediaProbe, times_s: np.ndarray, size: int, max_pixels: int):
        self.data = data
        self.key = key
        self.facts = facts
        self.size = size  #: longer side of the pictures
        self.cpu_s = 0.0  #: spent on decoding each picture once
        self.count = len(times_s)
        self._limits = DecodeLimits(max_pixels=max_pixels)
        step = min(max(1, BATCH_BYTES // (3 * size * size)), self._limits.max_frames)
        self._times = [times_s[first : first + step] for first in range(0, len(times_s), step)]
        self._only: _Batch | None = None  # of a clip of one batch, which need not be decoded twice
        self._counted = 0

    def batches(self) -> Iterator[_Batch]:
        if self._only is not None:
            yield self._only
            return
        last_s = -1.0
        for number, times_s in enumerate(self._times):
            batch = self._decode(times_s, number, last_s)
            last_s = batch.times_s[-1]
            if len(self._times) == 1:
                self._only = batch
            yield batch

    def _decode(self, times_s: np.ndarray, number: int, last_s: float) -> _Batch:
        begun = time.process_time()
        decoded = decode_arrays(self.data, times_s.tolist(), self.size, "auto", self.key, self.facts, self._limits)
        if number == self._counted:
            self.cpu_s += time.process_time() - begun
            self._counted += 1
        width, height = fitted_size(self.facts.width, self.facts.height, self.size)
        if decoded.frames[:, :, height:].any() or decoded.frames[:, :, :, width:].any():
            raise SampleError(self.key, "the video changes its picture size")
        pictures = decoded.frames[:, :, :height, :width].transpose(0, 2, 3, 1)
        return _Batch(pictures, decoded.times_s, np.diff(decoded.times_s, prepend=last_s) > 0)


def _encode(clip: _Clip, config: TranscodeConfig) -> bytes:
    """An MP4 of the pictures of `clip`, each once."""
    import av
    from av.video.reformatter import VideoReformatter

    width, height = fitted_size(clip.facts.width, clip.facts.height, clip.size)
    layout = "420"
    if config.codec == "h264" and (width % 2 or height % 2):
        # H.264 with halved colours has even sides. In a picture of the model's size a black row or column changes
        # nothing, since the tile is black there; a smaller one will be scaled and must keep its proportions.
        if clip.size == config.size:
            width, height = width + width % 2, height + height % 2
        else:
            layout = "444"
    source_tick = _tick(clip)
    tick = Fraction(1, _ticks_per_s(source_tick))
    reformatter, stamp, held, number_shown = VideoReformatter(), -1, None, 0
    out = io.BytesIO()
    options = {"video_track_timescale": str(tick.denominator), "fflags": "+bitexact"}
    with av.open(out, "w", format="mp4", options=options) as muxer:
        stream = _add_stream(muxer, config, width, height, layout)
        context = stream.codec_context
        context.time_base = tick
        for batch in clip.batches():
            for number in np.flatnonzero(batch.is_new):
                frame = av.VideoFrame.from_ndarray(_extended(batch.pictures[number], width, height), format="rgb24")
                frame = reformatter.reformat(
                    frame,
                    format=context.pix_fmt,
                    dst_colorspace=context.colorspace,
                    dst_color_range=context.color_range,
                    threads=1,
                )
                now = _stamp(float(batch.times_s[number]), source_tick, tick)
                if not 0 < now - stamp <= MOST_TICKS:
                    raise SampleError(clip.key, f"an MP4 cannot hold its time stamps (after {stamp * tick} s)")
                frame.pts, frame.time_base, stamp = now, tick, now
                number_shown += 1
                held = _mux_but_last(muxer, held, stream.encode(frame))
        held = _mux_but_last(muxer, held, stream.encode())
        # Nothing follows that would say how long the last picture is shown. Samples name moments by number and rate,
        # so the rate should come out as it was asked for, though the clip ends in the middle of a picture.
        end = round(Fraction(clip.facts.duration_s) / tick)
        regular = round(clip.count / Fraction(config.fps) / tick) if number_shown == clip.count else end
        held.duration = max(regular - stamp, 1)
        muxer.mux(held)
    return _with_duration(out.getvalue(), end) if stamp < end < regular else out.getvalue()


def _with_duration(data: bytes, ticks: int) -> bytes:
    """The MP4 with another length in the header of its medium, which wins over the sum of its pictures' durations."""
    place = data.rindex(b"mdhd") + 4
    wide = data[place] == 1  # version 1 has 64-bit times: version and flags, two dates, units a second, length
    start, size = (place + 24, 8) if wide else (place + 16, 4)
    return data[:start] + ticks.to_bytes(size, "big") + data[start + size :]


def _add_stream(muxer, config: TranscodeConfig, width: int, height: int, layout: str):
    import av

    encoder = {"h264": "libx264", "mjpeg": "mjpeg"}[config.codec]
    # One thread and no B-pictures: the same bytes every time, and pictures are stored in the order they are shown in.
    options = {"threads": "1", "bf": "0", "flags": "+bitexact"}
    if config.codec == "h264":
        options |= {"flags": "+bitexact+cgop", "g": str(config.keyframe_gap)}
        options |= {"preset": "veryfast", "tune": "fastdecode", "crf": str(config.crf)}
        options |= {"sc_threshold": "0", "keyint_min": str(config.keyframe_gap)}
    else:
        options |= {"qmin": str(config.qscale), "qmax": str(config.qscale)}
    try:
        stream = muxer.add_stream(encoder, rate=Fraction(config.fps).limit_denominator(1000), options=options)
    except av.codec.codec.UnknownCodecError as error:
        raise ConfigError(f"this build of PyAV has no {encoder}: use another transcode.codec") from error
    stream.width, stream.height = width, height
    stream.pix_fmt = f"yuv{layout}p" if config.codec == "h264" else f"yuvj{layout}p"
    stream.codec_context.colorspace = _BT601
    stream.codec_context.color_range = _LIMITED if config.codec == "h264" else _FULL
    return stream


#: FFmpeg's numbers of the colour space and of the ranges of levels
_BT601, _LIMITED, _FULL = 5, 1, 2


def _mux_but_last(muxer, held, packets: list):
    """Write the packets before the last, which is returned and written when it is known what follows it."""
    for packet in packets:
        if held is not None:
            muxer.mux(held)
        held = packet
    return held


def _extended(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3] with black on the right and below."""
    full = np.zeros((height, width, 3), np.uint8)
    full[: picture.shape[0], : picture.shape[1]] = picture
    return full


def _tick(clip: _Clip) -> Fraction:
    """Seconds of one unit of the clip's time stamps."""
    with open_video(clip.data, clip.facts.container, clip.key) as (_, stream):
        return Fraction(stream.time_base)


def _ticks_per_s(source_tick: Fraction) -> int:
    """A clock that holds every stamp of the source's; to the microsecond where that is finer than an MP4's can be."""
    ticks = source_tick.denominator
    if ticks > MOST_TICKS_PER_S:
        return LEAST_TICKS_PER_S
    while ticks < LEAST_TICKS_PER_S:
        ticks *= 2
    return ticks


def _stamp(time_s: float, source_tick: Fraction, tick: Fraction) -> int:
    """A time stamp in units of `tick`; exact where it is a whole number of the source's units."""
    exact = round(time_s / source_tick) * source_tick
    return round((exact if abs(float(exact) - time_s) < 1e-7 else Fraction(time_s)) / tick)
