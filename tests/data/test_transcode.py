"""Transcoded clips show the same pictures at the same moments, under the same time stamps, and cost less to decode."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from data_samples import caption_json, numbered_clip, stage, still, stream_json
from faulty_server import faulty_server
from shared_data import shared_folder

from moss_train.data.corpus import load_source
from moss_train.data.decoding.decode import decode_arrays, fitted_size
from moss_train.data.decoding.probe import MediaProbe, probe_media
from moss_train.data.shards import transcode, transcoder
from moss_train.data.shards.check import DURATION_SLACK_S
from moss_train.data.shards.index import load_index
from moss_train.data.shards.pack import PackOptions, pack, pack_command
from moss_train.data.shards.storage import ShardStore
from moss_train.data.shards.transcode import TranscodeConfig, transcode_clip
from moss_train.errors import ConfigError, DataError, SampleError
from moss_train.streams.media import MediaInfo, offline_frame_times

SIZE = 112


def moving_picture(number: int, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: waves that wander, so that no two pictures of a clip are alike."""
    x, y = np.arange(width)[None, :, None] / width, np.arange(height)[:, None, None] / height
    hues = np.array([0.0, 2.1, 4.2])
    waves = np.sin(7 * x + 1.9 * number + hues) + np.cos(5 * y - 1.3 * number + hues)
    return (128 + 55 * waves).clip(0, 255).astype(np.uint8)


def moving_clip(
    count: int = 36,
    rate: Fraction = Fraction(12),
    container: str = "mp4",
    codec: str = "libx264",
    shape: tuple[int, int] = (160, 120),
    ticks: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    audio: bool = False,
) -> bytes:
    """A clip whose pictures are shown at `ticks` (default 0, 1, …) divided by the rate."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as muxer:
        stream = muxer.add_stream(codec, rate=rate, options={"crf": "12", "preset": "ultrafast"} | (options or {}))
        stream.width, stream.height = shape
        stream.pix_fmt = "yuv444p" if shape[0] % 2 or shape[1] % 2 else "yuv420p"
        stream.codec_context.time_base, stream.codec_context.gop_size = 1 / rate, 15
        if audio:
            sound = muxer.add_stream("aac", rate=16_000)
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
            silence.rate, silence.pts = 16_000, 0
            muxer.mux(sound.encode(silence))
            muxer.mux(sound.encode())
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(moving_picture(number, *shape), format="rgb24")
            frame.pts, frame.time_base = (ticks[number] if ticks is not None else number), 1 / rate
            muxer.mux(stream.encode(frame))
        muxer.mux(stream.encode())
    return out.getvalue()


def turned(clip: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """The clip with another display matrix in its track header."""
    data = bytearray(clip)
    at = data.find(b"tkhd") + 4 + 40
    matrix = np.array([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]).astype(">i4")
    data[at : at + 36] = matrix.tobytes()
    return bytes(data)


CLIPS = {
    "mp4": moving_clip,
    "b-pictures and open gops": lambda: moving_clip(
        container="matroska", options={"preset": "medium", "x264-params": "open-gop=1:bframes=3:scenecut=0"}
    ),
    "ntsc": lambda: moving_clip(rate=Fraction(24_000, 1001)),
    "variable rate": lambda: moving_clip(
        10, Fraction(1000), ticks=[0, 40, 80, 900, 1000, 1004, 1499, 1500, 2750, 3300], options={"bf": "0"}
    ),
    "slower than asked": lambda: moving_clip(4, Fraction(1)),
    "turned by a quarter": lambda: turned(moving_clip(), 0, 1, -1, 0),
    "odd sides, scaled": lambda: moving_clip(shape=(160, 91)),
    "odd sides, small": lambda: moving_clip(shape=(61, 37)),
    "begins late": lambda: moving_clip(ticks=range(24, 60)),
    "cut by an edit list": lambda: moving_clip(ticks=range(-7, 29)),
    "avi without stamps": lambda: moving_clip(container="avi", options={"preset": "medium"}),
    "transport stream": lambda: moving_clip(container="mpegts"),
}
#: containers whose packets carry the pictures' own time stamps
STAMPED = [name for name in CLIPS if not name.startswith("avi")]


def stamps_of(clip: bytes) -> list[Fraction]:
    """Time stamps of the pictures, from the first one's, as the container has them."""
    with av.open(io.BytesIO(clip)) as opened:
        packets = [packet for packet in opened.demux(video=0) if packet.size and not packet.is_discard]
        stamps = sorted(packet.pts * packet.time_base for packet in packets if packet.pts >= 0)
    return [stamp - stamps[0] for stamp in stamps]


