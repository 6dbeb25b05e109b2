"""Samples about video files as they were published: nothing is packed, each file is opened when it is needed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moss_train.data.decoding.decode import decode_frames
from moss_train.data.decoding.probe import MediaProbe, probe_media
from moss_train.errors import SampleError
from moss_train.streams.compiled import FrameRequest
from moss_train.streams.media import VIDEO_EXTENSIONS, MediaInfo
from moss_train.streams.schema import Sample, parse_sample

MEDIUM = "v"  #: the id of a sample's only medium


@dataclass(frozen=True)
class FileItem:
    """One sample about one video."""

    key: str
    video: Path
    build: Callable[[float], dict[str, Any]]
    """Length of the video, seconds → the sample's JSON, without `media`."""


class FileCorpus:
    """See `evaluate.prepared.Corpus`. Neighbouring samples about one video read it once."""

    def __init__(self, items: Sequence[FileItem], image_size: int):
        self._items = items
        self._image_size = image_size
        self._open: tuple[Path, bytes] | None = None
        self._facts: dict[Path, MediaProbe] = {}

    def __len__(self) -> int:
        return len(self._items)

    def key(self, number: int) -> str:
        return self._items[number].key

    def sample(self, number: int) -> Sample:
        """SampleError when the file is missing or no video, or the sample does not fit it."""
        item = self._items[number]
        member = item.video.suffix.removeprefix(".").lower()
        if member not in VIDEO_EXTENSIONS:
            raise SampleError(item.key, f"{item.video}: not one of {', '.join(VIDEO_EXTENSIONS)}")
        media = [{"id": MEDIUM, "kind": "video", "member": member}]
        return parse_sample(item.build(self._probe(item).duration_s) | {"id": item.key, "media": media}, item.key)

    def media_info(self, number: int) -> dict[str, MediaInfo]:
        facts = self._probe(self._items[number])
        return {MEDIUM: MediaInfo(facts.duration_s, facts.frame_rate, facts.frame_count)}

    def frames(self, number: int, requests: Sequence[FrameRequest]) -> torch.Tensor:
        item = self._items[number]
        times_s = [request.time_s for request in requests]
        return decode_frames(self._read(item), times_s, self._image_size, key=item.key, facts=self._probe(item)).frames

    def _probe(self, item: FileItem) -> MediaProbe:
        if item.video not in self._facts:
            facts = probe_media(self._read(item), item.key)
            if facts.container == "image":
                raise SampleError(item.key, f"{item.video}: a still, not a video")
            self._facts[item.video] = facts
        return self._facts[item.video]

    def _read(self, item: FileItem) -> bytes:
        if self._open is None or self._open[0] != item.video:
            try:
                self._open = item.video, item.video.read_bytes()
            except OSError as error:
                raise SampleError(item.key, f"{item.video}: {error.strerror or error}") from error
        return self._open[1]
