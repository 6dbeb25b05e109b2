"""Clips that cost what real ones cost to decode: texture, a moving camera, moving things, sensor noise, cuts.

Encoded as most clips of the web are: H.264, x264's preset `medium`, B-frames, a keyframe every 250 pictures or at a
cut.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

RATE = 25  #: pictures a second
_NOISES = 8  #: different pictures of noise, used in turn


@dataclass(frozen=True)
class ClipSpec:
    """One clip, by what it is made of."""

    seconds: float
    width: int
    height: int
    seed: int
    rate: int = RATE
    gop: int = 250
    preset: str = "medium"

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height}-{self.seconds:g}s-{self.rate}fps-gop{self.gop}-{self.preset}-{self.seed}"

    @property
    def frames(self) -> int:
        return round(self.seconds * self.rate)


def encode_clip(spec: ClipSpec) -> bytes:
    """The clip as an MP4."""
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as muxer:
        stream = muxer.add_stream("libx264", rate=spec.rate)
        stream.width, stream.height, stream.pix_fmt = spec.width, spec.height, "yuv420p"
        stream.codec_context.gop_size = spec.gop
        stream.options = {"preset": spec.preset, "crf": "23"}
        for picture in pictures(spec):
            muxer.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        muxer.mux(stream.encode())
    return out.getvalue()


def repeated(clip: bytes, times: int) -> bytes:
    """The clip `times` over, as a clip: its packets again, later."""
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as muxer, av.open(io.BytesIO(clip)) as whole:
        stream = muxer.add_stream_from_template(whole.streams.video[0])
        length = whole.streams.video[0].duration
        for number in range(times):
            with av.open(io.BytesIO(clip)) as again:
                for packet in again.demux(video=0):
                    if packet.size:
                        packet.pts, packet.dts = packet.pts + number * length, packet.dts + number * length
                        packet.stream = stream
                        muxer.mux(packet)
    return out.getvalue()


def pictures(spec: ClipSpec) -> Iterator[np.ndarray]:
    """uint8 [height, width, 3], one after the other; a new scene every 12 to 40 seconds."""
    rng = np.random.default_rng(spec.seed)
    noises = [rng.normal(0, 1.2, (spec.height, spec.width, 1)) for _ in range(_NOISES)]
    noises = [np.round(noise).astype(np.int16) for noise in noises]
    left = spec.frames
    while left > 0:
        length = min(left, round(float(rng.uniform(12, 40)) * spec.rate))
        yield from _scene(spec, rng, noises, length)
        left -= length


def still_picture(seed: int, width: int, height: int) -> bytes:
    """A JPEG of the same texture."""
    out = io.BytesIO()
    texture = _texture(np.random.default_rng(seed), height, width)
    Image.fromarray(np.clip(texture, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=88)
    return out.getvalue()


def _scene(spec: ClipSpec, rng: np.random.Generator, noises: list[np.ndarray], length: int) -> Iterator[np.ndarray]:
    height, width = spec.height, spec.width
    room = max(16, width // 4)
    background = _texture(rng, height + room, width + room)
    things = []
    for _ in range(3):
        h, w = (int(side * rng.uniform(0.12, 0.3)) for side in (height, width))
        y, x = np.mgrid[:h, :w]
        inside = ((y / h - 0.5) ** 2 + (x / w - 0.5) ** 2) < 0.25
        things.append((_texture(rng, h, w), inside, rng.uniform(0, 6.28, 2), rng.uniform(0.02, 0.15, 2)))
    drift, phase = rng.uniform(0.004, 0.02, 2), rng.uniform(0, 6.28, 2)
    for number in range(length):
        top, start = (int((1 + np.sin(phase[a] + drift[a] * number)) / 2 * room) for a in range(2))
        picture = background[top : top + height, start : start + width].copy()
        for texture, inside, begin, speed in things:
            h, w = inside.shape
            y = int((1 + np.sin(begin[0] + speed[0] * number)) / 2 * (height - h))
            x = int((1 + np.sin(begin[1] + speed[1] * number)) / 2 * (width - w))
            picture[y : y + h, x : x + w][inside] = texture[inside]
        yield np.clip(picture + noises[number % _NOISES], 0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """int16 [height, width, 3]: noise at all scales, the coarse ones strongest, as in photographs."""
    total = np.full((height, width, 3), 128.0)
    for scale in (2, 4, 8, 16, 32, 64, 128):
        coarse = (height // scale + 2, width // scale + 2)
        # Mostly light and shade, as little colour as most scenes have.
        small = rng.normal(0, 4.5 * np.log2(scale), (*coarse, 1)) + rng.normal(0, np.log2(scale), (*coarse, 3))
        parts = [Image.fromarray(small[..., c].astype(np.float32)) for c in range(3)]
        grown = [np.asarray(part.resize((width, height), Image.Resampling.BICUBIC)) for part in parts]
        total += np.stack(grown, axis=2)
    return total.astype(np.int16)
