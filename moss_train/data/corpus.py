"""One packed source, sample by sample: its JSON, its media's facts, its compiled streams and its pictures."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from moss_train.data.decoding.decode import DecodedArrays, DecodeLimits
from moss_train.data.decoding.job import DecodeJob, read_range, run_job
from moss_train.data.shards.index import IndexedSample, SourceIndex, load_index
from moss_train.errors import SampleError
from moss_train.streams.compiled import CompiledStream, FrameRequest
from moss_train.streams.compiler import compile_sample
from moss_train.streams.config import CompilerConfig
from moss_train.streams.media import MediaInfo
from moss_train.streams.schema import Sample, parse_sample
from moss_train.streams.tokenizer import StreamTokenizer


def load_source(
    path: str | Path,
    tokenizer: StreamTokenizer | None = None,
    compiler: CompilerConfig | None = None,
    image_size: int | None = None,
    decoder: str = "auto",
    max_frame_pixels: int = 40_000_000,
    name: str = "",
) -> "Corpus":
    """Open a packed folder. `tokenizer` is needed by `compile`, `image_size` (pixels) sizes the frames' tiles.

    Raises DataError when the folder, its shards and its index do not fit together.
    """
    index = load_index(path)
    return Corpus(name or index.folder.name, index, tokenizer, compiler, image_size, decoder, max_frame_pixels)


class Corpus:
    """Random access to the samples of one source by key. All methods raise SampleError for a bad sample."""

    def __init__(
        self,
        name: str,
        index: SourceIndex,
        tokenizer: StreamTokenizer | None,
        compiler: CompilerConfig | None,
        image_size: int | None,
        decoder: str,
        max_frame_pixels: int,
    ):
        self.name = name
        self.index = index
        self._tokenizer = tokenizer
        self._compiler = compiler or CompilerConfig()
        self._image_size = image_size
        self._decoder = decoder
        self._max_pixels = max_frame_pixels
        self.keys: list[str] = [sample.key for sample in index.samples]
        self._by_key = {sample.key: sample for sample in index.samples}

    def __len__(self) -> int:
        return len(self.keys)

    def entry(self, key: str) -> IndexedSample:
        """What the index knows of a sample; KeyError when the source has no such key."""
        return self._by_key[key]

    def shard_name(self, key: str) -> str:
        return self.index.shards[self.entry(key).shard].name

    def sample(self, key: str) -> Sample:
        """The checked JSON member."""
        return parse_sample(self.member(key, "json"), key)

    def member(self, key: str, member: str) -> bytes:
        """The bytes of one member of a sample, `json` or a medium."""
        entry = self.entry(key)
        if member not in entry.members:
            raise SampleError(key, f"the shard holds no {key}.{member}")
        return read_range(self.index.shard_path(entry), *entry.members[member])

    def media_info(self, key: str) -> dict[str, MediaInfo]:
        """Media id → what the compiler needs to know of it."""
        return self._media_info(self.sample(key))

    def compile(self, key: str, rng: np.random.Generator | None = None) -> CompiledStream:
        """The stream of a sample; `rng` draws its augmentations, None means none."""
        if self._tokenizer is None:
            raise ValueError("this corpus was opened without a tokenizer, so it cannot compile")
        sample = self.sample(key)
        compiled = compile_sample(sample, self._media_info(sample), self._tokenizer, self._compiler, rng)
        asked = max(Counter(request.media_id for request in compiled.frames).values(), default=0)
        # The decoder refuses them too, but where a clip's frames are shared out no decoder is asked for all of them.
        if asked > DecodeLimits.max_frames:
            raise SampleError(key, f"{asked} frames asked of one medium, the limit is {DecodeLimits.max_frames}")
        return compiled

    def frames(self, key: str, requests: Sequence[FrameRequest]) -> torch.Tensor:
        """uint8 RGB [F, 3, S, S]: the asked pictures, decoded here and now."""
        work = self.decode_jobs(key, requests)
        return self.assemble([run_job(job) for job, _ in work], [places for _, places in work])

    def decode_jobs(self, key: str, requests: Sequence[FrameRequest]) -> list[tuple[DecodeJob, list[int]]]:
        """One job per medium that is asked for, with the places of its pictures among the requests."""
        places_of: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places_of.setdefault(request.media_id, []).append(place)
        if not places_of:
            return []
        entry = self.entry(key)
        member_of = {medium.id: medium.member for medium in self.sample(key).media}
        work = []
        for media_id, places in places_of.items():
            if media_id not in member_of:
                raise SampleError(key, f"a frame is asked of medium {media_id!r}, which the sample does not list")
            facts = self._facts(key, media_id, member_of[media_id])
            offset, size = entry.members[member_of[media_id]]
            times = tuple(float(requests[place].time_s) for place in places)
            path = str(self.index.shard_path(entry))
            job = DecodeJob(key, path, offset, size, times, self._image_size, self._decoder, facts, self._max_pixels)
            work.append((job, places))
        return work

    def assemble(self, parts: list[DecodedArrays], places: list[list[int]]) -> torch.Tensor:
        """The pictures of all jobs of a sample, in the order of its requests."""
        if len(parts) == 1:
            return torch.from_numpy(parts[0].frames)
        size = self._image_size or 1
        frames = torch.zeros((sum(map(len, places)), 3, size, size), dtype=torch.uint8)
        for part, where in zip(parts, places, strict=True):
            frames[where] = torch.from_numpy(part.frames)
        return frames

    def _media_info(self, sample: Sample) -> dict[str, MediaInfo]:
        infos = {}
        for medium in sample.media:
            facts = self._facts(sample.key, medium.id, medium.member)
            is_still = facts.container == "image"
            if is_still != (medium.kind == "image"):
                raise SampleError(sample.key, f"medium {medium.id!r} is listed as {medium.kind} but is {facts.codec}")
            infos[medium.id] = MediaInfo(facts.duration_s, facts.frame_rate, None if is_still else facts.frame_count)
        return infos

    def _facts(self, key: str, media_id: str, member: str):
        facts = self.entry(key).media.get(member)
        if facts is None:
            raise SampleError(key, f"medium {media_id!r}: the shard holds no {key}.{member}")
        if isinstance(facts, str):
            raise SampleError(key, f"medium {media_id!r}: {facts}")
        return facts
