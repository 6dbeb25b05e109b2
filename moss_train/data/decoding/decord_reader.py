"""Pictures by decord, which is right only on files that pass its guards.

It returns wrong pictures without a word

* when time stamps are missing (H.264 in AVI) or the file is cut by an edit list: its stamps show it;
* when it skips to a keyframe that is not shown in the place in which it is stored (open GOPs, the default of x265;
  MPEG-4 and intra-refresh H.264 with B-frames), since it counts frames from keyframes: the packets show it, the
  stamps do not;
* when a picture is damaged: it is concealed, and nothing tells.
"""

import importlib.util
import io
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

import numpy as np

from moss_train.data.decoding.pictures import (
    DecodedArrays,
    DecodeLimits,
    Suspicious,
    fitted_size,
    frame_indices,
    in_order,
    tiled,
)
from moss_train.data.decoding.probe import MediaProbe, check_pixels
from moss_train.errors import ConfigError

#: decord needs 30 s of retries on transport streams before it gives up, so it never sees other containers.
CONTAINERS = ("mp4", "avi", "matroska")


@cache
def has_decord() -> bool:
    """Whether decord is installed: there is no wheel of it for aarch64."""
    return importlib.util.find_spec("decord") is not None


def why_not_decord(facts: MediaProbe) -> str:
    """Empty when decord may be tried."""
    if facts.container not in CONTAINERS:
        return f"decord: not used on {facts.container}"
    if not facts.pts_ok:
        return "decord: the packets lack proper time stamps"
    if not facts.gops_closed:
        return "decord: the file has open GOPs"
    return ""


def read_decord(
    data: bytes, times_s: Sequence[float], size: int | None, key: str, facts: MediaProbe, limits: DecodeLimits
) -> DecodedArrays:
    """The pictures on screen at `times_s`; raises Suspicious, ConfigError without decord, and whatever decord raises
    (RuntimeError, DECORDError and AssertionError alike)."""
    # Loaded first, decord's libraries take the place of some of PyAV's: its VP8 and VP9 encoders then fail to start.
    with suppress(ImportError):
        import av  # noqa: F401
    try:
        import decord
    except ImportError as error:
        raise ConfigError("data.decoder=decord, but decord is not installed: use data.decoder=auto") from error

    # Its FFmpeg reports every damaged macroblock on standard error; what matters reaches us as an exception.
    decord.logging.set_level(decord.logging.QUIET)
    check_pixels(facts.width, facts.height, limits.max_pixels, key)
    target = {}
    if size is not None:
        target["width"], target["height"] = fitted_size(facts.width, facts.height, size)
    else:
        limits.check_native(len(times_s), facts.width, facts.height, key)
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
    return DecodedArrays(in_order(tiled(pictures, size), back), "decord", stamps[wanted][back])


def _check_stamps(stamps_s: np.ndarray, frame_count: int) -> None:
    """Raise Suspicious unless the time stamps are those of a file that decord reads rightly."""
    if len(stamps_s) != frame_count or frame_count == 0:
        raise Suspicious(f"{len(stamps_s)} frames where the file holds {frame_count}")
    if not np.isfinite(stamps_s).all() or np.abs(stamps_s).max() >= 1e6:
        raise Suspicious("time stamps are missing")
    if (np.diff(stamps_s) <= 0).any():
        raise Suspicious("time stamps do not increase")
    if stamps_s[0] < -0.001:
        raise Suspicious(f"time stamps start at {stamps_s[0]:.3f} s (an edit list)")
