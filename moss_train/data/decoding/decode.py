"""Pictures at asked times, by the reader that is right on the file and costs least.

`docs/decoding.md` tells what each reader gets wrong, how that is noticed, and what it costs.
Every reader converts and scales bilinearly in one go; at native size they are bit-identical, scaled they differ in
single levels. Pixel aspect ratios are ignored (by every reader measured), display rotation is applied.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from moss_train.data.decoding.decord_reader import has_decord, read_decord, why_not_decord
from moss_train.data.decoding.pictures import (
    DecodedArrays,
    DecodeLimits,
    Suspicious,
    first_line,
    fitted_size,
    frame_indices,
)
from moss_train.data.decoding.probe import MediaProbe, probe_media, sniff_container
from moss_train.data.decoding.pyav_reader import read_pyav
from moss_train.data.decoding.stills import read_still
from moss_train.data.decoding.torchcodec_reader import read_torchcodec, why_not_torchcodec
from moss_train.errors import ConfigError, SampleError

if TYPE_CHECKING:
    import torch

__all__ = [
    "DecodeLimits",
    "DecodedArrays",
    "DecodedFrames",
    "choose_reader",
    "decode_arrays",
    "decode_frames",
    "fitted_size",
    "frame_indices",
]


#: pixels of all pictures of a clip that takes some 30 ms to decode, whatever the reader: nothing is gained by skipping
SMALL_CLIP_PIXELS = 10_000_000


@dataclass(frozen=True)
class DecodedFrames:
    """F pictures as a tensor, in the order of the requests."""

    frames: "torch.Tensor"  #: uint8 RGB [F, 3, S, S], or [F, 3, H, W] at native size
    backend: str  #: "pyav", "decord", "torchcodec" or "pillow"
    times: np.ndarray  #: float64 [F], time stamps of the pictures, from the first picture's
    note: str = ""  #: why the asked reader was passed over, if it was


def choose_reader(decoder: str, facts: MediaProbe) -> str:
    """Which reader decodes a medium: "pillow", "pyav", "decord" or "torchcodec".

    It follows from the setting and the index's facts, so that every process that decodes a part of the frames takes the
    same one (where decord is installed on all of them or on none). "auto" is decord where it is known to be right and
    the whole clip is decoded in a moment, and PyAV elsewhere: it decodes only what asked pictures need, which on every
    larger file measured cost less, half as much where few are asked of a long clip. No reader gets files on which it is
    known to be wrong.
    """
    if facts.container == "image":
        return "pillow"
    if decoder == "auto":
        small = facts.frame_count * facts.width * facts.height <= SMALL_CLIP_PIXELS
        # On damaged AVI decord takes its process with it.
        decoder = "decord" if small and facts.container != "avi" and has_decord() else "pyav"
    return decoder if decoder in _READERS and not _GUARDS[decoder](facts) else "pyav"


def decode_frames(
    data: bytes,
    times_s: Sequence[float],
    size: int | None,
    decoder: str = "auto",
    key: str = "",
    facts: MediaProbe | None = None,
    limits: DecodeLimits | None = None,
) -> DecodedFrames:
    """The pictures on screen at `times_s` (seconds, any order, repeats allowed) of a video or still.

    The picture at time t is the last one whose time stamp, counted from the first picture's, is ≤ t + 1e-6
    (a hair more late in long clips, since decord's time stamps are float32); the first one before that, the last one
    after the end. `size` S: the longer side becomes S and zeros fill the tile on the right or below; None keeps the
    native size. `decoder`: "auto", "pyav", "decord" or "torchcodec". `facts` (from the index) saves looking at the
    file first. Raises SampleError when the medium cannot be decoded or is beyond the limits, ConfigError when the
    named decoder is not installed.
    """
    import torch  # here, so that the decoder processes, which use decode_arrays, start without it

    arrays = decode_arrays(data, times_s, size, decoder, key, facts, limits)
    return DecodedFrames(torch.from_numpy(arrays.frames), arrays.backend, arrays.times_s, arrays.note)


def decode_arrays(
    data: bytes,
    times_s: Sequence[float],
    size: int | None,
    decoder: str = "auto",
    key: str = "",
    facts: MediaProbe | None = None,
    limits: DecodeLimits | None = None,
) -> DecodedArrays:
    """`decode_frames` in numpy."""
    limits = limits or DecodeLimits()
    limits.check_request(times_s, size, key)
    if len(times_s) == 0:
        side = size or 1
        return DecodedArrays(np.zeros((0, 3, side, side), np.uint8), "none", np.zeros(0))
    if len(data) > limits.max_bytes:
        raise SampleError(key, f"a file of {len(data)} bytes is over the limit of {limits.max_bytes} bytes")
    if sniff_container(data, key) == "image":
        return read_still(data, len(times_s), size, key, limits)
    facts = facts or probe_media(data, key, limits.max_pixels)
    if facts.duration_s > limits.max_seconds:
        raise SampleError(key, f"a video of {facts.duration_s:g} s is over the limit of {limits.max_seconds:g} s")
    reader, note = choose_reader(decoder, facts), _why_not(decoder, facts)
    if reader != "pyav":
        try:
            return _READERS[reader](data, times_s, size, key, facts, limits)
        except (SampleError, ConfigError):
            raise
        except Suspicious as doubt:
            note = f"{reader}: {doubt}"
        except Exception as error:  # decord and torchcodec raise RuntimeError, AssertionError and their own alike
            note = f"{reader}: {type(error).__name__}: {first_line(error)}"
    try:
        return replace(read_pyav(data, times_s, size, key, facts, limits), note=note)
    except (SampleError, ConfigError):
        raise
    except Exception as error:  # PyAV raises FFmpegError, IndexError, ValueError and EOFError alike
        reason = f"video does not decode: {type(error).__name__}: {first_line(error)}"
        raise SampleError(key, f"{reason} ({note})" if note else reason) from error


def _why_not(decoder: str, facts: MediaProbe) -> str:
    """Why the named reader is passed over on a file; empty when it is not, or when it is PyAV."""
    return _GUARDS[decoder](facts) if decoder in _GUARDS else ""


_READERS = {"decord": read_decord, "torchcodec": read_torchcodec}
_GUARDS = {"decord": why_not_decord, "torchcodec": why_not_torchcodec}
