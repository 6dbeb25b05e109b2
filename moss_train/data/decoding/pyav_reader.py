"""Pictures by PyAV, decoding as little as is exact.

By packets: all packets are listed first, so the time of every picture is known before any is decoded. Then only the
stretches that hold asked pictures are decoded, each from the last entry at or before them to the last asked picture,
without the pictures that are not asked for and that no other picture needs (`bitstream`). A picture is known by its
packet's time stamp.

In sequence: where packets do not tell the pictures (AVI, missing time stamps, codecs that we do not look into), or
where what came out is not what the packets promised, everything is decoded from the start to the last asked picture.

Both convert and scale a picture with FFmpeg's swscale straight to its size in the tile, and only when it is asked for.
A picture that FFmpeg says is damaged, or that was decoded after one since the last keyframe, is refused.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moss_train.data.decoding.bitstream import Bitstream, Look
from moss_train.data.decoding.pictures import (
    DecodedArrays,
    DecodeLimits,
    fitted_size,
    frame_indices,
    in_order,
    new_tiles,
    slack,
    tiled,
)
from moss_train.data.decoding.probe import MediaProbe, check_pixels, open_video, packets_of, quarter_turns
from moss_train.errors import SampleError


class _Doubt(Exception):
    """The packets do not keep what they promise; only decoding in sequence tells."""


def read_pyav(
    data: bytes, times_s: Sequence[float], size: int | None, key: str, facts: MediaProbe, limits: DecodeLimits
) -> DecodedArrays:
    """The pictures on screen at `times_s`; raises SampleError and PyAV's own errors."""
    import av

    if facts.by_packets:
        try:
            return _by_packets(data, times_s, size, key, facts, limits)
        except (_Doubt, av.FFmpegError):
            pass  # what this file is worth, the whole of it tells
    return _in_sequence(data, facts.container, times_s, size, key, limits)


class _Canvas:
    """The pictures of one request, converted when they come."""

    def __init__(self, count: int, asked: int, size: int | None, key: str, limits: DecodeLimits):
        """`count` pictures are drawn at most, for `asked` places of the result."""
        from av.video.reformatter import VideoReformatter

        self._size = size
        self._key = key
        self._limits = limits
        self._asked = asked
        # One for all pictures: it keeps its tables, which are dear.
        self._reformatter = VideoReformatter()
        # Not zeroed as a whole: on fresh memory that costs as much as converting the pictures.
        self._tiles = new_tiles(count, size) if size is not None else None
        self._native: dict[int, np.ndarray] = {}

    def draw(self, place: int, frame) -> None:
        """Put a decoded picture in its place, scaled and upright."""
        check_pixels(frame.width, frame.height, self._limits.max_pixels, self._key)
        turns = quarter_turns(frame.rotation)
        width, height = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
        if self._size is not None:
            width, height = fitted_size(width, height, self._size)
        else:
            self._limits.check_native(self._asked, width, height, self._key)
        stored = (height, width) if turns % 2 else (width, height)
        picture = self._reformatter.reformat(
            frame, *stored, format="rgb24", interpolation="BILINEAR", threads=1
        ).to_ndarray()
        if turns:
            picture = np.rot90(picture, turns)
        if self._tiles is not None:
            tile = self._tiles[place]
            tile[:, :height, :width] = picture.transpose(2, 0, 1)
            tile[:, height:] = 0
            tile[:, :height, width:] = 0
        else:
            self._native[place] = picture

    def frames(self, back: np.ndarray) -> np.ndarray:
        """uint8 [F, 3, S, S] or [F, 3, H, W]; request f shows what was drawn at place back[f]."""
        if self._tiles is not None:
            return in_order(self._tiles, back)
        # A stream may change its size midway; the asked pictures then have no common shape at native size.
        if len({picture.shape for picture in self._native.values()}) > 1:
            raise SampleError(self._key, "the video changes its picture size")
        return tiled(np.stack([self._native[place] for place in sorted(self._native)]), None)[back]


@dataclass(slots=True)
class _Stored:
    """One packet as it is stored."""

    packet: object  #: av.Packet
    look: Look
    stamp: int | None  #: of the picture that it shows; None: it shows none


