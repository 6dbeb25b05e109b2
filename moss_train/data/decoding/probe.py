"""What a media file says about itself: container, picture size, rate, length. Read from headers and packets."""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from moss_train.data.decoding.bitstream import Bitstream, is_known
from moss_train.errors import ConfigError, SampleError

#: FFmpeg demuxer of each container we accept. The demuxer is pinned, so that no file is read as a playlist.
DEMUXERS = {"mp4": "mov", "avi": "avi", "matroska": "matroska", "mpegts": "mpegts", "flv": "flv", "ogg": "ogg"}


#: a claimed frame rate beyond this is taken from the packets instead
MAX_FRAME_RATE = 1000.0
#: of one file, against headers that claim millions of them
MAX_EMPTY_PACKETS = 100_000


@dataclass(frozen=True)
class MediaProbe:
    """Facts of one medium. Width and height are those of the picture as shown, after rotation."""

    container: str  #: "image" or a key of `DEMUXERS`
    codec: str
    width: int
    height: int
    duration_s: float  #: 0.0 for stills
    frame_rate: float | None  #: average frames per second; None for stills
    frame_count: int  #: 1 for stills
    rotation: int  #: degrees the decoded picture must be turned counter-clockwise to stand upright: 0, 90, 180, 270
    pts_ok: bool  #: every packet has a time stamp and none is doubled
    gops_closed: bool  #: every keyframe is shown in the place in which it is stored, so frames can be counted from it
    max_keyframe_gap: int  #: most pictures from one keyframe to the next, or to the end; 1 for stills
    by_packets: bool  #: the packets' time stamps are the pictures', and we can look into them (`bitstream`)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sniff_container(data: bytes, key: str = "") -> str:
    """The container by its magic bytes: "image" or a key of `DEMUXERS`.

    Looking first keeps text and HTML away from decord, which copies such input to standard error.
    Raises SampleError when the bytes are none of the media that we decode.
    """
    head = bytes(data[:16])
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"moof", b"styp", b"sidx"):
        return "mp4"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if head[:3] == b"\xff\xd8\xff" or head[:8] == b"\x89PNG\r\n\x1a\n" or (head[:4], head[8:12]) == (b"RIFF", b"WEBP"):
        return "image"
    if head[:1] == b"G" and data[188:189] == b"G":
        return "mpegts"
    if head[:4] == b"FLV\x01":
        return "flv"
    if head[:4] == b"OggS":
        return "ogg"
    what = f"starts with {head[:8]!r}" if head else "is empty"
    raise SampleError(key, f"medium {what}: not a video or picture container that can be decoded")


@contextmanager
def open_video(data: bytes, container: str, key: str = ""):
    """Open `data` with PyAV, one decoding thread; yields (container, video stream).

    Raises SampleError without a video stream, ConfigError when PyAV is not installed; PyAV's own errors pass.
    """
    try:
        import av
    except ImportError as error:
        raise ConfigError("decoding video needs PyAV: install moss_train[video]") from error
    with av.open(io.BytesIO(data), mode="r", format=DEMUXERS[container]) as opened:
        if not opened.streams.video:
            raise SampleError(key, "medium has no video stream")
        stream = opened.streams.video[0]
        # One thread per process: parallelism comes from the number of workers.
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        yield opened, stream


def packets_of(opened, stream, size: int, key: str) -> Iterator:
    """The packets of a stream that hold anything, as they are stored; `size` bytes is the whole file.

    Raises SampleError when they hold more than twice the file: its tables are false, and following them has no end.
    """
    left, empty = 2 * size, 0
    for packet in opened.demux(stream):
        if not packet.size:
            empty += 1
            if empty > MAX_EMPTY_PACKETS:
                raise SampleError(key, f"the file lists over {MAX_EMPTY_PACKETS} empty packets")
            continue
        left -= packet.size
        if left < 0:
            raise SampleError(key, "the packets that the file lists are larger than the file")
        yield packet


def quarter_turns(rotation: float) -> int:
    """Counter-clockwise quarter turns (numpy's rot90 k) of a display rotation in degrees."""
    return round(rotation / 90) % 4


def check_pixels(width: int, height: int, max_pixels: int, key: str) -> None:
    """Raise SampleError for an empty picture or one larger than `max_pixels`."""
    if width < 1 or height < 1:
        raise SampleError(key, f"picture of {width}×{height} pixels")
    if width * height > max_pixels:
        raise SampleError(key, f"picture of {width}×{height} pixels is over the limit of {max_pixels} pixels")


