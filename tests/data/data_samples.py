"""Small clips, staging folders and packed sources for the tests of the data room.

Every picture of a clip carries its own number as eight black or white blocks, so a decoded picture says which one
it is, whatever the codec, the scaling or the rotation did to its levels.
"""

import io
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from moss_train.data.shards.pack import pack

BLOCK = 16  #: pixels of one block; 2 rows of 4 blocks make a picture of 64 × 32


def numbered_picture(number: int) -> np.ndarray:
    """uint8 [32, 64, 3]: bit b of `number` is block b, white for 1."""
    bits = np.array([(number >> bit) & 1 for bit in range(8)], np.uint8).reshape(2, 4)
    return np.repeat(np.kron(bits, np.ones((BLOCK, BLOCK), np.uint8))[..., None] * 255, 3, axis=2)


def read_number(picture: np.ndarray) -> int:
    """The number of an upright picture, uint8 [3, h, w] without padding."""
    height, width = picture.shape[1:]
    ys, xs = [height // 4, 3 * height // 4], [width * (2 * column + 1) // 8 for column in range(4)]
    bits = [int(picture[:, y, x].mean() > 127) for y in ys for x in xs]
    return sum(bit << place for place, bit in enumerate(bits))


def read_numbers(frames: np.ndarray, content_height: int | None = None) -> list[int]:
    """The numbers of frames [F, 3, S, S]; the content of a 2:1 picture is the upper half of its tile."""
    return [read_number(frame[:, : content_height or frame.shape[1]]) for frame in np.asarray(frames)]


def numbered_clip(
    count: int = 12,
    rate: int = 4,
    container: str = "mp4",
    codec: str = "libx264",
    gop: int = 5,
    ticks: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    first: int = 0,
) -> bytes:
    """An encoded clip of pictures first, first+1, …; `ticks` are their times in units of 1 / (100·rate) seconds."""
    import av

    out = io.BytesIO()
    tick = Fraction(1, 100 * rate) if ticks is not None else Fraction(1, rate)
    with av.open(out, "w", format=container) as muxer:
        stream = muxer.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 4 * BLOCK, 2 * BLOCK, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1  # the same pictures give the same bytes
        stream.codec_context.time_base = tick
        stream.options = options or {}
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(numbered_picture(first + number), format="rgb24")
            frame.time_base = tick
            frame.pts = ticks[number] if ticks is not None else number
            muxer.mux(stream.encode(frame))
        muxer.mux(stream.encode())
    return out.getvalue()


def broken_from(clip: bytes, packet: int) -> bytes:
    """The clip with the payload of its packets overwritten from number `packet` on."""
    import av

    data = bytearray(clip)
    with av.open(io.BytesIO(clip)) as opened:
        places = [(entry.pos, entry.size) for entry in opened.demux(video=0) if entry.size]
    for start, size in places[packet:]:
        data[start : start + size] = bytes(size)
    return bytes(data)


def still(number: int, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(numbered_picture(number)).save(out, form)
    return out.getvalue()


def stream_json(key: str, frames: int = 12, fps: float = 4.0, text: str = "red") -> dict:
    """A stream sample with a question and an answer over the first `frames` pictures of a clip."""
    end = frames / fps
    return {
        "schema": "moss_train/stream@1",
        "id": key,
        "media": [{"id": "v0", "kind": "video", "member": "mp4"}],
        "sampling": {"fps": fps, "start_s": 0.0, "end_s": end},
        "events": [
            {"id": "q", "t": 0.0, "role": "user", "text": "Which colour?"},
            {"id": "a", "t": end / 2, "role": "assistant", "kind": "speak", "text": text, "reply_to": "q"},
        ],
    }


def caption_json(key: str, member: str | None = "png", text: str = "a picture") -> dict:
    """A caption of one still, of one video, or (member None) text alone."""
    kind = "video" if member in ("mp4", "avi") else "image"
    media = [{"id": "m0", "kind": kind, "member": member}] if member else []
    return {"schema": "moss_train/caption@1", "id": key, "media": media, "text": text}


def stage(folder: Path, key: str, sample: dict | bytes, **members: bytes) -> None:
    """Write one sample to a staging folder; the keyword `_0_mp4` stands for the member `0.mp4`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = sample if isinstance(sample, bytes) else json.dumps(sample).encode()
    (folder / f"{key}.json").write_bytes(text)
    for member, data in members.items():
        (folder / f"{key}.{member.strip('_').replace('_', '.')}").write_bytes(data)


def stage_streams(folder: Path, count: int, prefix: str = "s", frames: int = 6) -> None:
    """`count` stream samples whose clips differ by the number of their first picture."""
    for number in range(count):
        key = f"{prefix}{number:03d}"
        text = " ".join(["red"] * (1 + number % 5))
        stage(folder, key, stream_json(key, frames, text=text), mp4=numbered_clip(frames, first=number))


def packed_streams(folder: Path, count: int = 10, prefix: str = "s", shard_samples: int | None = None) -> Path:
    """A packed source of `count` streams, in several shards when `shard_samples` is given."""
    staging, out = folder / f"{prefix}-staging", folder / f"{prefix}-packed"
    stage_streams(staging, count, prefix)
    if shard_samples is None:
        pack(staging, out)
    else:
        split_pack(staging, out, shard_samples)
    return out


def split_pack(staging: Path, out: Path, shard_samples: int) -> None:
    """Like `pack`, with a shard every `shard_samples` samples (pack itself splits at megabytes)."""
    import webdataset

    from moss_train.data.shards.index_build import build_index

    out.mkdir(parents=True)
    with webdataset.ShardWriter(
        str(out / "shard-%06d.tar"), maxcount=shard_samples, verbose=0, encoder=False, mtime=0
    ) as w:
        for path in sorted(staging.glob("*.json")):
            parts = {p.name.partition(".")[2]: p.read_bytes() for p in staging.glob(f"{path.stem}.*")}
            w.write({"__key__": path.stem} | parts)
    build_index(out)
