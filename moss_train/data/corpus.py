"""One packed source, sample by sample: its JSON, its media's facts, its compiled streams and its pictures."""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moss_train.data.config import DataConfig
from moss_train.data.decoding.decode import DecodedArrays, DecodeLimits, choose_reader
from moss_train.data.decoding.job import DecodeJob, check_digest, read_range, run_job
from moss_train.data.decoding.probe import MediaProbe
from moss_train.data.shards.index import IndexedSample, SourceIndex, load_index
from moss_train.data.shards.storage import ShardStore, is_remote
from moss_train.errors import SampleError
from moss_train.streams.compiled import CompiledStream, FrameRequest
from moss_train.streams.config import CompilerConfig
from moss_train.streams.media import MediaInfo
from moss_train.streams.schema import Sample, parse_sample
from moss_train.streams.split import RowBudget, compile_parts
from moss_train.streams.tokenizer import StreamTokenizer

if TYPE_CHECKING:  # processes that only compile do without it
    import torch

#: samples whose media are remembered by name, so that later epochs read no JSON to find them
_MEDIA_NAMES = 100_000


def load_source(
    path: str | Path,
    tokenizer: StreamTokenizer | None = None,
    compiler: CompilerConfig | None = None,
    image_size: int | None = None,
    data: DataConfig | None = None,
    name: str = "",
    store: ShardStore | None = None,
) -> "Corpus":
    """Open a packed source, a folder or a URL. `tokenizer` is needed by `compile`, `image_size` (pixels) sizes the
    frames' tiles, `data` says how is decoded (its sources are not looked at), `store` fetches remote shards.

    Raises DataError when the shards and the index do not fit together.
    """
    if store is None and is_remote(str(path)):
        store = ShardStore.of(data or DataConfig())
    index = load_index(path, store)
    name = name or str(path).rstrip("/").rpartition("/")[2]
    return Corpus(name, index, tokenizer, compiler, image_size, data, store)