def probe_media(data: bytes, key: str = "", max_pixels: int = 40_000_000) -> MediaProbe:
    """Facts of a still or video. One picture is decoded, the other packets are only listed.

    Raises SampleError when the medium cannot be read.
    """
    container = sniff_container(data, key)
    try:
        return (
            _probe_still(data, key, max_pixels)
            if container == "image"
            else _probe_video(data, container, key, max_pixels)
        )
    except (SampleError, ConfigError):
        raise
    except Exception as error:  # PyAV and Pillow have no common base of "this file is broken"
        raise SampleError(key, f"medium cannot be read: {type(error).__name__}: {error}") from error


def _probe_still(data: bytes, key: str, max_pixels: int) -> MediaProbe:
    with Image.open(io.BytesIO(data)) as picture:
        width, height = picture.size
        check_pixels(width, height, max_pixels, key)
        picture.load()
        # EXIF orientations 5 to 8 lie on their side.
        if picture.getexif().get(0x0112, 1) >= 5:
            width, height = height, width
        codec = (picture.format or "").lower()
    return MediaProbe("image", codec, width, height, 0.0, None, 1, 0, True, True, 1, False)


def _probe_video(data: bytes, container: str, key: str, max_pixels: int) -> MediaProbe:
    with open_video(data, container, key) as (opened, stream):
        context = stream.codec_context
        width, height = context.width, context.height
        check_pixels(width, height, max_pixels, key)
        bitstream = Bitstream(context.name, context.extradata) if is_known(context.name) else None
        packets: list[tuple[int | None, bool]] = []
        first = None  #: the first picture that comes out
        for packet in packets_of(opened, stream, len(data), key):
            shown = bitstream is None or bitstream.look(memoryview(packet), packet.is_keyframe).shown
            if shown and not packet.is_discard:
                packets.append((packet.pts, packet.is_keyframe))
            if first is None:
                first = next(iter(context.decode(packet)), None)
        if first is None:
            first = next(iter(context.decode(None)), None)
        if first is None:
            raise SampleError(key, "video holds no picture")
        stamps = sorted(pts for pts, _ in packets if pts is not None)
        pts_ok = len(stamps) == len(packets) and all(b > a for a, b in zip(stamps, stamps[1:], strict=False))
        span = float((stamps[-1] - stamps[0]) * stream.time_base) if stamps else 0.0
        rate = _frame_rate(stream, len(stamps), span)
        turns = quarter_turns(first.rotation)
        width, height = (first.height, first.width) if turns % 2 else (first.width, first.height)
        return MediaProbe(
            container=container,
            codec=context.name,
            width=width,
            height=height,
            duration_s=_duration(opened, stream, span + 1 / rate),
            frame_rate=rate,
            frame_count=len(packets),
            rotation=turns * 90,
            pts_ok=pts_ok,
            gops_closed=_gops_closed(packets, stamps),
            max_keyframe_gap=_max_keyframe_gap([is_keyframe for _, is_keyframe in packets]),
            by_packets=(
                pts_ok
                and container != "avi"  # it numbers packets as they are stored, not as they are shown
                and bitstream is not None
                and bitstream.plain
                and first.pts == stamps[0]
            ),
        )


def _frame_rate(stream, frames: int, span: float) -> float:
    """Average frames per second: the file's own word for it unless it cannot be."""
    for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate):
        if rate and 0 < rate <= MAX_FRAME_RATE:
            return float(rate)
    return (frames - 1) / span if span > 0 and frames > 1 else 1.0


def _duration(opened, stream, counted: float) -> float:
    """Seconds: the file's own word for it, unless that is far from what its packets' time stamps say."""
    if stream.duration and stream.duration > 0:
        claimed = float(stream.duration * stream.time_base)
    elif opened.duration and opened.duration > 0:
        claimed = opened.duration / 1_000_000
    else:
        return counted
    return claimed if math.isfinite(claimed) and counted / 2 - 1 <= claimed <= 2 * counted + 1 else counted


def _max_keyframe_gap(keyframes: list[bool]) -> int:
    starts = [place for place, is_keyframe in enumerate(keyframes) if is_keyframe] or [0]
    return max(b - a for a, b in zip(starts, [*starts[1:], len(keyframes)], strict=True))


def _gops_closed(packets: list[tuple[int | None, bool]], stamps: list[int]) -> bool:
    """Whether as many pictures are shown before each keyframe as are stored before it."""
    shown_before = {stamp: place for place, stamp in enumerate(stamps)}
    return all(shown_before.get(pts) == place for place, (pts, is_keyframe) in enumerate(packets) if is_keyframe)
