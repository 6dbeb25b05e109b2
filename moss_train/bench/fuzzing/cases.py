"""One input by its number: a sample with a hostile medium or JSON, or a hostile tar of healthy samples."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moss_train.bench.fuzzing import media
from moss_train.bench.fuzzing.tars import Entry, hostile_tar
from moss_train.bench.fuzzing.texts import caption_sample, conversation_sample, hostile_text, stream_sample
from moss_train.streams.media import VIDEO_EXTENSIONS

#: shares of the inputs; a hostile tar needs a source of its own, which costs more
_KINDS = {"medium": 0.58, "json": 0.3, "tar": 0.12}
_BOMBS = 0.15  #: of the hostile media


@dataclass(frozen=True)
class Case:
    """An input: what it is, what was done to it, and its bytes."""

    number: int
    kind: str  #: "medium", "json" or "tar"
    what: str  #: for people
    keys: tuple[str, ...]  #: of its samples
    members: dict[str, bytes] = field(default_factory=dict)  #: of a sample: member → bytes
    tar: bytes = b""  #: of a hostile tar


def draw_case(seed: int, number: int, real: Path | None = None) -> Case:
    """Input `number` of a seed; `real` is a folder of media that are mutated beside the small ones."""

    rng = np.random.default_rng([seed, number])
    kind = str(rng.choice(list(_KINDS), p=list(_KINDS.values())))
    key = f"c{number:06d}"
    if kind == "tar":
        names, entries = [f"{key}{letter}" for letter in "abc"], []
        for name in names:
            member, data, _ = _medium(rng, None)
            entries.append(Entry(f"{name}.json".encode(), json.dumps(_sample(name, member, rng)).encode()))
            entries.append(Entry(f"{name}.{member}".encode(), data))
        data, what = hostile_tar(entries, rng)
        return Case(number, kind, what, tuple(names), tar=data)
    member, data, headers = _medium(rng, real)
    what = member
    sample = _sample(key, member, rng)
    if kind == "json":
        text, change = hostile_text(sample, rng)
        return Case(number, kind, f"{what}, {change}", (key,), {"json": text, member: data})
    if rng.random() < _BOMBS:
        member, data, change = media.bomb(rng)
        sample = _sample(key, member, rng)
    else:
        data, change = media.mutate(data, rng, headers)
    return Case(number, kind, f"{what}, {change}", (key,), {"json": json.dumps(sample).encode(), member: data})


def healthy_sample(number: int) -> tuple[str, dict[str, bytes]]:
    """Key and members of a sample with which all is well."""

    key = f"healthy{number}"
    if number % 2:
        return key, {"json": json.dumps(caption_sample(key, "png", False)).encode(), "png": media.still("PNG")}
    return key, {"json": json.dumps(stream_sample(key, "mp4")).encode(), "mp4": media.clip("mp4", "libx264")}


def _medium(rng: np.random.Generator, real: Path | None):
    """(member, bytes, mutation of its headers)."""
    files = [path for path in sorted(real.iterdir()) if path.suffix[1:] in VIDEO_EXTENSIONS] if real else []
    if files and rng.random() < 0.1:
        path = files[rng.integers(len(files))]
        container = {"mkv": "matroska"}.get(path.suffix[1:], path.suffix[1:])
        return path.suffix[1:], path.read_bytes(), media.headers_of(path.suffix[1:], container)
    if rng.random() < 0.25:
        extension, form = media.STILLS[rng.integers(len(media.STILLS))]
        return extension, media.still(form), media.headers_of(extension, "")
    extension, container, codec = media.CLIPS[rng.integers(len(media.CLIPS))]
    return extension, media.clip(container, codec), media.headers_of(extension, container)


def _sample(key: str, member: str, rng: np.random.Generator) -> dict:
    is_video = member in VIDEO_EXTENSIONS
    draw = rng.random()
    if is_video and draw < 0.6:
        return stream_sample(key, member)
    return (caption_sample if draw < 0.8 else conversation_sample)(key, member, is_video)
