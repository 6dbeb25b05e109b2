"""What the importers share: media lists, checked parsing, and strict reading of foreign rows."""

from pathlib import PurePosixPath
from typing import Any

from moss_train.errors import SampleError
from moss_train.streams.media import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

#: a sample and the source path of each of its tar members (`{"mp4": "clips/7.mp4"}`)
Imported = tuple[Any, dict[str, str]]


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
