"""Pictures at asked times: decord where it is right, PyAV where decord is known to be wrong, Pillow for stills.

decord is the faster reader, but it returns wrong frames without a word

* when time stamps are missing (H.264 in AVI) or the file is cut by an edit list: its stamps show it;
* when it skips to a keyframe that is not shown in the place in which it is stored (open GOPs, the default of x265;
  MPEG-4 and intra-refresh H.264 with B-frames), since it counts frames from keyframes: the packets show it, the
  stamps do not.

Both are checked before a picture of it is believed. Both readers scale bilinearly while they convert; at native size
they are bit-identical, scaled they differ in single levels.
Pixel aspect ratios are ignored (by every reader measured), display rotation is applied.
"""

import heapq
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from moss_train.data.decoding.probe import (
    MediaProbe,
    check_pixels,
    open_video,
    probe_media,
    quarter_turns,
    sniff_container,
)
from moss_train.errors import ConfigError, SampleError

if TYPE_CHECKING:
    import torch

#: decord needs 30 s of retries on transport streams before it gives up, so it never sees other containers.
DECORD_CONTAINERS = ("mp4", "avi", "matroska")


@dataclass(frozen=True)
class DecodeLimits:
    """Bounds on one request, against hostile or broken input."""

    max_pixels: int = 40_000_000  #: of one picture
    max_frames: int = 4096  #: of one request


@dataclass(frozen=True)
class DecodedArrays:
    """F pictures as numpy, in the order of the requests."""

    frames: np.ndarray  #: uint8 RGB [F, 3, S, S], or [F, 3, H, W] at native size
    backend: str  #: "decord", "pyav" or "pillow"
    times_s: np.ndarray  #: float64 [F], time stamps of the pictures, from the first picture's
    note: str = ""  #: why decord was passed over, if it was


@dataclass(frozen=True)
class DecodedFrames:
    """F pictures as a tensor, in the order of the requests."""

    frames: "torch.Tensor"  #: uint8 RGB [F, 3, S, S], or [F, 3, H, W] at native size
    backend: str  #: "decord", "pyav" or "pillow"
    times: np.ndarray  #: float64 [F], time stamps of the pictures, from the first picture's
    note: str = ""  #: why decord was passed over, if it was


class _Suspicious(Exception):
    """decord opened the file, but what it says of it shows that its pictures cannot be trusted."""


def decode_frames(
    data: bytes,
    times_s: Sequence[float],
    size: int | None,
    decoder: str = "auto",
    key: str = "",
    facts: MediaProbe | None = None,
    limits: DecodeLimits | None = None,
) -> DecodedFrames:
    """The pictures on screen at `times_s` (seconds, any order, repeats allowed) of a video or still.

    The picture at time t is the last one whose time stamp, counted from the first picture's, is ≤ t + 1e-6
    (a hair more late in long clips, since decord's time stamps are float32); the first one before that, the last one
    after the end. `size` S: the longer side becomes S and zeros fill the tile on the right or below; None keeps the
    native size. `decoder`: "auto", "decord" or "pyav". `facts` (from the index) saves looking at the file first.
    Raises SampleError when the medium cannot be decoded, ConfigError when the named decoder is not installed.
    """
    import torch  # here, so that the decoder processes, which use decode_arrays, start without it

    arrays = decode_arrays(data, times_s, size, decoder, key, facts, limits)
    return DecodedFrames(torch.from_numpy(arrays.frames), arrays.backend, arrays.times_s, arrays.note)


def decode_arrays(
    data: bytes,
    times_s: Sequence[float],
    size: int | None,
    decoder: str = "auto",
    key: str = "",
    facts: MediaProbe | None = None,
    limits: DecodeLimits | None = None,
) -> DecodedArrays:
    """`decode_frames` in numpy."""
    limits = limits or DecodeLimits()
    if len(times_s) > limits.max_frames:
        raise SampleError(key, f"{len(times_s)} frames asked of one medium, the limit is {limits.max_frames}")
    if len(times_s) == 0:
        side = size or 1
        return DecodedArrays(np.zeros((0, 3, side, side), np.uint8), "none", np.zeros(0))
    if not all(math.isfinite(t) for t in times_s):
        raise SampleError(key, "a frame is asked at a time that is not finite")
    container = sniff_container(data, key)
    if container == "image":
        return _decode_still(data, len(times_s), size, key, limits)
    note = ""
    if decoder != "pyav":
        facts = facts or probe_media(data, key, limits.max_pixels)
        note = _why_not_decord(facts, decoder)
        if not note:
            try:
                return _decode_decord(data, times_s, size, key, facts, limits)
            except (SampleError, ConfigError):
                raise
            except _Suspicious as doubt:
                note = f"decord: {doubt}"
            except Exception as error:  # decord raises RuntimeError, DECORDError and AssertionError alike
                note = f"decord: {type(error).__name__}: {_first_line(error)}"
    try:
        return _decode_pyav(data, container, times_s, size, key, limits, note)
    except (SampleError, ConfigError):
        raise
    except Exception as error:  # PyAV raises FFmpegError, IndexError, ValueError and EOFError alike
        reason = f"video does not decode: {type(error).__name__}: {_first_line(error)}"
        raise SampleError(key, f"{reason} ({note})" if note else reason) from error