def moments(facts: MediaProbe, fps: float) -> list[float]:
    return [k / fps for k in range(max(1, int(np.ceil(facts.duration_s * fps - 1e-6))))]


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(1e-9, np.square(first.astype(float) - second).mean()))


@pytest.mark.parametrize("codec", transcode.CODECS)
@pytest.mark.parametrize("name", CLIPS)
def test_the_same_picture_at_every_moment(name: str, codec: str):
    config = TranscodeConfig(fps=4.0, size=SIZE, codec=codec, crf=14)
    old = CLIPS[name]()
    new, figures = transcode_clip(old, "k", config)
    before, after = probe_media(old), probe_media(new)
    times = moments(before, 4.0)
    shown = [decode_arrays(clip, times, SIZE, "pyav") for clip in (old, new)]
    np.testing.assert_allclose(shown[0].times_s, shown[1].times_s, rtol=0, atol=1e-9)
    # The whole tile, whose right and lower parts must stay black, and the picture alone.
    width, height = fitted_size(before.width, before.height, SIZE)
    for one, other in zip(shown[0].frames, shown[1].frames, strict=True):
        assert psnr(one, other) > 30 and psnr(one[:, :height, :width], other[:, :height, :width]) > 30
    for one, other in zip(shown[0].frames, shown[0].frames[1:], strict=False):
        assert np.array_equal(one, other) or psnr(one, other) < 20  # a wrong picture would be noticed
    assert figures.pictures == after.frame_count == len(set(shown[0].times_s))
    assert figures.psnr_db >= figures.worst_psnr_db > 30
    assert abs(after.duration_s - before.duration_s) < 1e-3 < DURATION_SLACK_S
    assert after.frame_rate == pytest.approx(4.0) or figures.pictures < len(times)
    assert (after.rotation, after.codec, after.container) == (0, codec, "mp4") and after.gops_closed and after.pts_ok
    assert after.max_keyframe_gap <= 8 and max(after.width, after.height) <= SIZE


@pytest.mark.parametrize("name", STAMPED)
def test_time_stamps_are_exactly_those_of_the_old_pictures(name: str):
    old = CLIPS[name]()
    new, _ = transcode_clip(old, "k", TranscodeConfig(fps=4.0, size=SIZE))
    before, after = stamps_of(old), stamps_of(new)
    shown = {max(stamp for stamp in before if stamp <= Fraction(k, 4)) for k in range(round(before[-1] * 4) + 1)}
    assert set(after) >= {stamp for stamp in shown if stamp < before[-1]} and set(after) <= set(before)


def test_a_regular_clip_keeps_the_rate_that_was_asked_for():
    """Offline samples name moments by number and rate: those moments must be k / fps, whatever the clip's length."""
    for count in (29, 30, 31, 36, 40):
        facts = probe_media(transcode_clip(moving_clip(count), "k", TranscodeConfig(fps=2.0, size=64))[0])
        assert facts.frame_rate == 2.0 and facts.duration_s == pytest.approx(count / 12, abs=1e-5)


@pytest.mark.parametrize("name", ["mp4", "ntsc", "avi without stamps"])
def test_offline_sampling_shows_the_same_pictures(name: str):
    """By number and average rate, as the reference samples: from the new clip come the pictures of the old.

    But for the last: a clip that ends less than half a step after k / fps counts as having none there.
    """
    old = CLIPS[name]()
    clips = (old, transcode_clip(old, "k", TranscodeConfig(fps=4.0, size=SIZE))[0])
    for fps in (1.0, 2.0, 4.0):
        stamps = []
        for clip in clips:
            facts = probe_media(clip)
            info = MediaInfo(facts.duration_s, facts.frame_rate, facts.frame_count)
            stamps.append(decode_arrays(clip, offline_frame_times(info, fps, 1, 256), SIZE, "pyav").times_s)
        count = len(stamps[0]) - 1
        assert count <= len(stamps[1]) <= count + 1
        np.testing.assert_allclose(stamps[0][:count], stamps[1][:count], rtol=0, atol=1e-6)


