"""What the importers share: media lists, checked parsing, and strict reading of foreign rows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from moss_train.errors import SampleError
from moss_train.streams.media import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

#: a sample and the source path of each of its tar members (`{"mp4": "clips/7.mp4"}`)
Imported = tuple[Any, dict[str, str]]


@dataclass(frozen=True)
class ImportContext:
    """What an importer knows beside its row."""

    fps: float = 1.0  #: frames a second of the streams it makes
    videos: Mapping[str, str] = field(default_factory=dict)  #: file name without its extension -> file name

    def video(self, name: str, key: str) -> str:
        """The file of a video that an annotation names without an extension."""
        if name not in self.videos:
            raise SampleError(key, f"no video file is named {name!r} (with any extension); add it or drop the row")
        return self.videos[name]


def describe_media(paths: list[tuple[str, str]], key: str) -> tuple[list[dict], dict[str, str]]:
    """The `media` field for (kind, source path) pairs in order, and member -> source path."""
    media, members = [], {}
    for index, (kind, path) in enumerate(paths):
        extension = PurePosixPath(path).suffix.lower().lstrip(".")
        if extension not in (VIDEO_EXTENSIONS if kind == "video" else IMAGE_EXTENSIONS):
            raise SampleError(key, f"{kind} {path!r} has an unknown extension; convert it to mp4, or jpg for a still")
        member = extension if len(paths) == 1 else f"{index}.{extension}"
        media.append({"id": f"{kind[0]}{index}", "kind": kind, "member": member})
        members[member] = path
    return media, members


def require(condition: bool, key: str, fault: str) -> None:
    """Refuse the row unless `condition` holds."""
    if not condition:
        raise SampleError(key, fault)


def text_of(value: Any, key: str, where: str) -> str:
    """`value`, which must be a string."""
    require(isinstance(value, str), key, f"{where}: is {type(value).__name__}, not text; mend the row")
    return value


def list_of(value: Any, key: str, where: str) -> list:
    """`value`, which must be a list."""
    require(isinstance(value, list), key, f"{where}: is {type(value).__name__}, not a list; mend the row")
    return value


def dict_of(value: Any, key: str, where: str) -> dict:
    """`value`, which must be an object."""
    require(isinstance(value, dict), key, f"{where}: is {type(value).__name__}, not an object; mend the row")
    return value


def seconds_of(value: Any, key: str, where: str) -> float:
    """`value`, a finite number of seconds from 0 on, or a text that holds one."""
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    good = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number) and number >= 0
    require(good, key, f"{where}: {value!r} is no time; give seconds from 0 on")
    return float(number)


def span_of(value: Any, key: str, where: str) -> tuple[float, float]:
    """`value`, which must be [from, to] in seconds."""
    pair = list_of(value, key, where)
    require(len(pair) == 2, key, f"{where}: has {len(pair)} entries; a span is [from, to]")
    start_s, end_s = (seconds_of(time_s, key, f"{where}[{index}]") for index, time_s in enumerate(pair))
    require(start_s <= end_s, key, f"{where}: ends at {end_s} s, before it starts at {start_s} s; swap the times")
    return start_s, end_s