def fitted_size(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) that fit a S×S tile with the aspect kept: the longer side becomes S, the other is floored.

    The arithmetic is that of Hugging Face's Mllama image processor (`get_image_size_fit_to_canvas`, one tile).
    """
    scale_w, scale_h = size / width, size / height
    if scale_w < scale_h:
        return size, min(math.floor(height * scale_w) or 1, size)
    return min(math.floor(width * scale_h) or 1, size), size


def frame_indices(stamps_s: np.ndarray, times_s: Sequence[float]) -> np.ndarray:
    """int64 [F]: for each asked time the last stamp at or before it (see `decode_frames`); stamps start at 0."""
    asked = np.asarray(times_s, np.float64)
    return np.maximum(np.searchsorted(stamps_s, asked + _slack(asked), side="right") - 1, 0)


def _slack(times_s: np.ndarray | float) -> np.ndarray | float:
    """Seconds by which a stamp may be late: 1 µs plus the rounding of a float32 stamp."""
    return 1e-6 + 1.2e-7 * np.abs(times_s)


def _first_line(error: BaseException) -> str:
    """The message of an error without decord's stack traces."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def _why_not_decord(facts: MediaProbe, decoder: str) -> str:
    """Empty when decord may be tried."""
    if facts.container not in DECORD_CONTAINERS:
        return f"decord: not used on {facts.container}"
    if not facts.pts_ok:
        return "decord: the packets lack proper time stamps"
    if not facts.gops_closed:
        return "decord: the file has open GOPs"
    try:
        import decord  # noqa: F401
    except ImportError as error:
        if decoder == "decord":
            raise ConfigError("data.decoder=decord, but decord is not installed: use data.decoder=pyav") from error
        return "decord: not installed"
    return ""


def _tile(pictures: np.ndarray, size: int | None) -> np.ndarray:
    """[F, h, w, 3] → [F, 3, S, S] with zeros right and below; [F, 3, h, w] when `size` is None."""
    pictures = pictures.transpose(0, 3, 1, 2)
    if size is None:
        return np.ascontiguousarray(pictures)
    tile = np.zeros((len(pictures), 3, size, size), np.uint8)
    tile[:, :, : pictures.shape[2], : pictures.shape[3]] = pictures
    return tile


def _decode_still(data: bytes, copies: int, size: int | None, key: str, limits: DecodeLimits) -> DecodedArrays:
    try:
        with Image.open(io.BytesIO(data)) as opened:
            check_pixels(*opened.size, limits.max_pixels, key)
            picture = _on_white(ImageOps.exif_transpose(opened))
        if size is not None:
            picture = picture.resize(fitted_size(*picture.size, size), Image.Resampling.BILINEAR)
    except SampleError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and struct.error on broken files
        raise SampleError(key, f"picture does not decode: {type(error).__name__}: {_first_line(error)}") from error
    frames = np.repeat(_tile(np.asarray(picture)[None], size), copies, axis=0)
    return DecodedArrays(frames, "pillow", np.zeros(copies))


def _on_white(picture: Image.Image) -> Image.Image:
    """RGB; transparent parts become white, as in Hugging Face's image processors."""
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _decode_decord(
    data: bytes, times_s: Sequence[float], size: int | None, key: str, facts: MediaProbe, limits: DecodeLimits
) -> DecodedArrays:
    import decord

    # Its FFmpeg reports every damaged macroblock on standard error; what matters reaches us as an exception.
    decord.logging.set_level(decord.logging.QUIET)
    check_pixels(facts.width, facts.height, limits.max_pixels, key)
    target = {}
    if size is not None:
        target["width"], target["height"] = fitted_size(facts.width, facts.height, size)
    reader = decord.VideoReader(io.BytesIO(data), num_threads=1, **target)
    try:
        stamps = np.asarray(reader.get_frame_timestamp(np.arange(len(reader)))[:, 0], np.float64)
        _check_stamps(stamps, facts.frame_count)
        stamps = stamps - stamps[0]
        wanted, back = np.unique(frame_indices(stamps, times_s), return_inverse=True)
        pictures = reader.get_batch(wanted.tolist()).asnumpy()
    finally:
        # A live reader keeps decoding in the background and fills memory.
        del reader
    return DecodedArrays(_tile(pictures, size)[back], "decord", stamps[wanted][back])


