"""Frames as small JPEG pictures inside a page, within a budget of bytes.

Shape suffixes: F frames, C colour channels, H, W pixels.
"""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

#: longer side in pixels, JPEG quality; the first that fits the budget is taken
_LADDER = ((128, 78), (112, 70), (96, 62), (80, 55), (64, 48), (48, 40), (32, 30))


def without_padding(frames_FCHW: np.ndarray) -> np.ndarray:
    """The frames without the rows below and the columns on the right that are black in all of them: pictures that are
    not square come in a square tile."""
    if not frames_FCHW.size:
        return frames_FCHW
    seen_HW = frames_FCHW.any(axis=(0, 1))
    height, width = (int(np.flatnonzero(seen_HW.any(axis=axis))[-1]) + 1 if seen_HW.any() else 1 for axis in (1, 0))
    return frames_FCHW[:, :, :height, :width]


def thumbnails(frames_FCHW: np.ndarray, wanted: Sequence[int], budget_bytes: int) -> dict[int, str]:
    """`data:` addresses of the wanted frames, uint8 RGB [F, 3, H, W], together at most `budget_bytes` long.

    Small pictures are not enlarged. Where even the smallest and coarsest do not fit, every second one is left out, and
    so on.
    """
    wanted = [frame for frame in wanted if 0 <= frame < len(frames_FCHW)]
    while wanted:
        for side, quality in _LADDER:
            pictures, length = {}, 0
            for frame in wanted:
                pictures[frame] = _address(frames_FCHW[frame], side, quality)
                length += len(pictures[frame])
                if length > budget_bytes:
                    break
            else:
                return pictures
        wanted = wanted[::2] if len(wanted) > 1 else []
    return {}


def _address(frame_CHW: np.ndarray, side: int, quality: int) -> str:
    image = Image.fromarray(np.ascontiguousarray(frame_CHW.transpose(1, 2, 0)))
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    # 4:4:4 below 100 pixels: with halved colours a small coloured thing is grey
    image.save(data, "JPEG", quality=quality, subsampling=0 if max(image.size) < 100 else 2, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
