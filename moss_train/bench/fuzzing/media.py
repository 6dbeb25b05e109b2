"""Small media of many codecs and containers, and what is done to their bytes: at random, and where headers lie."""

import gzip
import io
import os
import struct
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image

#: what a writer could have put in a field of four bytes to do harm
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0xFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
#: (member's extension, container, codec) of the clips that are mutated
CLIPS = (
    ("mp4", "mp4", "libx264"),
    ("mov", "mov", "libx264"),
    ("mp4", "mp4", "libx265"),
    ("mp4", "mp4", "libsvtav1"),
    ("mp4", "mp4", "mpeg4"),
    ("avi", "avi", "mpeg4"),
    ("avi", "avi", "libx264"),
    ("avi", "avi", "mjpeg"),
    ("mkv", "matroska", "libx264"),
    ("mkv", "matroska", "ffv1"),
    ("webm", "webm", "libvpx-vp9"),
    ("webm", "webm", "libvpx"),
    ("mp4", "mpegts", "mpeg2video"),
    ("mp4", "flv", "flv"),
)
STILLS = (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"))
WIDTH, HEIGHT, FRAMES, RATE = 64, 48, 10, 5
#: boxes of an MP4 whose fields say how much there is of something
_MP4_BOXES = (
    b"mvhd", b"tkhd", b"mdhd", b"stsd", b"stts", b"ctts", b"stss", b"stsc", b"stsz", b"stco", b"elst", b"hdlr", b"avcC",
    b"moov", b"trak", b"mdat", b"ftyp",
)  # fmt: skip
_AVI_CHUNKS = (b"avih", b"strh", b"strf", b"idx1", b"movi", b"hdrl", b"00dc", b"RIFF")
#: identifiers of Matroska: duration, time scale, picture width and height, track, cluster, segment, block, codec data
_MKV_IDS = (
    b"\x44\x89", b"\x2a\xd7\xb1", b"\xb0", b"\xba", b"\xae", b"\x1f\x43\xb6\x75", b"\x18\x53\x80\x67", b"\xa3",
    b"\x63\xa2", b"\x23\xe3\x83",
)  # fmt: skip


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """uint8 [height, width, 3]: a gradient that moves, with some noise."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:height, :width]
    base = np.stack([x * 3 + number * 7, y * 4 + number * 3, (x + y) * 2], axis=2) % 256
    return np.clip(base + rng.integers(-12, 12, base.shape), 0, 255).astype(np.uint8)


@cache
def clip(container: str, codec: str) -> bytes:
    """A clip of `FRAMES` pictures at `RATE` a second."""
    import av

    # Read by the encoder when it is loaded; it tells its whole configuration otherwise.
    os.environ.setdefault("SVT_LOG", "0")

    out = io.BytesIO()
    with av.open(out, "w", format=container) as muxer:
        stream = muxer.add_stream(codec, rate=RATE)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = 4
        stream.codec_context.thread_count = 1
        if codec == "libx265":
            stream.options = {"x265-params": "log-level=none:pools=none"}
        elif codec == "libsvtav1":
            stream.options = {"preset": "12", "svtav1-params": "lp=1"}
        elif codec == "libx264":
            stream.options = {"preset": "fast"}
        for number in range(FRAMES):
            muxer.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
        muxer.mux(stream.encode())
    return out.getvalue()


@cache
def still(form: str) -> bytes:
    """A picture in the named format of Pillow."""
    out = io.BytesIO()
    Image.fromarray(picture(1)).save(out, form)
    return out.getvalue()


def mutate(data: bytes, rng: np.random.Generator, headers: Callable | None = None) -> tuple[bytes, str]:
    """The bytes after one to three mutations, and their names. `headers` mutates fields of the container."""
    names = []
    for _ in range(int(rng.integers(1, 4))):
        choices = list(_BYTES.items()) + ([("headers", headers)] * 4 if headers else [])
        name, change = choices[rng.integers(len(choices))]
        if len(data) > 16:
            data = change(data, rng)
        names.append(name)
    return data, "+".join(names)


def headers_of(extension: str, container: str) -> Callable[[bytes, np.random.Generator], bytes] | None:
    """The mutation of fields that fits a container."""
    marks = {
        "mp4": _MP4_BOXES,
        "mov": _MP4_BOXES,
        "avi": _AVI_CHUNKS,
        "matroska": _MKV_IDS,
        "webm": _MKV_IDS,
        "png": (b"IHDR", b"IDAT", b"IEND"),
        "jpg": (b"\xff\xc0", b"\xff\xda", b"\xff\xdb", b"\xff\xc4"),
        "webp": (b"RIFF", b"VP8 ", b"VP8L", b"VP8X"),
    }.get(container or extension)
    return None if marks is None else lambda data, rng: _after_mark(data, rng, marks)


def _after_mark(data: bytes, rng: np.random.Generator, marks: tuple[bytes, ...]) -> bytes:
    """An extreme number in one of the fields after (or the size before) one of the marks."""
    found = [place for mark in marks if (place := data.find(mark)) >= 0]
    if not found:
        return _flip_bits(data, rng)
    place = found[rng.integers(len(found))]
    wide = rng.random() < 0.3
    number = EXTREMES[rng.integers(len(EXTREMES))]
    value = struct.pack(">Q", number << 32 | number) if wide else struct.pack(">I", number)
    at = place + int(rng.integers(-4, 100))
    at = max(0, min(at - at % 4 + place % 4, len(data) - len(value)))
    if rng.random() < 0.2:  # a float that is none, as Matroska's duration is stored
        value = struct.pack(">d", (float("nan"), float("inf"), 1e300, -1.0)[rng.integers(4)])
    return data[:at] + value + data[at + len(value) :]


def _flip_bits(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(0, len(data), int(2 ** rng.integers(0, 7))):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _span(data: bytes, rng: np.random.Generator) -> tuple[int, int]:
    start = int(rng.integers(len(data)))
    return start, min(len(data), start + 1 + int(rng.integers(max(1, len(data) // 3))))


def _truncate(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(len(data)))]


def _zero_span(data: bytes, rng: np.random.Generator) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + bytes(end - start) + data[end:]


def _noise_span(data: bytes, rng: np.random.Generator) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + rng.bytes(end - start) + data[end:]


def _delete_span(data: bytes, rng: np.random.Generator) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + data[end:]


def _double_span(data: bytes, rng: np.random.Generator) -> bytes:
    start, end = _span(data, rng)
    return data[:end] + data[start:end] + data[end:]


def _swap_spans(data: bytes, rng: np.random.Generator) -> bytes:
    a, b, c, d = sorted(int(place) for place in rng.integers(0, len(data), 4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _extreme_number(data: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(data) - 4))
    order = ">I" if rng.random() < 0.5 else "<I"
    return data[:at] + struct.pack(order, EXTREMES[rng.integers(len(EXTREMES))]) + data[at + 4 :]


def _append_noise(data: bytes, rng: np.random.Generator) -> bytes:
    return data + rng.bytes(int(rng.integers(1, 4096)))


_BYTES: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "bits": _flip_bits,
    "truncated": _truncate,
    "zeroed": _zero_span,
    "noise": _noise_span,
    "deleted": _delete_span,
    "doubled": _double_span,
    "swapped": _swap_spans,
    "number": _extreme_number,
    "appended": _append_noise,
}


def bomb(rng: np.random.Generator) -> tuple[str, bytes, str]:
    """(extension, bytes, name) of a medium that claims or unpacks to far more than it is."""
    bombs: list[Callable[[], tuple[str, bytes, str]]] = [
        lambda: ("png", _png(60_000, 60_000, b"\x00" * 64), "png of 60,000² pixels"),
        lambda: ("png", _png(0x7FFFFFFF, 0x7FFFFFFF, b""), "png of 2³¹ pixels a side"),
        lambda: ("png", _png(6_000, 6_000, bytes(6_000 * 18_001)), "png of 36 megapixels in 100 kB"),
        lambda: ("png", _png(30_000, 1_333, bytes(30_000 * 3 * 1_333)), "png of 30,000 × 1,333, cut short"),
        lambda: ("png", _png(8, 8, bytes(8 * 25), text=bytes(50_000_000)), "png with 50 MB of packed text"),
        lambda: ("webp", _webp(16_383, 16_383), "webp of 16,383² pixels"),
        lambda: ("jpg", _jpeg(65_500, 65_500), "jpeg of 65,500² pixels"),
        lambda: ("png", gzip.compress(bytes(20_000_000)), "gzip for a png"),
        lambda: ("mp4", _mp4_box(b"moov", 0xFFFFFFFF), "mp4 whose moov is 4 GB"),
        lambda: ("mp4", _nested_boxes(20_000), "mp4 of 20,000 nested boxes"),
        lambda: ("mp4", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "playlist for an mp4"),
        lambda: ("mkv", b"\x1aE\xdf\xa3\x01\xff\xff\xff\xff\xff\xff\xfe" + bytes(64), "mkv of unknown size"),
        lambda: ("avi", b"RIFF\xff\xff\xff\xffAVI LIST\xff\xff\xff\xffhdrl" + bytes(64), "avi of 4 GB"),
        lambda: ("mp4", b"", "empty mp4"),
    ]
    return bombs[rng.integers(len(bombs))]()


def _png(width: int, height: int, rows: bytes, text: bytes | None = None) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    extra = chunk(b"zTXt", b"Comment\x00\x00" + zlib.compress(text)) if text is not None else b""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _webp(width: int, height: int) -> bytes:
    canvas = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    small = still("WEBP")[12:]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + b"\x00\x00\x00\x00" + canvas + small
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _jpeg(width: int, height: int) -> bytes:
    data = bytearray(still("JPEG"))
    place = data.find(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def _mp4_box(name: bytes, size: int) -> bytes:
    return b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2" + struct.pack(">I", size) + name + bytes(64)


def _nested_boxes(depth: int) -> bytes:
    boxes = b"".join(struct.pack(">I", 8 * (depth - level)) + b"moov" for level in range(depth))
    return b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2" + boxes