def _check_stamps(stamps_s: np.ndarray, frame_count: int) -> None:
    """Raise _Suspicious unless the time stamps are those of a file that decord reads rightly."""
    if len(stamps_s) != frame_count or frame_count == 0:
        raise _Suspicious(f"{len(stamps_s)} frames where the file holds {frame_count}")
    if not np.isfinite(stamps_s).all() or np.abs(stamps_s).max() >= 1e6:
        raise _Suspicious("time stamps are missing")
    if (np.diff(stamps_s) <= 0).any():
        raise _Suspicious("time stamps do not increase")
    if stamps_s[0] < -0.001:
        raise _Suspicious(f"time stamps start at {stamps_s[0]:.3f} s (an edit list)")


def _decode_pyav(
    data: bytes, container: str, times_s: Sequence[float], size: int | None, key: str, limits: DecodeLimits, note: str
) -> DecodedArrays:
    """One pass from the start; a picture is converted only when it is known to be on screen at an asked time."""
    order = sorted(range(len(times_s)), key=lambda i: times_s[i])
    pictures: list[np.ndarray | None] = [None] * len(times_s)
    shown = np.zeros(len(times_s))
    with open_video(data, container, key) as (opened, stream):
        check_pixels(stream.codec_context.width, stream.codec_context.height, limits.max_pixels, key)
        clock = _Clock(stream, stored_times_only=container == "avi")
        held = None  # the picture on screen so far, and its time
        served = 0
        for frame in clock.listen(opened.demux(stream)):
            check_pixels(frame.width, frame.height, limits.max_pixels, key)
            time = clock.time_of(frame)
            if held is not None:
                served = _serve(held, time, order, served, times_s, size, pictures, shown, key)
                if served == len(order):
                    break
            held = (frame, time)
        if held is None:
            raise SampleError(key, "video holds no picture")
        _serve(held, math.inf, order, served, times_s, size, pictures, shown, key)
    # A stream may change its size midway; the asked pictures then have no common shape at native size.
    if len({picture.shape for picture in pictures}) > 1:
        raise SampleError(key, "the video changes its picture size")
    return DecodedArrays(_tile(np.stack(pictures), size), "pyav", shown, note)


class _Clock:
    """Times of decoded pictures from the first one's; counts at the average rate where stamps are missing."""

    def __init__(self, stream, stored_times_only: bool):
        """`stored_times_only`: the container (AVI) numbers packets as they are stored, not as they are shown."""
        self._time_base = stream.time_base
        rate = stream.average_rate or stream.guessed_rate
        self._interval = float(1 / rate) if rate else 1.0
        self._start: float | None = None
        self._last = 0.0
        self._stored: list[int] | None = [] if stored_times_only else None

    def listen(self, packets):
        """The pictures of the packets, in the order in which they are shown."""
        for packet in packets:
            if self._stored is not None and packet.size and packet.pts is not None:
                heapq.heappush(self._stored, packet.pts)
            yield from packet.decode()

    def time_of(self, frame) -> float:
        pts = frame.pts
        if self._stored is not None:
            # Pictures come out in the order in which they are shown, so the earliest time not given yet is theirs.
            pts = heapq.heappop(self._stored) if self._stored else None
        stamp = float(pts * (frame.time_base or self._time_base)) if pts is not None else None
        if self._start is None:
            self._start = stamp if stamp is not None else 0.0
            return 0.0
        time = self._last + self._interval
        if stamp is not None and stamp - self._start > self._last:
            time = stamp - self._start
        self._last = time
        return time


def _serve(held, until: float, order, served: int, times_s, size, pictures, shown, key: str) -> int:
    """Give the held (frame, time) to every asked time before `until`; returns how many are served by now."""
    frame, time = held
    picture = None
    while served < len(order) and times_s[order[served]] + _slack(times_s[order[served]]) < until:
        if picture is None:
            picture = _picture(frame, size, key)
        pictures[order[served]] = picture
        shown[order[served]] = time
        served += 1
    return served


def _picture(frame, size: int | None, key: str) -> np.ndarray:
    """uint8 [h, w, 3], scaled and upright."""
    if frame.is_corrupt:
        raise SampleError(key, f"the picture at {frame.time} s is damaged")
    turns = quarter_turns(frame.rotation)
    if size is None:
        picture = frame.to_ndarray(format="rgb24")
    else:
        width, height = fitted_size(*((frame.height, frame.width) if turns % 2 else (frame.width, frame.height)), size)
        if turns % 2:
            width, height = height, width
        picture = frame.reformat(width=width, height=height, format="rgb24", interpolation="BILINEAR").to_ndarray()
    return np.rot90(picture, turns) if turns else picture