@dataclass
class _Stretch:
    """Packets first … end-1, decoded in one go."""

    first: int
    end: int
    stamp: int | None  #: of the entry, what is shown before it is left out; None: the stretch begins with the file


def _by_packets(
    data: bytes, times_s: Sequence[float], size: int | None, key: str, facts: MediaProbe, limits: DecodeLimits
) -> DecodedArrays:
    with open_video(data, facts.container, key) as (opened, stream):
        check_pixels(stream.codec_context.width, stream.codec_context.height, limits.max_pixels, key)
        last_s = max(times_s)
        stored, steady = _list_packets(opened, stream, facts, len(data), last_s + slack(last_s), key)
        stamps = sorted(entry.stamp for entry in stored if entry.stamp is not None)
        if not stamps:
            raise _Doubt
        seconds = (np.array(stamps, np.int64) - stamps[0]) * float(stream.time_base)
        wanted, back = np.unique(frame_indices(seconds, times_s), return_inverse=True)
        places = {stamps[number]: place for place, number in enumerate(wanted.tolist())}
        canvas = _Canvas(len(wanted), len(times_s), size, key, limits)
        left = len(places)
        for frame in _decode(stream.codec_context, stored, _stretches(stored, places, steady), places):
            if frame.is_corrupt:
                raise _Doubt
            place = places.get(frame.pts)
            if place is not None:
                canvas.draw(place, frame)
                places[frame.pts] = None
                left -= 1
                if not left:
                    break
        if left:
            raise _Doubt
    return DecodedArrays(canvas.frames(back), "pyav", seconds[wanted][back])


def _list_packets(opened, stream, facts: MediaProbe, size: int, until_s: float, key: str) -> tuple[list[_Stored], bool]:
    """The packets up to the last that can matter to pictures until `until_s`, and whether entries may be used."""
    bitstream = Bitstream(facts.codec, stream.codec_context.extradata)
    tick = float(stream.time_base)
    stored: list[_Stored] = []
    start = math.inf
    for packet in packets_of(opened, stream, size, key):
        look = bitstream.look(memoryview(packet), packet.is_keyframe)
        shown = look.shown and not packet.is_discard
        if shown and packet.pts is None:
            raise _Doubt
        stamp = packet.pts if shown else None
        # Where GOPs are closed, whatever follows a keyframe is shown after it.
        if facts.gops_closed and packet.is_keyframe and stamp is not None and (stamp - start) * tick > until_s:
            break
        stored.append(_Stored(packet, look, stamp))
        if stamp is not None and stamp < start:
            start = stamp
    if not bitstream.plain:
        raise _Doubt
    return stored, bitstream.steady


def _stretches(stored: list[_Stored], wanted: dict[int, int], steady: bool) -> list[_Stretch]:
    """What has to be decoded to see the wanted stamps."""
    entries = [0] + [
        n for n, entry in enumerate(stored) if n and steady and entry.look.entry and entry.stamp is not None
    ]
    stretches: list[_Stretch] = []
    for number, (first, end) in enumerate(zip(entries, [*entries[1:], len(stored)], strict=True)):
        asked = [n for n in range(first, end) if stored[n].stamp in wanted]
        if not asked:
            continue
        stamp = stored[first].stamp if first else None
        if stamp is not None and any(stored[n].stamp < stamp for n in asked):
            # Pictures stored after an entry but shown before it may refer to what lies before it.
            first = entries[number - 1]
            stamp = stored[first].stamp if first else None
        if stretches and first <= stretches[-1].end:
            stretches[-1].end = asked[-1] + 1
        else:
            stretches.append(_Stretch(first, asked[-1] + 1, stamp))
    return stretches


def _decode(context, stored: list[_Stored], stretches: list[_Stretch], wanted: dict[int, int]) -> Iterator:
    """The pictures of the stretches, as they come out; raises _Doubt where an entry is none."""
    for number, stretch in enumerate(stretches):
        if number:
            context.flush_buffers()
        first = True
        for frame in _pictures(context, stored, stretch, wanted):
            if first and stretch.stamp is not None and not (frame.key_frame and frame.pts == stretch.stamp):
                raise _Doubt
            first = False
            yield frame


