"""Every sampled picture of every real video is the one that a sequential PyAV decode shows at that time.

What holds, measured: at native size both readers give bit-identical pictures (same FFmpeg colour conversion), so the
comparison there is exact. At the model's size the readers scale through different FFmpeg releases; there the picture
must be nearer to the asked one than to every other picture of the video that differs from it.
"""

import bisect
import io
from functools import lru_cache

import numpy as np
import pytest
from shared_data import shared_folder

from moss_train.data.decoding.decode import decode_arrays
from moss_train.data.decoding.probe import probe_media
from moss_train.streams.media import MediaInfo, offline_frame_times, stream_frame_times

VIDEOS = ["1.mp4", "2.avi", "3.mp4", "v-5sRwJNR8U.mp4"]
SIZE = 64


@lru_cache
def load(name: str) -> bytes:
    return (shared_folder() / "real_data" / "videos" / name).read_bytes()


@lru_cache
def sampled_times(name: str) -> tuple[float, ...]:
    """Offline sampling at the reference's rates, evenly spaced sampling, real-time ticks, and odd moments."""
    facts = probe_media(load(name))
    info = MediaInfo(facts.duration_s, facts.frame_rate, facts.frame_count)
    times = set(stream_frame_times(1.0, 0.0, facts.duration_s))
    for fps, least, most in ((1.0, 8, 256), (2.0, 8, 256), (4.0, 1, 16), (facts.frame_rate, 1, 24)):
        times.update(offline_frame_times(info, fps, least, most))
    times.update(np.random.default_rng(0).uniform(0, facts.duration_s, 12).tolist())
    return tuple(sorted(times))


def sequential(name: str, convert) -> tuple[list[float], list]:
    """Times from the first picture, and `convert(frame, number)` of every picture, by one plain pass of PyAV."""
    import av

    times, results = [], []
    with av.open(io.BytesIO(load(name))) as opened:
        for number, frame in enumerate(opened.decode(video=0)):
            times.append(frame.time)
            results.append(convert(frame, number))
    assert times == sorted(set(times)), "PyAV's own times must increase, or they say nothing"
    return [time - times[0] for time in times], results


@pytest.mark.parametrize("decoder", ["auto", "decord"])
@pytest.mark.parametrize("name", VIDEOS)
def test_native_pictures_equal_the_sequential_decode(name: str, decoder: str):
    asked = sampled_times(name)
    decoded = decode_arrays(load(name), asked, None, decoder)
    assert decoded.backend == ("pyav" if name.endswith(".avi") else "decord") or decoder == "auto"
    times, _ = sequential(name, lambda frame, number: None)
    numbers = [bisect.bisect_right(times, time + 1e-6) - 1 for time in asked]
    np.testing.assert_allclose(decoded.times_s, [times[number] for number in numbers], atol=1e-5)
    wanted: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        wanted.setdefault(number, []).append(place)

    def compare(frame, number: int) -> None:
        if number in wanted:
            truth = frame.to_ndarray(format="rgb24").transpose(2, 0, 1)
            for place in wanted.pop(number):
                assert np.array_equal(decoded.frames[place], truth), (name, asked[place])

    sequential(name, compare)
    assert not wanted


@pytest.mark.parametrize("name", VIDEOS)
def test_few_pictures_equal_those_of_the_whole(name: str):
    """What is skipped for a few pictures changes none of them, at any size."""
    asked = sampled_times(name)
    facts = probe_media(load(name))
    everything = decode_arrays(load(name), asked, SIZE, facts=facts)
    draw = np.random.default_rng(1)
    for count in (1, 1, 2, 3, 5, 8):
        places = draw.choice(len(asked), count, replace=False)
        few = decode_arrays(load(name), [asked[place] for place in places], SIZE, facts=facts)
        assert np.array_equal(few.frames, everything.frames[places])
        assert np.array_equal(few.times_s, everything.times_s[places])


@pytest.mark.parametrize("name", VIDEOS)
def test_scaled_pictures_are_nearest_to_the_asked_one(name: str):
    asked = sampled_times(name)
    facts = probe_media(load(name))
    times, _ = sequential(name, lambda frame, number: None)
    everything = decode_arrays(load(name), times, SIZE, "pyav", facts=facts)
    np.testing.assert_allclose(everything.times_s, times, atol=1e-6)
    pictures = everything.frames.reshape(len(times), -1).astype(np.float32)
    decoded = decode_arrays(load(name), asked, SIZE, "decord", facts=facts)
    for picture, time in zip(decoded.frames.reshape(len(asked), -1).astype(np.float32), asked, strict=True):
        number = bisect.bisect_right(times, time + 1e-6) - 1
        distance = np.abs(pictures - picture).mean(axis=1)
        twins = np.abs(pictures - pictures[number]).mean(axis=1) < 0.1
        assert distance[number] < 0.2, (name, time)
        assert twins[int(distance.argmin())], (name, time, number, int(distance.argmin()))


def test_plain_decord_is_wrong_on_the_avi():
    """Why the guard exists; should a newer decord read this file rightly, it may go."""
    decord = pytest.importorskip("decord")
    truth = decode_arrays(load("2.avi"), [n / (359 / 12) for n in (0, 54, 108, 200)], None, "pyav").frames
    reader = decord.VideoReader(io.BytesIO(load("2.avi")), num_threads=1)
    plain = reader.get_batch([0, 54, 108, 200]).asnumpy().transpose(0, 3, 1, 2)
    del reader
    assert np.array_equal(plain[0], truth[0]) and not np.array_equal(plain[1:], truth[1:])


def test_real_stills():
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        data = (shared_folder() / "real_data" / "images" / name).read_bytes()
        tile = decode_arrays(data, [0.0], SIZE).frames
        assert tile.shape == (1, 3, SIZE, SIZE) and tile.std() > 10
