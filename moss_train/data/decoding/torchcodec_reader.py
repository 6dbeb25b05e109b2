"""Pictures by torchcodec, where it is installed and finds the FFmpeg libraries of the system."""

from collections.abc import Sequence

import numpy as np

from moss_train.data.decoding.pictures import (
    DecodedArrays,
    DecodeLimits,
    Suspicious,
    fitted_size,
    in_order,
    slack,
    tiled,
)
from moss_train.data.decoding.probe import MediaProbe, check_pixels
from moss_train.errors import ConfigError

#: on AVI it has no time stamps to go by, and transport streams it does not open
CONTAINERS = ("mp4", "matroska")


def why_not_torchcodec(facts: MediaProbe) -> str:
    """Empty when torchcodec may be tried."""
    if facts.container not in CONTAINERS:
        return f"torchcodec: not used on {facts.container}"
    if not facts.by_packets:
        return "torchcodec: the packets do not tell the pictures"
    if not facts.gops_closed:
        return "torchcodec: the file has open GOPs"
    if facts.rotation:
        return "torchcodec: the picture is turned"
    return ""


def read_torchcodec(
    data: bytes, times_s: Sequence[float], size: int | None, key: str, facts: MediaProbe, limits: DecodeLimits
) -> DecodedArrays:
    """The pictures on screen at `times_s`; raises Suspicious, ConfigError without torchcodec, and whatever torchcodec
    raises (RuntimeError, ValueError and IndexError)."""
    try:
        from torchcodec.decoders import VideoDecoder
        from torchcodec.transforms import Resize
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError where its libraries are missing
        raise ConfigError(
            "data.decoder=torchcodec, but torchcodec cannot be imported "
            f"({type(error).__name__}): install moss_train[torchcodec] and FFmpeg's libraries, or use data.decoder=auto"
        ) from error
    check_pixels(facts.width, facts.height, limits.max_pixels, key)
    transforms = None
    if size is not None:
        width, height = fitted_size(facts.width, facts.height, size)
        transforms = [Resize((height, width))]
    else:
        limits.check_native(len(times_s), facts.width, facts.height, key)
    decoder = VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact", transforms=transforms)
    about = decoder.metadata
    if about.num_frames != facts.frame_count:
        raise Suspicious(f"{about.num_frames} frames where the file holds {facts.frame_count}")
    begin, end = about.begin_stream_seconds, about.end_stream_seconds
    asked, back = np.unique(np.asarray(times_s, np.float64), return_inverse=True)
    moments = np.maximum(begin + asked + slack(asked), begin)
    # From `end` on, which where durations are missing is the last picture's own time, no moment is accepted.
    early = moments[moments < end].tolist()
    batches = [decoder.get_frames_played_at(early)] if early else []
    if len(early) < len(moments):
        batches.append(decoder.get_frames_at([about.num_frames - 1] * (len(moments) - len(early))))
    pictures = np.concatenate([batch.data.numpy() for batch in batches])
    stamps = np.concatenate([batch.pts_seconds.numpy() for batch in batches]) - begin
    return DecodedArrays(in_order(tiled(pictures, size), back), "torchcodec", stamps[back])