def _pictures(context, stored: list[_Stored], stretch: _Stretch, wanted: dict[int, int]) -> Iterator:
    for entry in stored[stretch.first : stretch.end]:
        if entry.look.spare and entry.stamp not in wanted:
            continue
        # What is stored after an entry but shown before it is of use to its like alone.
        if stretch.stamp is not None and entry.stamp is not None and entry.stamp < stretch.stamp:
            continue
        yield from context.decode(entry.packet)
    yield from context.decode(None)


def _in_sequence(
    data: bytes, container: str, times_s: Sequence[float], size: int | None, key: str, limits: DecodeLimits
) -> DecodedArrays:
    """One pass from the start; a picture is converted only when it is known to be on screen at an asked time."""
    order = sorted(range(len(times_s)), key=lambda f: times_s[f])
    back, shown = np.zeros(len(times_s), np.int64), []
    with open_video(data, container, key) as (opened, stream):
        check_pixels(stream.codec_context.width, stream.codec_context.height, limits.max_pixels, key)
        clock = _Clock(stream, stored_times_only=container == "avi")
        canvas = _Canvas(len(times_s), len(times_s), size, key, limits)
        held, damaged, served = None, False, 0
        for frame in clock.listen(packets_of(opened, stream, len(data), key)):
            check_pixels(frame.width, frame.height, limits.max_pixels, key)
            time = clock.time_of(frame)
            if held is not None:
                served = _serve(held, time, order, served, times_s, canvas, back, shown, key)
                if served == len(order):
                    break
            damaged = frame.is_corrupt or (damaged and not frame.key_frame)
            held = (frame, time, damaged)
        if held is None:
            raise SampleError(key, "video holds no picture")
        _serve(held, math.inf, order, served, times_s, canvas, back, shown, key)
    return DecodedArrays(canvas.frames(back), "pyav", np.array(shown)[back])


def each_picture(data: bytes, facts: MediaProbe, key: str = "", limits: DecodeLimits | None = None) -> Iterator:
    """(seconds from the first picture, uint8 RGB [H, W, 3]) of every picture of a video in order, upright, at its own
    size; one at a time is held. Raises SampleError when the video does not decode, or not any further."""
    import av
    from av.video.reformatter import VideoReformatter

    limits, reformatter, empty = limits or DecodeLimits(), VideoReformatter(), True
    try:
        with open_video(data, facts.container, key) as (opened, stream):
            clock = _Clock(stream, stored_times_only=facts.container == "avi")
            for frame in clock.listen(packets_of(opened, stream, len(data), key)):
                check_pixels(frame.width, frame.height, limits.max_pixels, key)
                picture = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
                yield clock.time_of(frame), np.rot90(picture, quarter_turns(frame.rotation))
                empty = False
    except av.FFmpegError as error:
        raise SampleError(key, f"video does not decode: {error}") from error
    if empty:
        raise SampleError(key, "video holds no picture")


class _Clock:
    """Times of decoded pictures from the first one's; counts at the average rate where stamps are missing."""

    def __init__(self, stream, stored_times_only: bool):
        """`stored_times_only`: the container (AVI) numbers packets as they are stored, not as they are shown."""
        self._context = stream.codec_context
        self._time_base = stream.time_base
        rate = stream.average_rate or stream.guessed_rate
        self._interval = float(1 / rate) if rate else 1.0
        self._start: float | None = None
        self._last = 0.0
        self._stored: list[int] | None = [] if stored_times_only else None

    def listen(self, packets):
        """The pictures of the packets, in the order in which they are shown."""
        for packet in packets:
            if self._stored is not None and packet.pts is not None:
                heapq.heappush(self._stored, packet.pts)
            yield from self._context.decode(packet)
        yield from self._context.decode(None)

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


def _serve(held, until: float, order, served: int, times_s, canvas: _Canvas, back, shown: list[float], key: str) -> int:
    """Give the held (frame, time, damaged) to every asked time before `until`; returns how many are served by now."""
    frame, time, damaged = held
    drawn = False
    while served < len(order) and times_s[order[served]] + slack(times_s[order[served]]) < until:
        if not drawn:
            if damaged:
                raise SampleError(key, f"the picture at {time:g} s is damaged")
            canvas.draw(len(shown), frame)
            shown.append(time)
            drawn = True
        back[order[served]] = len(shown) - 1
        served += 1
    return served
