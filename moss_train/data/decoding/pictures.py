"""What every reader deals in: pictures at asked times, how they lie in their tiles, and the bounds on a request."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moss_train.errors import SampleError


@dataclass(frozen=True)
class DecodeLimits:
    """Bounds on one request, against hostile or broken input."""

    max_pixels: int = 40_000_000  #: of one picture
    max_frames: int = 4096  #: of one request
    max_seconds: float = 43_200.0  #: of one medium
    max_bytes: int = 1 << 32  #: of the file, and of the pictures of one request

    def allow(self, frames: int, size: int | None) -> bool:
        """Whether one request may ask for so many pictures of `size`; native sizes are checked when they are known."""
        return frames <= self.max_frames and frames * 3 * (size or 1) ** 2 <= self.max_bytes

    def check_request(self, times_s: Sequence[float], size: int | None, key: str) -> None:
        """Raise SampleError for more pictures than are allowed, or times that are not finite."""
        if len(times_s) > self.max_frames:
            raise SampleError(key, f"{len(times_s)} frames asked of one medium, the limit is {self.max_frames}")
        if not self.allow(len(times_s), size):
            raise SampleError(
                key, f"{len(times_s)} frames of {size}×{size} pixels are over the limit of {self.max_bytes} bytes"
            )
        if not all(math.isfinite(time) for time in times_s):
            raise SampleError(key, "a frame is asked at a time that is not finite")

    def check_native(self, frames: int, width: int, height: int, key: str) -> None:
        """Raise SampleError when pictures of their own size take more bytes than are allowed."""
        if frames * 3 * width * height > self.max_bytes:
            raise SampleError(
                key, f"{frames} frames of {width}×{height} pixels are over the limit of {self.max_bytes} bytes"
            )


@dataclass(frozen=True)
class DecodedArrays:
    """F pictures as numpy, in the order of the requests."""

    frames: np.ndarray  #: uint8 RGB [F, 3, S, S], or [F, 3, H, W] at native size
    backend: str  #: "pyav", "decord", "torchcodec" or "pillow"
    times_s: np.ndarray  #: float64 [F], time stamps of the pictures, from the first picture's
    note: str = ""  #: why the asked reader was passed over, if it was


class Suspicious(Exception):
    """A reader opened the file, but what it says of it shows that its pictures cannot be trusted."""


def fitted_size(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) that fit a S×S tile with the aspect kept: the longer side becomes S, the other is floored.

    The arithmetic is that of Hugging Face's Mllama image processor (`get_image_size_fit_to_canvas`, one tile).
    """
    scale_w, scale_h = size / width, size / height
    if scale_w < scale_h:
        return size, min(math.floor(height * scale_w) or 1, size)
    return min(math.floor(width * scale_h) or 1, size), size


def frame_indices(stamps_s: np.ndarray, times_s: Sequence[float]) -> np.ndarray:
    """int64 [F]: for each asked time the last stamp at or before it (see `decode_frames`); stamps start at 0."""
    asked = np.asarray(times_s, np.float64)
    return np.maximum(np.searchsorted(stamps_s, asked + slack(asked), side="right") - 1, 0)


def slack(times_s: np.ndarray | float) -> np.ndarray | float:
    """Seconds by which a stamp may be late: 1 µs plus the rounding of a float32 stamp."""
    return 1e-6 + 1.2e-7 * np.abs(times_s)


def new_tiles(count: int, size: int) -> np.ndarray:
    """uint8 [F, 3, S, S], to be filled."""
    return _allocate((count, 3, size, size))


def allocate_with(allocate: Callable[[tuple[int, ...]], np.ndarray]) -> None:
    """Have every reader of this process put its tiles in arrays (uint8 of the given shape) that `allocate` makes."""
    global _allocate
    _allocate = allocate


def _allocate(shape: tuple[int, ...]) -> np.ndarray:
    return np.empty(shape, np.uint8)


def tiled(pictures: np.ndarray, size: int | None) -> np.ndarray:
    """[F, h, w, 3] → [F, 3, S, S] with zeros right and below; [F, 3, h, w] when `size` is None."""
    pictures = pictures.transpose(0, 3, 1, 2)
    if size is None:
        return np.ascontiguousarray(pictures)
    height, width = pictures.shape[2:]
    tile = new_tiles(len(pictures), size)
    tile[:, :, :height, :width] = pictures
    tile[:, :, height:] = 0
    tile[:, :, :height, width:] = 0
    return tile


def in_order(frames: np.ndarray, back: np.ndarray) -> np.ndarray:
    """frames[back], without a copy where nothing changes its place."""
    return frames if np.array_equal(back, np.arange(len(frames))) else frames[back]


def first_line(error: BaseException) -> str:
    """The message of an error without decord's stack traces."""
    return (str(error).strip().splitlines() or [""])[0][:200]