class Corpus:
    """Random access to the samples of one source by their number. All methods raise SampleError for a bad sample and
    DataError for a shard that cannot be read."""

    def __init__(
        self,
        name: str,
        index: SourceIndex,
        tokenizer: StreamTokenizer | None = None,
        compiler: CompilerConfig | None = None,
        image_size: int | None = None,
        data: DataConfig | None = None,
        store: ShardStore | None = None,
    ):
        self.data = data = data or DataConfig()
        self.name = name
        self.index = index
        self.tokenizer = tokenizer
        self.compiler = compiler or CompilerConfig()
        self._image_size = image_size
        self._decoder = data.decoder
        self._limits = DecodeLimits(max_pixels=data.max_frame_pixels, max_seconds=data.max_media_seconds)
        if store is None and (is_remote(index.location) or any(is_remote(shard.name) for shard in index.shards)):
            store = ShardStore.of(data)
        self.store = store  #: fetches remote shards; None where all are local
        self._media_names: OrderedDict[int, dict[str, str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.index)

    def key(self, number: int) -> str:
        return self.index.key(number)

    def entry(self, number: int) -> IndexedSample:
        """What the index knows of a sample."""
        return self.index.sample(number)

    def sample(self, number: int) -> Sample:
        """The checked JSON member."""
        entry = self.entry(number)
        return parse_sample(self._read(entry, "json"), entry.key)

    def member(self, number: int, member: str) -> bytes:
        """The bytes of one member of a sample, `json` or a medium."""
        return self._read(self.entry(number), member)

    def media_info(self, number: int) -> dict[str, MediaInfo]:
        """Media id → what the compiler needs to know of it."""
        entry = self.entry(number)
        return _media_info(entry, self.sample(number))

    def compile_all(
        self,
        number: int,
        budget: RowBudget | None = None,
        rng: np.random.Generator | None = None,
        variation: int | None = None,
    ) -> list[CompiledStream]:
        """The stream of a sample in the parts that fit `budget`; one part, whole, without a budget.

        `rng` draws its augmentations, None means none; `variation` seeds those that change its length.
        """
        if self.tokenizer is None:
            raise ValueError("this corpus was opened without a tokenizer, so it cannot compile")
        entry = self.entry(number)
        return compile_entry(entry, self._read(entry, "json"), self.tokenizer, self.compiler, budget, rng, variation)

    def compile(
        self,
        number: int,
        part: int = 0,
        rng: np.random.Generator | None = None,
        budget: RowBudget | None = None,
    ) -> CompiledStream:
        """One part of the stream of a sample, as `compile_all`."""
        return self.compile_all(number, budget, rng)[part]

    def frames(self, number: int, requests: Sequence[FrameRequest]) -> "torch.Tensor":
        """uint8 RGB [F, 3, S, S]: the asked pictures, decoded here and now."""
        work = self.decode_jobs(number, requests)
        return self.assemble([run_job(job, self.store) for job, _ in work], [places for _, places in work])

    def all_frames(self, number: int) -> "torch.Tensor":
        """uint8 RGB [F, 3, S, S]: every picture of a sample's stream."""
        return self.frames(number, self.compile(number).frames)

    def decode_jobs(self, number: int, requests: Sequence[FrameRequest]) -> list[tuple[DecodeJob, list[int]]]:
        """One job per medium that is asked for, with the places of its pictures among the requests."""
        places_of: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places_of.setdefault(request.media_id, []).append(place)
        if not places_of:
            return []
        entry = self.entry(number)
        work = []
        for media_id, places in places_of.items():
            name = self._member_of(number, entry, media_id)
            times = tuple(float(requests[place].time_s) for place in places)
            work.append((self._job(entry, media_id, name, times), places))
        return work

    def _job(self, entry: IndexedSample, media_id: str, name: str, times_s: tuple[float, ...]) -> DecodeJob:
        member, facts = entry.members[name], _facts(entry, media_id, name)
        return DecodeJob(
            key=entry.key,
            shard=self.index.shard_location(entry.shard),
            offset=member.offset,
            size=member.size,
            digest=member.digest,
            times_s=times_s,
            image_size=self._image_size,
            decoder=choose_reader(self._decoder, facts),
            facts=facts,
            limits=self._limits,
            shard_size=self.index.shards[entry.shard].size,
        )

    def assemble(self, parts: list[DecodedArrays], places: list[list[int]]) -> "torch.Tensor":
        """The pictures of all jobs of a sample, in the order of its requests."""
        import torch

        if len(parts) == 1:
            return torch.from_numpy(parts[0].frames)
        size = self._image_size or 1
        frames = torch.zeros((sum(map(len, places)), 3, size, size), dtype=torch.uint8)
        for part, where in zip(parts, places, strict=True):
            frames[where] = torch.from_numpy(part.frames)
        return frames

    def _read(self, entry: IndexedSample, name: str) -> bytes:
        if name not in entry.members:
            raise SampleError(entry.key, f"the shard holds no {entry.key}.{name}")
        member = entry.members[name]
        location = self.index.shard_location(entry.shard)
        if self.store is None:
            data = read_range(Path(location), member.offset, member.size)
        else:
            data = self.store.read(location, member.offset, member.size, self.index.shards[entry.shard].size)
        check_digest(entry.key, data, member.digest)
        return data

    def _member_of(self, number: int, entry: IndexedSample, media_id: str) -> str:
        """The member that holds a medium."""
        names = self._media_names.get(number)
        if names is None:
            sample = parse_sample(self._read(entry, "json"), entry.key)
            names = {medium.id: medium.member for medium in sample.media}
            self._media_names[number] = names
            if len(self._media_names) > _MEDIA_NAMES:
                self._media_names.popitem(last=False)
        if media_id not in names:
            raise SampleError(entry.key, f"a frame is asked of medium {media_id!r}, which the sample does not list")
        _facts(entry, media_id, names[media_id])
        return names[media_id]


def compile_entry(
    entry: IndexedSample,
    text: bytes,
    tokenizer: StreamTokenizer,
    compiler: CompilerConfig,
    budget: RowBudget | None = None,
    rng: np.random.Generator | None = None,
    variation: int | None = None,
) -> list[CompiledStream]:
    """The parts of a sample whose JSON is `text`; SampleError when it does not compile."""
    sample = parse_sample(text, entry.key)
    parts = compile_parts(sample, _media_info(entry, sample), tokenizer, compiler, budget, rng, variation)
    for part in parts:
        asked = max(Counter(request.media_id for request in part.frames).values(), default=0)
        # The decoder refuses them too, but where a clip's frames are shared out no decoder is asked for all of them.
        if asked > DecodeLimits.max_frames:
            raise SampleError(entry.key, f"{asked} frames asked of one medium, the limit is {DecodeLimits.max_frames}")
    return parts


def _media_info(entry: IndexedSample, sample: Sample) -> dict[str, MediaInfo]:
    infos = {}
    for medium in sample.media:
        facts = _facts(entry, medium.id, medium.member)
        is_still = facts.container == "image"
        if is_still != (medium.kind == "image"):
            raise SampleError(entry.key, f"medium {medium.id!r} is listed as {medium.kind} but is {facts.codec}")
        infos[medium.id] = MediaInfo(facts.duration_s, facts.frame_rate, None if is_still else facts.frame_count)
    return infos


def _facts(entry: IndexedSample, media_id: str, member: str) -> MediaProbe:
    facts = entry.media.get(member)
    if facts is None:
        raise SampleError(entry.key, f"medium {media_id!r}: the shard holds no {entry.key}.{member}")
    if isinstance(facts, str):
        raise SampleError(entry.key, f"medium {media_id!r}: {facts}")
    return facts
