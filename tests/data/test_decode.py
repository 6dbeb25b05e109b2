"""Decoding: the right picture at every time, for every container, and a clear refusal of everything else."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
from data_samples import numbered_clip, numbered_picture, read_numbers, still
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_train.data.decoding.decode import DecodeLimits, decode_arrays, decode_frames, fitted_size, frame_indices
from moss_train.data.decoding.probe import probe_media, sniff_container
from moss_train.data.decoding.pyav_reader import each_picture
from moss_train.errors import SampleError

QUIET_X265 = "log-level=none"
#: (container, codec, options, whether decord may read it when it is asked to; None: either way)
FILES = {
    "mp4": ("mp4", "libx264", {}, True),
    "mov": ("mov", "libx264", {}, True),
    "mkv": ("matroska", "libx264", {}, True),
    "mpeg2": ("mp4", "mpeg2video", {}, True),
    "hevc closed": ("mp4", "libx265", {"x265-params": f"open-gop=0:{QUIET_X265}"}, True),
    "hevc open": ("mp4", "libx265", {"x265-params": QUIET_X265}, False),
    "hevc open mkv": ("matroska", "libx265", {"x265-params": QUIET_X265}, False),
    "h264 open": ("mp4", "libx264", {"x264-params": "open-gop=1:bframes=3:scenecut=0"}, False),
    "h264 open mkv": ("matroska", "libx264", {"x264-params": "open-gop=1:bframes=3:scenecut=0"}, False),
    "intra refresh": ("mp4", "libx264", {"x264-params": "intra-refresh=1:bframes=2"}, False),
    "mpeg4 b-frames": ("mp4", "mpeg4", {"bf": "2"}, False),
    "avi": ("avi", "libx264", {"bf": "0"}, False),
    "avi b-frames": ("avi", "libx264", {}, False),
    "avi mpeg4": ("avi", "mpeg4", {}, None),
    "avi mpeg4 b-frames": ("avi", "mpeg4", {"bf": "2"}, None),
    "mpegts": ("mpegts", "libx264", {}, False),
}


@pytest.mark.parametrize("name", FILES)
def test_every_picture_is_the_asked_one(name: str):
    """Random sets of pictures, in any order: those asked are those given, and the times are theirs."""
    container, codec, options, decord_may = FILES[name]
    draw = random.Random(name)
    data = numbered_clip(60, 10, container, codec, gop=7, options=options)
    facts = probe_media(data)
    assert (
        facts.frame_count == 60
        and facts.frame_rate == pytest.approx(10)
        and facts.duration_s == pytest.approx(6, abs=0.3)
    )
    for trial in range(12):
        asked = [draw.randrange(60) for _ in range(draw.randint(1, 10))]
        decoder = ("decord", "pyav", "auto")[trial % 3]
        decoded = decode_arrays(data, [number / 10 for number in asked], 64, decoder, facts=facts)
        assert read_numbers(decoded.frames, 32) == asked
        np.testing.assert_allclose(decoded.times_s, [number / 10 for number in asked], atol=2e-3)
        if decoder == "pyav":
            assert decoded.backend == "pyav" and decoded.note == ""
        elif decord_may is not None:
            assert decoded.backend == ("decord" if decord_may else "pyav"), decoded.note
            assert bool(decoded.note) != decord_may or decoder == "auto"


def test_plain_decord_is_wrong_where_the_guard_looks():
    """Should a newer decord read these files rightly, the guard may go."""
    decord = pytest.importorskip("decord")
    for name in ("hevc open", "h264 open", "avi"):
        container, codec, options, _ = FILES[name]
        data = numbered_clip(60, 10, container, codec, gop=7, options=options)
        reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
        asked = [9, 20, 31, 45, 59]
        given = read_numbers(reader.get_batch(asked).asnumpy().transpose(0, 3, 1, 2))
        del reader
        assert given != asked, name


@pytest.mark.parametrize("name", ["mp4", "hevc open mkv", "avi b-frames", "mpegts"])
def test_all_pictures_in_order_with_their_times(name: str):
    container, codec, options, _ = FILES[name]
    data = numbered_clip(20, 10, container, codec, gop=7, options=options)
    times_s, pictures = zip(*each_picture(data, probe_media(data)), strict=True)
    np.testing.assert_allclose(times_s, np.arange(20) / 10, atol=2e-3)
    assert read_numbers(np.stack(pictures).transpose(0, 3, 1, 2), 32) == list(range(20))
    asked = decode_arrays(data, list(times_s), None, "pyav")
    assert np.array_equal(asked.frames.transpose(0, 2, 3, 1), np.stack(pictures))


def test_frame_on_screen_between_stamps_and_beyond_the_ends():
    data = numbered_clip(12, 4)
    for decoder in ("decord", "pyav"):
        decoded = decode_arrays(data, [-1.0, 0.0, 0.2499, 0.25, 0.49, 2.75, 99.0], 64, decoder)
        assert read_numbers(decoded.frames, 32) == [0, 0, 0, 1, 1, 11, 11]
        np.testing.assert_allclose(decoded.times_s, [0, 0, 0, 0.25, 0.25, 2.75, 2.75], atol=1e-6)


def test_variable_frame_rate_goes_by_time_stamps():
    data = numbered_clip(6, 4, ticks=[0, 10, 200, 210, 900, 905])
    for decoder in ("decord", "pyav"):
        decoded = decode_arrays(data, [0.0, 0.02, 0.03, 0.51, 0.53, 2.24, 2.25, 2.27], 64, decoder)
        assert decoded.backend == decoder
        assert read_numbers(decoded.frames, 32) == [0, 0, 1, 2, 3, 3, 4, 5]


@pytest.mark.parametrize("first_tick", [2000, -500])
def test_shifted_start_is_the_same_for_both_readers(first_tick: int):
    """A late start counts from the first picture; pictures before zero are cut by an edit list."""
    data = numbered_clip(12, 4, ticks=[first_tick + 100 * n for n in range(12)])
    times = [0.0, 0.25, 0.6, 1.25]
    decord, pyav = (decode_arrays(data, times, 64, decoder) for decoder in ("decord", "pyav"))
    assert read_numbers(decord.frames, 32) == read_numbers(pyav.frames, 32)
    assert read_numbers(pyav.frames, 32) == ([0, 1, 2, 5] if first_tick > 0 else [5, 6, 7, 10])


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_display_rotation_is_applied_by_both_readers(turn: int):
    """The display matrix in the track header turns the picture; both readers must show it upright."""
    data = bytearray(numbered_clip(4, 4))
    at = data.find(b"tkhd") + 4 + 40
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[turn]
    matrix = np.array([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]).astype(">i4")
    data[at : at + 36] = matrix.tobytes()
    facts = probe_media(bytes(data))
    shape = (32, 64) if turn == 180 else (64, 32)
    assert (facts.height, facts.width) == shape
    upright = np.rot90(numbered_picture(2), -turn // 90)
    for decoder in ("decord", "pyav"):
        native = decode_arrays(bytes(data), [0.5], None, decoder)
        assert native.backend == decoder and native.frames.shape[2:] == shape
        assert np.abs(native.frames[0].transpose(1, 2, 0).astype(int) - upright).mean() < 12
        assert np.array_equal(native.frames[0].transpose(1, 2, 0), list(each_picture(bytes(data), facts))[2][1])
        tile = decode_arrays(bytes(data), [0.5], 48, decoder).frames[0]
        height, width = (24, 48) if turn == 180 else (48, 24)
        assert tile[:, height:].sum() == 0 and tile[:, :, width:].sum() == 0 and tile[:, :height, :width].max() > 200


def test_readers_agree_bit_by_bit_at_native_size_and_closely_when_scaled():
    data = numbered_clip(12, 4)
    times = [n / 4 for n in range(12)]
    native = [decode_arrays(data, times, None, decoder).frames for decoder in ("decord", "pyav")]
    assert np.array_equal(*native)
    scaled = [decode_arrays(data, times, 40, decoder).frames.astype(int) for decoder in ("decord", "pyav")]
    assert np.abs(scaled[0] - scaled[1]).mean() < 0.5


def test_av1_is_read_by_pyav_when_decord_is_asked():
    import av

    if "libsvtav1" not in av.codecs_available:
        pytest.skip("this PyAV cannot encode AV1")
    data = numbered_clip(12, 4, codec="libsvtav1")
    decoded = decode_arrays(data, [0.0, 1.0, 2.75], 64, "decord")
    assert decoded.backend == "pyav" and "decord" in decoded.note and read_numbers(decoded.frames, 32) == [0, 4, 11]


def test_decode_frames_gives_a_torch_tensor():
    import torch

    decoded = decode_frames(numbered_clip(4, 4), [0.25, 0.5], 56)
    assert decoded.frames.shape == (2, 3, 56, 56) and decoded.frames.dtype == torch.uint8
    assert decode_frames(numbered_clip(4, 4), [], 56).frames.shape == (0, 3, 56, 56)


def test_stills():
    for form in ("PNG", "WEBP", "JPEG"):
        decoded = decode_arrays(still(37, form), [0.0, 0.0], 64)
        assert decoded.backend == "pillow" and read_numbers(decoded.frames, 32) == [37, 37]
        assert decoded.frames[:, :, 32:].sum() == 0


def test_still_orientation_and_transparency():
    from PIL import Image

    picture = Image.fromarray(numbered_picture(5))
    exif = picture.getexif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees to show
    out = io.BytesIO()
    picture.save(out, "JPEG", exif=exif, quality=95)
    turned = decode_arrays(out.getvalue(), [0.0], None).frames[0]
    facts = probe_media(out.getvalue())
    assert turned.shape == (3, 64, 32) == (3, facts.height, facts.width)
    assert np.abs(turned.transpose(1, 2, 0).astype(int) - np.rot90(numbered_picture(5), -1)).mean() < 12
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    out = io.BytesIO()
    clear.save(out, "PNG")
    assert (decode_arrays(out.getvalue(), [0.0], None).frames == 255).all()


@pytest.mark.parametrize("shape", [(360, 640), (1280, 720), (33, 1000), (560, 560), (3, 4), (100, 17)])
def test_size_and_pixels_are_those_of_the_mllama_image_processor(shape: tuple[int, int]):
    processing = pytest.importorskip("transformers.models.mllama.image_processing_pil_mllama")
    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    size = {"height": 112, "width": 112}
    processor = processing.MllamaImageProcessorPil(
        size=size, max_image_tiles=1, do_rescale=False, do_normalize=False, return_tensors="np"
    )
    theirs = processor([[Image.fromarray(picture)]])["pixel_values"][0, 0, 0]
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    ours = decode_arrays(out.getvalue(), [0.0], 112).frames[0]
    assert np.array_equal(ours, np.asarray(theirs).astype(np.uint8))


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 600))
def test_fitted_size_fills_one_side_and_keeps_the_aspect(width: int, height: int, size: int):
    w, h = fitted_size(width, height, size)
    assert max(w, h) == size and min(w, h) >= 1
    if min(w, h) > 1:
        assert abs(w * height - h * width) <= max(width, height) * 1.000001


@given(st.lists(st.floats(0.001, 5), min_size=1, max_size=40), st.lists(st.floats(-1, 250), max_size=10))
@settings(max_examples=50)
def test_frame_indices_name_the_last_stamp_before(steps: list[float], times: list[float]):
    stamps = np.concatenate([[0.0], np.cumsum(steps)])
    for time, index in zip(times, frame_indices(stamps, times), strict=True):
        assert index == 0 or stamps[index] <= time + 1e-4
        assert index == len(stamps) - 1 or stamps[index + 1] > time


BROKEN = {
    "empty": lambda clip: b"",
    "text": lambda clip: b'{"error": "video not found"}',
    "html": lambda clip: b"<!DOCTYPE html><html><body>404</body></html>",
    "random": lambda clip: random.Random(0).randbytes(5000),
    "half": lambda clip: clip[: len(clip) // 2],
    "magic alone": lambda clip: clip[:32],
    "magic and noise": lambda clip: clip[:64] + random.Random(1).randbytes(4000),
    "playlist": lambda clip: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n",
    "zeroed payload": lambda clip: clip[:64] + bytes(len(clip) - 64),
    "broken png": lambda clip: still(3)[:60],
    "broken jpeg": lambda clip: still(3, "JPEG")[:200],
}


@pytest.mark.parametrize("decoder", ["auto", "decord"])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_input_is_one_sample_error(name: str, decoder: str, capfd):
    """Refused with the key and a reason, and nothing of the input reaches standard error."""
    data = BROKEN[name](numbered_clip(8, 4))
    with pytest.raises(SampleError) as caught:
        decode_arrays(data, [0.0, 1.0], 56, decoder, key="k7")
    assert caught.value.key == "k7" and len(caught.value.reason) > 10 and "\n" not in caught.value.reason
    with pytest.raises(SampleError):
        probe_media(data, "k7")
    captured = capfd.readouterr()
    assert "error" not in captured.err.lower() and "DOCTYPE" not in captured.err and captured.out == ""


@pytest.mark.parametrize("decoder", ["auto", "decord"])
def test_damaged_clips_never_crash(decoder: str, capfd):
    """Flipped bytes: every outcome is pictures of the asked shape or a SampleError."""
    clip = numbered_clip(30, 10)
    draw = random.Random(5)
    refused = 0
    for _ in range(30):
        data = bytearray(clip)
        for _ in range(draw.choice([1, 5, 50])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        try:
            decoded = decode_arrays(bytes(data), [0.0, 1.0, 2.9], 56, decoder)
            assert decoded.frames.shape == (3, 3, 56, 56)
        except SampleError:
            refused += 1
    assert 0 < refused < 30


def test_a_picture_that_needs_a_damaged_one_is_refused():
    """FFmpeg marks the damaged picture alone; those that are built on it look as bad, until the next keyframe."""
    import av

    clip = numbered_clip(30, 10, gop=10, options={"x264-params": "bframes=0:scenecut=0"})
    with av.open(io.BytesIO(clip)) as opened:
        packet = [entry for entry in opened.demux(video=0) if entry.size][3]
    data = bytearray(clip)
    data[packet.pos + 9 : packet.pos + packet.size] = bytes(255 for _ in range(packet.size - 9))
    damaged = bytes(data)
    for time in (0.3, 0.7, 0.9):
        with pytest.raises(SampleError):
            decode_arrays(damaged, [time], 64)
    decoded = decode_arrays(damaged, [0.0, 0.2, 1.0, 2.5], 64)
    assert read_numbers(decoded.frames, 32) == [0, 2, 10, 25]


def test_limits():
    clip = numbered_clip(4, 4)
    with pytest.raises(SampleError, match="over the limit of 1000 pixels"):
        decode_arrays(clip, [0.0], 56, limits=DecodeLimits(max_pixels=1000))
    with pytest.raises(SampleError, match="over the limit of 1000 pixels"):
        decode_arrays(still(1), [0.0], 56, limits=DecodeLimits(max_pixels=1000))
    with pytest.raises(SampleError, match="the limit is 4"):
        decode_arrays(clip, [0.0] * 5, 56, limits=DecodeLimits(max_frames=4))
    with pytest.raises(SampleError, match="not finite"):
        decode_arrays(clip, [float("nan")], 56)
    with pytest.raises(SampleError, match="over the limit of 0.5 s"):
        decode_arrays(clip, [0.0], 56, limits=DecodeLimits(max_seconds=0.5))
    room = DecodeLimits(max_bytes=2 * 3 * 56 * 56)
    assert decode_arrays(still(1), [0.0] * 2, 56, limits=room).frames.shape[0] == 2
    with pytest.raises(SampleError, match="3 frames of 56×56 pixels are over the limit of 18816 bytes"):
        decode_arrays(still(1), [0.0] * 3, 56, limits=room)
    with pytest.raises(SampleError, match="file of .* bytes is over the limit of 1000 bytes"):
        decode_arrays(clip, [0.0], 8, limits=DecodeLimits(max_bytes=1000))
    for decoder in ("auto", "decord"):
        with pytest.raises(SampleError, match="4 frames of 64×32 pixels are over the limit"):
            decode_arrays(clip, [0.0] * 4, None, decoder, limits=DecodeLimits(max_bytes=max(len(clip), 20_000)))


def test_claims_of_headers_are_not_believed():
    """A duration of days and a rate of millions are taken from the packets instead."""
    data = bytearray(numbered_clip(8, 4))
    at = data.find(b"mdhd") + 4 + 16  # version and flags, two times, time scale
    data[at : at + 4] = (2**32 - 2).to_bytes(4, "big")
    facts = probe_media(bytes(data))
    assert facts.duration_s == pytest.approx(2.0, abs=0.3) and 0 < facts.frame_rate <= 1000
    at = data.find(b"stsz") + 8
    sizes = bytearray(data)
    sizes[at : at + 4] = (1).to_bytes(4, "big")
    sizes[at + 4 : at + 8] = (2**31).to_bytes(4, "big")
    with pytest.raises(SampleError):
        decode_arrays(bytes(sizes), [0.0], 56)


def test_enormous_claimed_size_is_refused_before_any_memory_is_taken():
    """A 30-byte PNG header may claim 100,000 × 100,000 pixels."""
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    png += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(SampleError):
        decode_arrays(png, [0.0], 56)


def test_sniff_knows_the_containers():
    assert sniff_container(numbered_clip(2, 4)) == "mp4"
    assert sniff_container(numbered_clip(2, 4, "avi")) == "avi"
    assert sniff_container(numbered_clip(2, 4, "matroska")) == "matroska"
    assert sniff_container(numbered_clip(2, 4, "mpegts")) == "mpegts"
    assert sniff_container(still(1, "JPEG")) == "image"
    with pytest.raises(SampleError, match="starts with"):
        sniff_container(Path(__file__).read_bytes())
