"""What is known of a medium before any pixel is decoded, and which of its pictures a sample shows.

Formulas of the offline sampling: `_sample_indices` of the reference's multimodal plug-in
(OpenMOSS/MOSS-Video-Preview, `src/LF/data/mm_plugin.py`, lines 99-139).
"""

import math
from dataclasses import dataclass

import numpy as np

VIDEO_EXTENSIONS = ("mp4", "avi", "webm", "mkv", "mov")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

#: what stands in a text where a medium is shown, by kind of medium
PLACEHOLDERS = {"video": "<|video|>", "image": "<|image|>"}

#: times closer than this (seconds) are the same moment: absorbs the rounding of k / fps
SAME_MOMENT_S = 1e-6


@dataclass(frozen=True)
class MediaInfo:
    """Container facts of one medium. A still has `duration_s = 0.0` and neither rate nor count."""

    duration_s: float  #: seconds
    frame_rate: float | None = None  #: native frames a second; None when unknown
    frame_count: int | None = None  #: frames the container reports; None when unknown

    def countable_frames(self) -> int | None:
        """Frames that certainly exist: the smallest positive of the reported and the computed count, or None."""
        counts = [self.frame_count] if self.frame_count else []
        if self.frame_rate:
            counts.append(round(self.duration_s * self.frame_rate))
        counts = [count for count in counts if count > 0]
        return min(counts) if counts else None


def offline_frame_times(
    info: MediaInfo,
    fps: float | None,
    min_frames: int,
    max_frames: int,
    start_s: float = 0.0,
    end_s: float | None = None,
) -> list[float]:
    """Times (seconds of the medium's own clock) of the frames an offline sample shows, ascending.

    n = min(max(ceil(duration * fps), min_frames), max_frames, total); the frames are `int(i * rate / fps)`
    when n is what fps asks for and `linspace(0, total - 1, n)` otherwise, each given as index / rate. With
    `fps = None` n is min(max_frames, total), spread the latter way. With `start_s`/`end_s` the same holds for that
    part of the video. Without a known frame rate the same spacing is applied to time itself. The list is empty
    when the part holds no frame.
    """
    end_s = info.duration_s if end_s is None else min(end_s, info.duration_s)
    duration_s = end_s - start_s
    if duration_s <= 0:
        return []
    target = None if fps is None else math.ceil(duration_s * fps - 1e-6)
    wanted = max_frames if target is None else min(max(target, min_frames), max_frames)
    rate, total = info.frame_rate, info.countable_frames()
    if not rate:
        count = min(wanted, total) if total else wanted
        step_s = 1.0 / fps if fps is not None and count == target else duration_s / count
        return [start_s + index * step_s for index in range(count)]
    first = round(start_s * rate)
    total = max(1, round(duration_s * rate)) if total is None else min(total - first, max(1, round(duration_s * rate)))
    count = min(wanted, total)
    if count <= 0:
        return []
    if fps is not None and count == target:
        indices = [min(int(index * rate / fps), total - 1) for index in range(count)]
    else:
        indices = np.linspace(0, total - 1, count).astype(int).tolist()
    return [(first + index) / rate for index in indices]


def stream_frame_count(fps: float, start_s: float, end_s: float) -> int:
    """How many frames a stream has; at least one."""
    return max(1, math.ceil((end_s - start_s - SAME_MOMENT_S) * fps))


def stream_frame_times(fps: float, start_s: float, end_s: float) -> list[float]:
    """Arrival times of frames at a fixed rate: start_s + k / fps while < end_s."""
    return [start_s + index / fps for index in range(stream_frame_count(fps, start_s, end_s))]
