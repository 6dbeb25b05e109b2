"""Folders, URLs and cameras as sources of a live stream."""

import traceback

import numpy as np
import pytest
import torch
from PIL import Image

from moss_train.data.decoding.decode import decode_frames
from moss_train.data.live_sources import endless_pictures, folder_pictures, is_endless
from moss_train.errors import ConfigError


def test_what_has_no_end():
    for source in ("rtsp://host/stream", "http://host/a.m3u8", "file:/clips/a.mp4", "/dev/video0"):
        assert is_endless(source)
    for source in ("clip.mp4", "/clips/a.mp4", "folder", "/dev/null"):
        assert not is_endless(source)


def test_a_folder_is_shown_in_the_order_of_names(tmp_path):
    for number in (2, 0, 1):
        Image.new("RGB", (20, 10), (50 * number, 0, 0)).save(tmp_path / f"{number:03}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    frames = folder_pictures(tmp_path, 16)
    assert frames.shape == (3, 3, 16, 16) and frames.dtype == torch.uint8
    assert frames[:, 0, 0, 0].tolist() == [0, 50, 100] and not frames[:, :, 8:].any()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="holds no picture"):
        folder_pictures(empty, 16)


def test_a_url_gives_its_pictures_at_the_asked_rate(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=10, width=64, height=48, pix_fmt="yuv420p")
        for number in range(35):
            shade = np.full((48, 64, 3), 7 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(stream.encode())
    got = list(endless_pictures(f"file:{path}", 2.0, 3.0))
    assert [time_s for time_s, _ in got] == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    expected = decode_frames(path.read_bytes(), [time_s for time_s, _ in got], None).frames
    for (_, picture), frame in zip(got, expected, strict=True):
        assert abs(picture.transpose(2, 0, 1).astype(int) - frame.numpy()).max() <= 3
    with pytest.raises(ConfigError, match="cannot be opened"):
        endless_pictures(f"file:{tmp_path}/none.mp4", 1.0, 1.0)


def test_the_password_of_an_address_is_in_no_message():
    pytest.importorskip("av")
    for source in ("rtsp://admin:geheim@127.0.0.1:9/live", "http://admin:geheim@127.0.0.1:9/a.m3u8"):
        with pytest.raises(ConfigError, match="cannot be opened") as raised:
            endless_pictures(source, 1.0, 1.0)
        told = "".join(traceback.format_exception(raised.value))
        assert "127.0.0.1:9" in str(raised.value) and "geheim" not in told
