"""Pictures that are played to a live model: a folder of stills, a camera, a network stream.

Shape suffixes: F frames, H, W pixels, C colour channels.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moss_train.data.decoding.pictures import DecodeLimits
from moss_train.data.decoding.stills import read_still
from moss_train.errors import ConfigError, DataError
from moss_train.redact import covered

_STILLS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_URL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_CAMERA = re.compile(r"/dev/video\d+")


def is_endless(source: str) -> bool:
    """Whether a source has no known length: a URL (`rtsp://…`, `http://…`, `file:…`) or a camera (`/dev/video0`)."""
    return _URL.match(source) is not None or _CAMERA.fullmatch(source) is not None


def folder_pictures(folder: Path, size: int) -> torch.Tensor:
    """All stills of a folder in the order of their names, uint8 [F, 3, size, size], as training would have shown them.

    Raises ConfigError when there is none, SampleError when one does not decode.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _STILLS)
    if not paths:
        raise ConfigError(f"video={folder}: the folder holds no picture ({', '.join(_STILLS)})")
    limits = DecodeLimits()
    stills = [read_still(path.read_bytes(), 1, size, path.name, limits).frames[0] for path in paths]
    return torch.from_numpy(np.stack(stills))


def endless_pictures(source: str, fps: float, max_seconds: float) -> Iterator[tuple[float, np.ndarray]]:
    """Seconds since the first picture and uint8 RGB [H, W, 3], the first picture at or after every 1 / fps seconds. The
    source is opened at once.

    Raises ConfigError when the source cannot be opened or has no video, and when PyAV is missing; DataError when it
    breaks off. No message holds the user and password of an address.
    """
    try:
        import av
    except ImportError as error:
        raise ConfigError("reading a camera or a URL needs PyAV: install moss_train[video]") from error
    camera = _CAMERA.fullmatch(source) is not None
    try:
        opened = av.open(source, format="v4l2" if camera else None, timeout=None if camera else 10.0)
    except (av.FFmpegError, ValueError, OSError) as error:
        raise ConfigError(f"video={covered(source)}: cannot be opened: {covered(str(error))}") from None
    if not opened.streams.video:
        opened.close()
        raise ConfigError(f"video={covered(source)}: has no video")
    return _until_it_breaks(_pictures(opened, fps, max_seconds), covered(source))


def _until_it_breaks(pictures: Iterator[tuple[float, np.ndarray]], name: str) -> Iterator[tuple[float, np.ndarray]]:
    import av

    try:
        yield from pictures
    except av.FFmpegError as error:
        raise DataError(f"video={name}: broke off: {covered(str(error))}") from None


def _pictures(opened: Any, fps: float, max_seconds: float) -> Iterator[tuple[float, np.ndarray]]:
    with opened:
        stream = opened.streams.video[0]
        rate = float(stream.average_rate or 25)
        began_s, due_s = None, 0.0
        for number, frame in enumerate(opened.decode(stream)):
            stamp_s = number / rate if frame.time is None else frame.time
            began_s = stamp_s if began_s is None else began_s
            time_s = stamp_s - began_s
            if time_s >= max_seconds:
                return
            if time_s + 1e-6 >= due_s:
                yield time_s, frame.to_ndarray(format="rgb24")
                due_s = max(due_s + 1 / fps, time_s)