@pytest.mark.parametrize("codec", transcode.CODECS)
def test_decord_reads_the_new_clips_too(codec: str):
    pytest.importorskip("decord")
    new, _ = transcode_clip(moving_clip(), "k", TranscodeConfig(fps=4.0, size=SIZE, codec=codec))
    times = moments(probe_media(new), 4.0)
    decord, pyav = (decode_arrays(new, times, SIZE, decoder) for decoder in ("decord", "pyav"))
    assert (decord.backend, pyav.backend) == ("decord", "pyav")
    np.testing.assert_allclose(decord.times_s, pyav.times_s, atol=1e-5)
    assert psnr(decord.frames, pyav.frames) > 45


def test_colours_stay(tmp_path: Path):
    """Flat fields of strong colours come back as they were, by both readers, from both codecs."""
    fields = np.kron(np.random.default_rng(0).integers(0, 256, (4, 4, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as muxer:
        stream = muxer.add_stream("libx264rgb", rate=2, options={"crf": "0"})
        stream.width = stream.height = 64
        stream.pix_fmt = "rgb24"
        for number in range(3):
            frame = av.VideoFrame.from_ndarray(fields, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 2)
            muxer.mux(stream.encode(frame))
        muxer.mux(stream.encode())
    for codec in transcode.CODECS:
        new, _ = transcode_clip(out.getvalue(), "k", TranscodeConfig(fps=1.0, size=64, codec=codec, crf=10))
        for decoder in ("pyav", "decord"):
            picture = decode_arrays(new, [0.0], 64, decoder).frames[0].transpose(1, 2, 0)
            centres = (slice(8, None, 16), slice(8, None, 16))
            assert np.abs(picture[centres].astype(int) - fields[centres]).max() < 10


def test_sound_is_dropped_and_clips_longer_than_a_batch_are_whole(monkeypatch):
    old = moving_clip(audio=True)
    whole, figures = transcode_clip(old, "k", TranscodeConfig(fps=6.0, size=SIZE))
    with av.open(io.BytesIO(whole)) as opened:
        assert [stream.type for stream in opened.streams] == ["video"]
    monkeypatch.setattr(transcode, "BATCH_BYTES", 5 * 3 * SIZE**2)
    again, in_batches = transcode_clip(old, "k", TranscodeConfig(fps=6.0, size=SIZE))
    assert again == whole and in_batches.psnr_db == pytest.approx(figures.psnr_db)
    assert in_batches.pictures == 18


def test_the_same_clip_gives_the_same_bytes_and_a_new_one_stays():
    for codec in transcode.CODECS:
        config = TranscodeConfig(fps=4.0, size=SIZE, codec=codec)
        new, figures = transcode_clip(moving_clip(), "k", config)
        assert transcode_clip(moving_clip(), "k", config)[0] == new and figures.rewritten
        same, figures = transcode_clip(new, "k", config)
        assert same == new and not figures.rewritten
    picture = still(3)
    assert transcode_clip(picture, "k", config)[0] == picture


def test_clips_that_do_not_decode_are_refused():
    config = TranscodeConfig(fps=4.0, size=SIZE)
    for broken in (b"", b"<html>", moving_clip()[:3000]):
        with pytest.raises(SampleError):
            transcode_clip(broken, "k", config)
    with pytest.raises(SampleError, match="over the limit"):
        transcode_clip(moving_clip(), "k", TranscodeConfig(fps=4.0, max_pixels=1000))


def mixed_staging(folder: Path) -> Path:
    """Streams, a caption of two media, a still, words, and a clip that does not decode."""
    for number in range(3):
        clip = moving_clip(24 + number, shape=(64, 48))
        stage(folder, f"s{number}", stream_json(f"s{number}", 4, 2.0), mp4=clip)
    two = caption_json("two", "0.png")
    two["media"].append({"id": "m1", "kind": "video", "member": "1.avi"})
    stage(folder, "two", two, _0_png=still(1), _1_avi=numbered_clip(12, 6, "avi"))
    stage(folder, "words", caption_json("words", None))
    stage(folder, "broken", stream_json("broken"), mp4=moving_clip()[:3000])
    return folder


SMALL = TranscodeConfig(fps=2.0, size=64)


def test_a_source_is_transcoded_from_staging_and_from_shards_alike(tmp_path: Path):
    staging = mixed_staging(tmp_path / "staging")
    done = pack(staging, tmp_path / "new", transcode=SMALL)
    assert (done.samples, [error.key for error in done.rejected]) == (5, ["broken"])
    assert len(done.transcoded.clips) == 4 and done.transcoded.failed == 1
    pack(staging, tmp_path / "plain")
    again = pack(tmp_path / "plain", tmp_path / "from shards", transcode=SMALL)
    assert again.samples == 5
    twice = pack(tmp_path / "new", tmp_path / "twice", transcode=SMALL)
    assert not again.rejected[1:] and not twice.rejected, (again.rejected, twice.rejected)
    fingerprints = {name: load_index(tmp_path / name).fingerprint for name in ("new", "from shards", "twice")}
    assert len(set(fingerprints.values())) == 1, fingerprints
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from shards", "new", "plain", "staging", "twice"]
    corpus = load_source(tmp_path / "new")
    for number, key in enumerate(["s0", "s1", "s2", "two", "words"]):
        assert corpus.key(number) == key
        assert corpus.member(number, "json") == (staging / f"{key}.json").read_bytes()
    assert corpus.member(3, "0.png") == still(1)
    facts = corpus.index.sample(0).media["mp4"]
    assert (facts.frame_count, facts.width, facts.duration_s) == (4, 64, pytest.approx(2.0))
    assert probe_media(corpus.member(3, "1.avi")).container == "mp4"


def test_shards_at_a_url_are_packed_anew(tmp_path: Path):
    stage(tmp_path / "staging", "a", stream_json("a", 4, 2.0), mp4=moving_clip(24, shape=(64, 48)))
    pack(tmp_path / "staging", tmp_path / "plain")
    pack(tmp_path / "staging", tmp_path / "new", transcode=SMALL)
    with faulty_server() as server:
        server.files["/shard-000000.tar"] = (tmp_path / "plain" / "shard-000000.tar").read_bytes()
        server.fail("/shard-000000.tar", 503)
        store = ShardStore(str(tmp_path / "cache"), sleep=lambda seconds: None)
        source = f"{server.url}/shard-{{000000..000000}}.tar?sig=s3cr3t"
        pack(source, tmp_path / "from url", transcode=SMALL, workers=1, store=store)
        assert len(server.requests) == 2
    assert load_index(tmp_path / "from url").fingerprint == load_index(tmp_path / "new").fingerprint


KILLED = "from moss_train.cli import main; import sys; sys.exit(main(sys.argv[1:]))"


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, monkeypatch):
    staging = tmp_path / "staging"
    for number in range(6):
        stage(staging, f"s{number}", stream_json(f"s{number}", 4, 2.0), mp4=moving_clip(36 + number, shape=(240, 180)))
    config = TranscodeConfig(fps=12.0, size=240)
    arguments = ["data", "pack", f"source={staging}", f"out={tmp_path / 'out'}", "workers=1"]
    arguments += ["transcode.fps=12", "transcode.size=240"]
    with subprocess.Popen([sys.executable, "-c", KILLED, *arguments], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(done := list(tmp_path.glob("out.transcoded-*/*.json"))) < 2:
            assert time.monotonic() < deadline and process.poll() is None
        process.kill()
    (done[0].parent / "torn.mp4.1.partial").write_bytes(b"half a clip")
    assert not (tmp_path / "out").exists()
    calls = []
    real = transcoder.transcode_clip
    monkeypatch.setattr(transcoder, "transcode_clip", lambda *a: calls.append(a[1]) or real(*a))
    finished = pack(staging, tmp_path / "out", transcode=config)
    assert 1 <= len(calls) <= 4 and finished.samples == len(finished.transcoded.clips) == 6
    pack(staging, tmp_path / "at once", transcode=config)
    assert load_index(tmp_path / "out").fingerprint == load_index(tmp_path / "at once").fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["at once", "out", "staging"]


def test_a_changed_clip_or_setting_is_transcoded_again(tmp_path: Path, monkeypatch):
    staging, out = tmp_path / "staging", tmp_path / "out"
    stage(staging, "a", stream_json("a", 4, 2.0), mp4=moving_clip(24, shape=(64, 48)))
    stage(staging, "b", stream_json("b", 4, 2.0), mp4=moving_clip(24, shape=(64, 48))[:3000])
    calls = []
    real = transcoder.transcode_clip
    monkeypatch.setattr(transcoder, "transcode_clip", lambda *a: calls.append(a[1]) or real(*a))
    monkeypatch.setattr("moss_train.data.shards.pack.build_index", lambda *a, **k: 1 / 0)  # interrupted near the end

    def run(config: TranscodeConfig = SMALL) -> list[str]:
        calls.clear()
        with pytest.raises(ZeroDivisionError):
            pack(staging, out, transcode=config)
        return list(calls)

    assert run() == ["a", "b"]
    assert run() == []  # what was refused is not tried again either
    assert run(TranscodeConfig(fps=3.0, size=64)) == ["a", "b"]
    (staging / "a.mp4").write_bytes(moving_clip(30, shape=(64, 48)))
    assert run() == ["a"]
    monkeypatch.undo()
    pack(staging, out, transcode=SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "staging"]


def test_the_command_says_what_became_of_the_clips(tmp_path: Path, capsys):
    staging = mixed_staging(tmp_path / "staging")
    late = stream_json("late", 4, 2.0)
    late["sampling"]["start_s"] = late["events"][0]["t"] = 0.3
    stage(staging, "late", late, mp4=moving_clip(30, shape=(64, 48)))
    options = PackOptions(str(staging), str(tmp_path / "out"), workers=1, transcode=SMALL)
    options.validate()
    assert pack_command(options) == 0
    said = capsys.readouterr().out
    assert "transcoded 5 clips to 2 pictures a second of 64 pixels, a keyframe every 8 (h264, crf 20)" in said
    assert "pictures     117 → 23" in said and "PSNR mean" in said and "worst clip" in said and "MB" in said
    assert "CPU-seconds for the pictures at 2 a second" in said
    assert "left out     the samples of 1 clip that cannot be decoded" in said
    assert "off beat     1 sample with frames off k / 2 s" in said
    assert "left out broken: mp4: " in said and "packed 6 samples" in said
    reason = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())
    assert reason["key"] == "broken" and reason["reason"].startswith("mp4: ")


def test_a_process_that_takes_too_long_costs_its_clip(tmp_path: Path):
    stage(tmp_path / "staging", "a", stream_json("a", 4, 2.0), mp4=moving_clip(24, shape=(64, 48)))
    hasty = TranscodeConfig(fps=2.0, size=64, timeout_s=0.001)
    with pytest.raises(DataError, match="no sample that can be packed .*transcoding took longer than 0.001 s"):
        pack(tmp_path / "staging", tmp_path / "out", transcode=hasty, workers=1)
    assert pack(tmp_path / "staging", tmp_path / "out", transcode=SMALL).samples == 1  # not held against it


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 300}, "transcode.size is set, but transcode.fps"),
        ({"fps": 0.0}, "transcode.fps=0.0 must lie in"),
        ({"fps": 2.0, "size": 447}, "must be even"),
        ({"fps": 2.0, "keyframe_gap": 0}, "keyframe_gap=0 must lie in 1 … 1000"),
        ({"fps": 2.0, "codec": "vp9"}, "'vp9' is not one of h264, mjpeg"),
        ({"fps": float("nan")}, "transcode.fps=nan"),
    ],
)
def test_illegal_settings(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        PackOptions("a", "b", transcode=TranscodeConfig(**settings)).validate()


@pytest.mark.parametrize("name", ["1.mp4", "2.avi", "3.mp4"])
def test_real_clips(name: str):
    old = (shared_folder() / "real_data" / "videos" / name).read_bytes()
    new, figures = transcode_clip(old, name, TranscodeConfig(fps=2.0))
    times = moments(probe_media(old), 2.0)
    before, after = (decode_arrays(clip, times, 448, "pyav") for clip in (old, new))
    np.testing.assert_allclose(before.times_s, after.times_s, rtol=0, atol=1e-9)
    assert figures.worst_psnr_db > 36 and figures.bytes_after < figures.bytes_before
    assert min(psnr(one, other) for one, other in zip(before.frames, after.frames, strict=True)) > 36
