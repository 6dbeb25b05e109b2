"""Steps made ready ahead of their training: compiled, their frames asked for and waited for, collated.

With decoder processes a thread of its own does this, so that the training thread finds the next step done; without
them (`data.workers=0`) everything happens when a step is taken.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from moss_train.data.batch import ALL_FRAMES, Batch
from moss_train.data.collate import collate
from moss_train.data.config import DataConfig
from moss_train.data.decoding.pool import DecodeFailure, DecodePool
from moss_train.data.frame_store import FrameStore, FrameWant, PendingFrames
from moss_train.data.order import augmentation_rng, variation_seed
from moss_train.data.packing import bounds_of_kept
from moss_train.data.planning import Place, Planner, StepPlan
from moss_train.data.quarantine import Fault, Quarantine
from moss_train.data.shards.storage import ShardStore, is_remote
from moss_train.data.sources import OpenBlend
from moss_train.errors import DataError, MossTrainError, SampleError
from moss_train.streams.compiled import CompiledStream

#: how many steps beyond those being decoded the shards of remote sources are fetched ahead
SHARDS_AHEAD = 8

Position = tuple[int, int]  #: epoch, step within it
#: told of the keys whose frames are waited for from now on, () when none are, and how long that may take at most, s
Waits = Callable[[Sequence[str], float], None]


@dataclass
class _Begun:
    """A step whose streams are compiled and whose frames are being decoded."""

    plan: StepPlan
    keys: list[str]
    streams: dict[int, CompiledStream] = field(default_factory=dict)  #: this rank's, without those that failed
    frames: dict[int, PendingFrames] = field(default_factory=dict)  #: of these, those with frames in this share
    faults: list[Fault] = field(default_factory=list)


@dataclass
class Prepared:
    """A step that is ready, as far as this rank knows."""

    plan: StepPlan
    keys: list[str]  #: of the whole global batch
    streams: dict[int, CompiledStream]
    frames: dict[int, torch.Tensor]  #: uint8 [F, 3, S, S]
    faults: list[Fault]  #: own streams that failed, and are not known to the quarantine yet
    masked: set[int]  #: own streams that `batches` was made without
    batches: list[Batch]


class Preparer:
    """Makes steps ready in order. `take` and `begin` are for one thread, the training loop's."""

    def __init__(
        self,
        data: DataConfig,
        opened: OpenBlend,
        planner: Planner,
        quarantine: Quarantine,
        place: Place,
        image_size: int,
        augmented: bool,
        pool: DecodePool | None,
        store: ShardStore,
        waits: Waits | None = None,
    ):
        self.planner = planner
        self.frames = FrameStore(pool, data.frame_cache_mb)
        self._data = data
        self._opened = opened
        self._quarantine = quarantine
        self._place = place
        self._image_size = image_size
        self._augmented = augmented
        self._store = store
        self._waits = waits or (lambda keys, patience_s: None)
        self._compiled = _CompiledCache(data.compiled_cache_mb)
        self._no_frames = torch.zeros((0, 3, image_size, image_size), dtype=torch.uint8)
        self._begun: deque[_Begun] = deque()
        self._ahead = data.prefetch + 1 if pool is not None else 1
        self._thread = ThreadPoolExecutor(1, "prepare") if pool is not None else None
        self._ready: tuple[Position, Future[Prepared]] | None = None
        self._remote = {n for n, corpus in enumerate(opened.corpora) if is_remote(corpus.index.shard_location(0))}
        # A pass that served several samples and failed is decoded once more for each. In this process nothing ends it.
        self._patience_s = 2 * data.decode_timeout_s if pool is not None else 0.0
        if self._remote:
            self._patience_s += (data.remote_retries + 1) * data.remote_timeout_s
        self._fetched: Position | None = None  #: the first step whose shards were not asked for yet

    def close(self) -> None:
        """End threads and decoder processes. May be called twice."""
        self.frames.close()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._begun.clear()
        self._store.close()

    def restart(self) -> None:
        """Forget what was begun: the next `take` is of another step."""
        if self._ready is not None:
            future = self._ready[1]
            if not future.cancel():
                future.exception()  # the thread must have let go of what is cleared now
            self._ready = None
        self._begun.clear()
        self._fetched = None

    def begin(self, epoch: int, step: int) -> None:
        """Start on a step that will be taken next, where there is a thread for it."""
        if self._thread is not None and (self._ready is None or self._ready[0] != (epoch, step)):
            self._ready = (epoch, step), self._thread.submit(self._prepare, epoch, step)

    def take(self, epoch: int, step: int) -> Prepared:
        """A step, made ready; waits for it. Raises DataError for a shard that cannot be read."""
        if self._thread is None:
            return self._prepare(epoch, step)
        self.begin(epoch, step)
        assert self._ready is not None
        return self._ready[1].result()

    def masked(self, plan: StepPlan, keys: list[str]) -> set[int]:
        """The streams of a global batch whose samples are quarantined by now."""
        if not len(self._quarantine):
            return set()
        return {stream for stream in range(len(keys)) if self._is_bad(plan, keys, stream)}

    def collate(self, prepared: Prepared, masked: Set[int]) -> list[Batch]:
        """This rank's microbatches without the streams `masked`."""
        return [self._microbatch(prepared, rows, masked) for rows in prepared.plan.microbatches]

    def _prepare(self, epoch: int, step: int) -> Prepared:
        self._begin_ahead(epoch, step)
        begun = self._begun.popleft()
        prepared = Prepared(begun.plan, begun.keys, begun.streams, {}, list(begun.faults), set(), [])
        for stream, pending in begun.frames.items():
            if self._is_bad(begun.plan, begun.keys, stream):
                continue
            self._waits([begun.keys[stream]], self._patience_s)
            try:
                prepared.frames[stream] = pending.result()
            except SampleError as error:
                prepared.faults.append(self._fault(begun.plan, stream, error, self._data.decoder))
        self._waits((), 0.0)
        failed = {(fault.source, fault.key) for fault in prepared.faults}
        prepared.masked = {
            stream
            for stream in begun.plan.own()
            if (self._source_name(begun.plan, stream), begun.keys[stream]) in failed
            or self._is_bad(begun.plan, begun.keys, stream)
        }
        prepared.batches = self.collate(prepared, prepared.masked)
        return prepared

    def _begin_ahead(self, epoch: int, step: int) -> None:
        """Have this step begun, and those that are decoded ahead of it."""
        position = (epoch, step)
        for count in range(self._ahead):
            if count >= len(self._begun):
                try:
                    self._begun.append(self._begin(*position))
                except MossTrainError:
                    if count == 0:
                        raise
                    return  # met again, and raised, when that step is due
            position = self._opened.blend.after(*position)
        self._fetch_ahead(position)

    def _begin(self, epoch: int, step: int) -> _Begun:
        """Plan one global batch, compile this rank's streams and ask for its frames."""
        plan = self.planner.plan(epoch, step)
        corpora = self._opened.corpora
        keys = [corpora[source].key(number) for source, number in zip(plan.sources, plan.samples, strict=True)]
        begun = _Begun(plan, keys)
        for stream in plan.own():
            # A sample that failed before stays in the plan, which all ranks share, but is not tried again.
            if self._is_bad(plan, keys, stream):
                continue
            try:
                begun.streams[stream] = self._compile(plan, keys[stream], stream)
            except SampleError as error:
                begun.faults.append(self._fault(plan, stream, error, "compiler"))
        wanted = {s: part for s, part in plan.own_frames(self._place.share).items() if s in begun.streams}
        wants = []
        for stream, part in wanted.items():
            own = begun.streams[stream].frames[part.start : part.stop]
            wants.append(FrameWant(corpora[plan.sources[stream]], plan.samples[stream], own))
        begun.frames = dict(zip(wanted, self.frames.request_all(wants), strict=True))
        return begun

    def _compile(self, plan: StepPlan, key: str, stream: int) -> CompiledStream:
        source, number, part = plan.sources[stream], plan.samples[stream], plan.parts[stream]
        cached = self._compiled.get((source, number, part))
        if cached is not None:
            return cached
        corpus, seed = self._opened.corpora[source], self._opened.blend.seed
        rng = augmentation_rng(seed, plan.epoch, key) if self._augmented else None
        variation = variation_seed(seed, key, plan.variants[stream])
        parts = corpus.compile_all(number, self._opened.budget, rng, variation)
        lengths = [(len(one.ids), len(one.frames)) for one in parts]
        if part >= len(parts) or lengths[part] != (plan.tokens[stream], plan.frames[stream]):
            raise DataError(
                f"source {corpus.name!r}: sample {key!r} (variant {plan.variants[stream]}) has parts of {lengths} "
                f"tokens and frames, its table of lengths says {plan.tokens[stream]} and {plan.frames[stream]} of part "
                f"{part}: it was made by another version; remove the lengths-*.arrow of the source to have it measured "
                "again"
            )
        if not self._augmented:
            for place, one in enumerate(parts):
                self._compiled.put((source, number, place), one)
        return parts[part]

    def _fetch_ahead(self, position: Position) -> None:
        """Have the shards of the steps from `position` on fetched in the background, where they are remote."""
        if not self._remote:
            return
        count = 1
        if self._fetched is None:
            self._fetched, count = position, SHARDS_AHEAD
        for _ in range(count):
            try:
                plan = self.planner.plan(*self._fetched)
            except DataError:
                return  # met again, and raised, when that step is due
            for stream in plan.own():
                if plan.sources[stream] in self._remote:
                    index = self._opened.corpora[plan.sources[stream]].index
                    shard = int(index.shard_numbers[plan.samples[stream]])
                    self._store.prefetch(index.shard_location(shard), index.shards[shard].size)
            self._fetched = self._opened.blend.after(*self._fetched)

    def _microbatch(self, prepared: Prepared, rows: list[list[int]], masked: Set[int]) -> Batch:
        """One planned microbatch without its bad streams."""
        share = self._place.share
        streams, counts, bounds = prepared.plan.shares(rows, share)
        # What a rank has decoded is its share of the plan, so bad streams leave shares of unequal sizes.
        bounds = bounds_of_kept(bounds, counts, [stream not in masked for stream in streams])
        good = [[stream for stream in row if stream not in masked] for row in rows]
        sources = prepared.plan.sources
        return collate(
            [[(prepared.streams[s], prepared.frames.get(s, self._no_frames)) for s in row] for row in good],
            self._image_size,
            [[self._opened.corpora[sources[s]].name for s in row] for row in good],
            share,
            () if share == ALL_FRAMES else bounds,
            [[sources[s] for s in row] for row in good],
        )

    def _is_bad(self, plan: StepPlan, keys: list[str], stream: int) -> bool:
        return self._quarantine.reason(self._source_name(plan, stream), keys[stream]) is not None

    def _source_name(self, plan: StepPlan, stream: int) -> str:
        return self._opened.corpora[plan.sources[stream]].name

    def _fault(self, plan: StepPlan, stream: int, error: SampleError, backend: str) -> Fault:
        corpus = self._opened.corpora[plan.sources[stream]]
        return Fault(
            key=error.key,
            source=corpus.name,
            fingerprint=corpus.index.fingerprint,
            shard=corpus.index.shard_name(plan.samples[stream]),
            reason=error.reason,
            exception=error.exception if isinstance(error, DecodeFailure) else type(error.__cause__ or error).__name__,
            backend=backend,
            epoch=plan.epoch,
            step=plan.step,
        )


class _CompiledCache:
    """Compiled streams by (source, sample, part), least recently used out first."""

    def __init__(self, room_mb: int):
        self._room = room_mb << 20
        self._bytes = 0
        self._streams: OrderedDict[tuple[int, int, int], tuple[CompiledStream, int]] = OrderedDict()

    def get(self, place: tuple[int, int, int]) -> CompiledStream | None:
        found = self._streams.get(place)
        if found is None:
            return None
        self._streams.move_to_end(place)
        return found[0]

    def put(self, place: tuple[int, int, int], stream: CompiledStream) -> None:
        if place in self._streams:
            return
        # Measured: an array's header takes about 110 bytes, a request or a slot with its texts about 200.
        size = 1000 + 17 * len(stream.ids) * 2 + 200 * (len(stream.frames) + len(stream.slots))
        self._streams[place] = (stream, size)
        self._bytes += size
        while self._bytes > self._room:
            _, (_, oldest) = self._streams.popitem(last=False)
            self._bytes -= oldest
