"""Decoding only what is needed gives, bit by bit, the pictures of a plain decode of the whole file.

The clips move and cut, so that every picture is built on others; the files are those whose structure decides what may
be left out: pyramids of B-pictures, open groups, temporal layers, fields, edit lists, hidden pictures, cut beginnings.
"""

import bisect
import io
import random
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

import numpy as np
import pytest

from moss_train.data.decoding import pyav_reader
from moss_train.data.decoding.bitstream import Bitstream
from moss_train.data.decoding.decode import SMALL_CLIP_PIXELS, choose_reader, decode_arrays
from moss_train.data.decoding.probe import DEMUXERS, probe_media, sniff_container
from moss_train.errors import ConfigError

COUNT, WIDTH, HEIGHT = 60, 64, 48
X265 = "log-level=none"
DELAYED = tuple(40 * number - 300 for number in range(COUNT))
UNEVEN = tuple(sum((7, 20, 40, 41, 300)[(k * k) % 5] for k in range(number)) for number in range(COUNT))

#: name → (container, codec, options, time stamps in ms, whether few pictures must be had without the sequential pass)
FILES = {
    "h264": ("mp4", "libx264", {}, None, True),
    "h264 pyramid": ("mp4", "libx264", {"x264-params": "b-pyramid=strict:bframes=7:b-adapt=0:ref=4"}, None, True),
    "h264 slices": ("mp4", "libx264", {"x264-params": "cabac=0:slices=4:bframes=2"}, None, True),
    "h264 direct": ("matroska", "libx264", {"x264-params": "direct=temporal:bframes=4:b-adapt=0"}, None, True),
    "h264 open": ("mp4", "libx264", {"x264-params": "open-gop=1:bframes=3:scenecut=0"}, None, True),
    "h264 refresh": ("mp4", "libx264", {"x264-params": "intra-refresh=1:bframes=2"}, None, True),
    "h264 fields": ("mp4", "libx264", {"x264-params": "tff=1:bframes=3"}, None, True),
    "h264 ts": ("mpegts", "libx264", {}, None, True),
    "h264 uneven": ("mp4", "libx264", {}, UNEVEN, True),
    "h264 edit list": ("mp4", "libx264", {}, DELAYED, True),
    "h264 avi": ("avi", "libx264", {"bf": "0"}, None, False),
    "hevc open": ("mp4", "libx265", {"x265-params": X265}, None, True),
    "hevc closed": ("mp4", "libx265", {"x265-params": f"{X265}:open-gop=0"}, None, True),
    "hevc layers": ("mp4", "libx265", {"x265-params": f"{X265}:temporal-layers=3:bframes=4:b-adapt=0"}, None, True),
    "hevc edit list": ("mp4", "libx265", {"x265-params": X265}, DELAYED, True),
    "hevc ts": ("mpegts", "libx265", {"x265-params": X265}, None, True),
    "mpeg2": ("mpegts", "mpeg2video", {"bf": "2"}, None, True),
    "mpeg4": ("mp4", "mpeg4", {"bf": "2"}, None, True),
    "mpeg4 avi": ("avi", "mpeg4", {"bf": "2"}, None, False),
    "vp8": ("webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}, None, True),
    "vp9": ("webm", "libvpx-vp9", {"lag-in-frames": "20", "deadline": "realtime", "cpu-used": "8"}, None, True),
    "av1": ("mp4", "libsvtav1", {"preset": "12"}, None, True),
    "mjpeg": ("mov", "mjpeg", {}, None, True),
    "flv1": ("flv", "flv", {}, None, False),
}


@lru_cache(maxsize=1)
def pictures() -> list[np.ndarray]:
    """uint8 RGB [48, 64, 3] each: a texture that drifts under a block of changing colour, with a cut now and then."""
    from PIL import Image

    draw = np.random.default_rng(0)
    shown = []
    for number in range(COUNT):
        if number % 23 == 0:
            noise = Image.fromarray(draw.integers(0, 255, (HEIGHT // 2, WIDTH // 2, 3), np.uint8))
            texture = np.asarray(noise.resize((WIDTH * 3, HEIGHT * 3), Image.Resampling.BILINEAR))
        picture = texture[number : number + HEIGHT, 2 * number % WIDTH :][:, :WIDTH].copy()
        picture[10:20, 2 * number % WIDTH :][:, :8] = draw.integers(0, 255, 3)
        shown.append(picture)
    return shown


@lru_cache(maxsize=8)
def clip(container: str, codec: str, options: tuple, stamps: tuple[int, ...] | None) -> bytes:
    import av

    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot encode {codec}")
    out = io.BytesIO()
    tick = Fraction(1, 25) if stamps is None else Fraction(1, 1000)
    with av.open(out, "w", format=container) as muxer:
        stream = muxer.add_stream(codec, rate=25)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.time_base = 12, tick
        stream.thread_type, stream.options = "NONE", dict(options)
        for number, picture in enumerate(pictures()):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=stream.pix_fmt)
            frame.time_base, frame.pts = tick, number if stamps is None else stamps[number]
            muxer.mux(stream.encode(frame))
        muxer.mux(stream.encode())
    return out.getvalue()


def file_of(name: str) -> bytes:
    container, codec, options, stamps, _ = FILES[name]
    return clip(container, codec, tuple(options.items()), stamps)


def cut(data: bytes, container: str, skipped: int) -> bytes:
    """The packets from number `skipped` on, copied into another file, as cutting without encoding does."""
    import av

    out = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(out, "w", format=container) as muxer:
        stream = muxer.add_stream_from_template(source.streams.video[0])
        for packet in [entry for entry in source.demux(video=0) if entry.size][skipped:]:
            packet.stream = stream
            muxer.mux(packet)
    return out.getvalue()


def whole(data: bytes) -> tuple[list[float], list[np.ndarray]]:
    """Times from the first picture and pictures [3, H, W] of a plain decode by PyAV. AVI has no times to go by: those
    of the average rate."""
    import av

    container = sniff_container(data)
    with av.open(io.BytesIO(data), format=DEMUXERS[container]) as opened:
        stream = opened.streams.video[0]
        frames = [(frame.time, frame.to_ndarray(format="rgb24").transpose(2, 0, 1)) for frame in opened.decode(stream)]
        if container == "avi":
            return [number / float(stream.average_rate) for number in range(len(frames))], [f for _, f in frames]
    times = [time - frames[0][0] for time, _ in frames]
    assert times == sorted(set(times))
    return times, [frame for _, frame in frames]


def assert_exact(data: bytes, seed: str, trials: int = 8) -> None:
    times, shown = whole(data)
    facts = probe_media(data)
    draw = random.Random(seed)
    for _ in range(trials):
        asked = [draw.choice(times) + draw.choice((0.0, 0.0011)) for _ in range(draw.choice((1, 1, 2, 3, 5, 30)))]
        decoded = decode_arrays(data, asked, None, "pyav", facts=facts)
        numbers = [bisect.bisect_right(times, time + 1e-6) - 1 for time in asked]
        for place, number in enumerate(numbers):
            assert np.array_equal(decoded.frames[place], shown[number]), (asked[place], number)
        np.testing.assert_allclose(decoded.times_s, [times[number] for number in numbers], atol=2e-3)
    everything = decode_arrays(data, times, None, "pyav", facts=facts)
    assert np.array_equal(everything.frames, np.stack(shown))


@pytest.fixture
def sequential_passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every pass from the start that a test needed."""
    passes, plain = [], pyav_reader._in_sequence
    monkeypatch.setattr(pyav_reader, "_in_sequence", lambda *a: passes.append("pass") or plain(*a))
    return passes


@pytest.mark.parametrize("name", FILES)
def test_pictures_are_those_of_the_whole_file(name: str, sequential_passes: list[str]):
    data = file_of(name)
    assert_exact(data, name)
    assert probe_media(data).by_packets == FILES[name][-1]
    assert bool(sequential_passes) != FILES[name][-1]


@pytest.mark.parametrize("container", ["mp4", "mpegts"])
@pytest.mark.parametrize("name", ["h264", "hevc open", "mpeg2"])
def test_files_cut_between_keyframes(name: str, container: str):
    """Their first packets show nothing, since what they are built on is gone."""
    assert_exact(cut(file_of(name), container, 5), name + container, trials=3)


@pytest.mark.parametrize(
    ("name", "most"), [("h264", 22), ("h264 pyramid", 28), ("hevc closed", 16), ("hevc open", 30), ("mpeg4", 16)]
)
def test_few_pictures_are_decoded_for_few(name: str, most: int, monkeypatch: pytest.MonkeyPatch):
    """Of 60 packets; the asked pictures are the last of their groups."""
    data, facts = file_of(name), probe_media(file_of(name))
    sent, plain = [], pyav_reader._pictures

    class Counting:
        def __init__(self, context):
            self.context = context

        def decode(self, packet):
            sent.append(packet)
            return self.context.decode(packet)

    monkeypatch.setattr(pyav_reader, "_pictures", lambda context, *a: plain(Counting(context), *a))
    decode_arrays(data, [21 / 25, 46 / 25], 32, facts=facts)
    assert sum(packet is not None for packet in sent) <= most


def test_a_claim_of_the_index_that_the_file_breaks_is_found_out(sequential_passes: list[str]):
    """Facts that call the cut file sound lead to doubt, and doubt to the sequential pass."""
    data = cut(file_of("h264"), "mp4", 5)
    times, shown = whole(data)
    false = replace(probe_media(data), by_packets=True, pts_ok=True)
    decoded = decode_arrays(data, [0.0], None, facts=false)
    assert sequential_passes and np.array_equal(decoded.frames[0], shown[0])


@pytest.mark.parametrize("codec", ["h264", "hevc", "mpeg2video", "mpeg4", "vp9"])
def test_noise_is_never_spare(codec: str):
    """What cannot be read is decoded, and nothing is begun at it."""
    draw = random.Random(codec)
    for extradata in (b"", b"\x01" + draw.randbytes(40), draw.randbytes(60), b"\x00\x00\x01\x67" + draw.randbytes(9)):
        bitstream = Bitstream(codec, extradata)
        for _ in range(200):
            look = bitstream.look(memoryview(draw.randbytes(draw.randint(1, 60))), False)
            assert not look.spare or codec in ("mpeg2video", "mpeg4")
            assert not look.entry or codec in ("h264", "hevc")


def test_reader_is_a_function_of_setting_and_facts():
    facts = probe_media(file_of("h264"))
    large = replace(facts, frame_count=1 + SMALL_CLIP_PIXELS // (facts.width * facts.height))
    assert choose_reader("auto", large) == choose_reader("pyav", facts) == "pyav"
    assert choose_reader("auto", replace(large, frame_count=large.frame_count - 1)) == "decord"
    assert choose_reader("auto", replace(facts, gops_closed=False)) == "pyav"
    assert choose_reader("auto", replace(facts, container="avi")) == "pyav"
    assert choose_reader("decord", facts) == "decord"
    assert choose_reader("torchcodec", facts) == "torchcodec"
    for wrong in ({"gops_closed": False}, {"container": "mpegts"}, {"by_packets": False, "pts_ok": False}):
        assert choose_reader("decord", replace(facts, **wrong)) == "pyav"
        assert choose_reader("torchcodec", replace(facts, **wrong)) == "pyav"
    assert choose_reader("decord", replace(facts, container="image")) == "pillow"


def test_torchcodec_reads_the_same_pictures_or_says_what_is_missing():
    data, facts = file_of("h264"), probe_media(file_of("h264"))
    times, shown = whole(data)
    asked = [-1.0, 0.0, 0.5, 0.5, 1.3, 99.0]
    try:
        decoded = decode_arrays(data, asked, None, "torchcodec", facts=facts)
    except ConfigError as error:
        assert "moss_train[torchcodec]" in str(error)
        pytest.skip("torchcodec cannot be imported here")
    assert decoded.backend == "torchcodec"
    numbers = [max(bisect.bisect_right(times, time + 1e-6) - 1, 0) for time in asked]
    for frame, number in zip(decoded.frames, numbers, strict=True):
        assert np.array_equal(frame, shown[number])
