"""The training loader: global batches in the order of the run, this rank's rows decoded and collated.

Every rank plans every global batch from compiled lengths (no pixel involved), so all ranks agree on rows and
microbatches without talking to each other; each decodes only the frames of its own rows, and of these only its own
share (`FrameShare`) where several ranks work on the same rows. What only the rank that tried can know, a clip that does
not decode or a shard that it cannot read, is told to all (`agree`) before the step is delivered. The loader's state is
(epoch, step, fingerprint), whatever the number of ranks and workers.
"""

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moss_train.data.batch import ALL_FRAMES, Batch, FrameShare
from moss_train.data.blend import Blend, blend_source
from moss_train.data.collate import collate
from moss_train.data.config import DataConfig
from moss_train.data.corpus import Corpus, load_source
from moss_train.data.decoding.pool import DecodeFailure, DecodePool
from moss_train.data.frame_store import FrameStore, PendingFrames
from moss_train.data.order import augmentation_rng
from moss_train.data.packing import RowLimits, bounds_of_kept, cut_frames, plan_rank_rows
from moss_train.data.quarantine import Fault, Quarantine
from moss_train.errors import ConfigError, DataError, MossTrainError, SampleError
from moss_train.streams.compiled import CompiledStream
from moss_train.streams.config import CompilerConfig
from moss_train.streams.tokenizer import StreamTokenizer

#: gives every rank's list of JSON values in return for this rank's; all ranks call it once a step
Agree = Callable[[list[Any]], list[list[Any]]]


@dataclass
class GlobalStep:
    """What one rank trains on in one optimizer step."""

    epoch: int
    step: int  #: within the epoch
    microbatches: list[Batch]  #: this rank's; every rank has as many
    keys: list[str]  #: of the whole global batch, masked samples included
    data_wait_s: float  #: seconds the caller waited for this step
    masked: int  #: streams left out of the whole global batch: over budget or bad
    quarantined: list[Fault] = field(default_factory=list)  #: samples of all ranks that are new in the ledger


@dataclass
class _Stream:
    """One usable stream of a global batch."""

    corpus: Corpus
    compiled: CompiledStream


@dataclass
class _Plan:
    """One global batch, before its pixels."""

    epoch: int
    step: int
    keys: list[str]
    streams: list[_Stream] = field(default_factory=list)
    microbatches: list[list[list[int]]] = field(default_factory=list)  #: this rank's: microbatch → row → streams
    frames: dict[int, PendingFrames | torch.Tensor] = field(default_factory=dict)  #: stream → its frames in our share
    bad: list[tuple[Corpus, SampleError]] = field(default_factory=list)
    over_budget: list[CompiledStream] = field(default_factory=list)


def build_loader(
    data: DataConfig,
    compiler: CompilerConfig,
    tokenizer: StreamTokenizer,
    image_size: int,
    seed: int,
    data_rank: int = 0,
    data_ranks: int = 1,
    quarantine_path: Path | None = None,
    agree: Agree | None = None,
    frame_share: FrameShare = ALL_FRAMES,
    microbatch_multiple: int = 1,
) -> "Loader":
    """Open every source of the blend. `image_size` in pixels; `quarantine_path` is the ledger to append to.

    Ranks that share a `data_rank` see the same batches; of their frames each decodes and delivers its `frame_share`.
    Every step has a multiple of `microbatch_multiple` microbatches; the last ones may be padding alone.

    Where there are several ranks of either kind, give the ledger's path to one of them and `agree`
    (`parallel.agreement.gather_lists`) to all: without it each rank masks and counts what it alone could not decode.
    Raises ConfigError for illegal settings, DataError for sources that are missing, damaged or stale.
    """
    data.validate()
    if not 0 <= data_rank < data_ranks:
        raise ConfigError(f"data rank {data_rank} does not exist among {data_ranks} data ranks")
    if microbatch_multiple < 1:
        raise ConfigError(f"microbatch_multiple={microbatch_multiple} must be at least 1")
    corpora = [
        load_source(
            source.path, tokenizer, compiler, image_size, data.decoder, data.max_frame_pixels, source.name or name
        )
        for name, source in data.sources.items()
    ]
    names = [corpus.name for corpus in corpora]
    if len(set(names)) < len(names):
        raise ConfigError(f"data.sources has two sources of one name among {', '.join(names)}")
    weights = [source.weight for source in data.sources.values()]
    sources = [blend_source(corpus.name, weight, corpus.index) for corpus, weight in zip(corpora, weights, strict=True)]
    compiled_with = {f"compiler.{name}": value for name, value in asdict(compiler).items()}
    blend = Blend(sources, data, seed, {"tokenizer": tokenizer.fingerprint} | compiled_with)
    # Augmented streams differ from epoch to epoch, so keeping them would only fill memory.
    augmented = compiler.jitter_probability > 0
    quarantine = Quarantine(
        quarantine_path,
        sum(map(len, corpora)),
        data.max_bad_fraction,
        {corpus.name: corpus.index.fingerprint for corpus in corpora},
    )
    place = _Place(data_rank, data_ranks, frame_share, microbatch_multiple)
    return Loader(data, corpora, blend, image_size, augmented, place, quarantine, agree)


@dataclass(frozen=True)
class _Place:
    """Which part of every global batch is this rank's."""

    data_rank: int
    data_ranks: int
    share: FrameShare
    microbatch_multiple: int


class Loader:
    """Iterates for ever over `GlobalStep`; use as a context manager or call `close()`."""

    def __init__(
        self,
        data: DataConfig,
        corpora: list[Corpus],
        blend: Blend,
        image_size: int,
        augmented: bool,
        place: _Place,
        quarantine: Quarantine,
        agree: Agree | None,
    ):
        self._data = data
        self._corpora = corpora
        self._blend = blend
        self._image_size = image_size
        self._augmented = augmented
        self._place = place
        pool = DecodePool(data.workers, data.decode_timeout_s) if data.workers else None
        self._store = FrameStore(pool, data.frame_cache_mb)
        self._streams = _StreamCache(data.compiled_cache_mb)
        self._no_frames = torch.zeros((0, 3, image_size, image_size), dtype=torch.uint8)
        self._quarantine = quarantine
        self._earlier = quarantine.earlier  #: faults of the ledger that the other ranks have not heard of yet
        self._agree = agree or (lambda own: [own])
        self._counters: Counter[str] = Counter()
        self._planned: deque[_Plan] = deque()
        self._next = (0, 0)  #: the step to be delivered next
        self._closed = False

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the decoder processes. May be called twice."""
        self._closed = True
        self._planned.clear()
        self._store.close()

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Global batches of an epoch; its last one is completed with the epoch's first samples."""
        return self._blend.steps_per_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: the step to be delivered next, the order's fingerprint and the settings behind it."""
        epoch, step = self._next
        return {
            "epoch": epoch,
            "step": step,
            "fingerprint": self._blend.fingerprint,
            "order": self._blend.order_settings,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a saved run stopped. Raises DataError when this run has another order of samples."""
        if state["fingerprint"] != self._blend.fingerprint:
            saved, now = state.get("order", {}), self._blend.order_settings
            names = [name for name in now if saved.get(name) != now[name]]
            changes = "; ".join(f"{name} was {saved.get(name)!r}, is {now[name]!r}" for name in names)
            raise DataError(
                f"the order of samples differs from the saved run's ({changes}): restore these settings, "
                "or start the stage anew"
            )
        epoch, step = state["epoch"], state["step"]
        if not (epoch >= 0 and 0 <= step < self.steps_per_epoch(epoch)):
            raise DataError(f"the saved position, epoch {epoch} step {step}, does not exist")
        self._next = (epoch, step)
        self._planned.clear()

    def summary(self) -> dict[str, Any]:
        """Figures of the blend, to be shown before training."""
        sources = {}
        for corpus, source in zip(self._corpora, self._blend.sources, strict=True):
            entries = corpus.index.samples
            media = [facts for entry in entries for facts in entry.media.values()]
            readable = [facts for facts in media if not isinstance(facts, str)]
            sources[corpus.name] = {
                "samples": len(entries),
                "weight": source.weight,
                "epoch_samples": source.epoch_samples,
                "share": source.epoch_samples / self._blend.epoch_samples,
                "kinds": dict(Counter(entry.kind for entry in entries)),
                "video_hours": sum(facts.duration_s for facts in readable) / 3600,
                "unreadable_media": len(media) - len(readable),
            }
        return {
            "sources": sources,
            "epoch_samples": self._blend.epoch_samples,
            "steps_per_epoch": self.steps_per_epoch(0),
            "global_batch_size": self._blend.batch_size,
            "wrapped_samples": self._blend.wrapped_samples,
            "fingerprint": self._blend.fingerprint,
        }

    def counters(self) -> dict[str, int]:
        """Since the loader was built, over all ranks: streams delivered, masked (those over budget among them) and
        samples quarantined; of this rank: clips, or its shares of them, decoded and served from the cache."""
        return {
            "streams": self._counters["streams"],
            "masked": self._counters["masked"],
            "over_budget": self._counters["over_budget"],
            "quarantined": len(self._quarantine),
            "clips_decoded": self._store.decoded,
            "clips_cached": self._store.cached,
        }

    def __iter__(self) -> Iterator[GlobalStep]:
        return self

    def __next__(self) -> GlobalStep:
        if self._closed:
            raise RuntimeError("the loader is closed")
        began = time.perf_counter()
        plan, quarantined = self._agreed_plan()
        masked = len(plan.bad) + len(plan.over_budget) + sum(self._is_bad(stream) for stream in plan.streams)
        microbatches = [self._microbatch(plan, rows) for rows in plan.microbatches]
        self._counters["streams"] += len(plan.keys) - masked
        self._counters["masked"] += masked
        self._counters["over_budget"] += len(plan.over_budget)
        self._next = self._after(plan.epoch, plan.step)
        # The next steps' clips are decoded while this one is trained. What cannot be read is raised by the next call,
        # where all ranks agree on it.
        with suppress(MossTrainError):
            self._plan_ahead()
        waited = time.perf_counter() - began
        return GlobalStep(plan.epoch, plan.step, microbatches, plan.keys, waited, masked, quarantined)

    def _agreed_plan(self) -> tuple[_Plan, list[Fault]]:
        """The next step, decoded, and the samples that failed in it for the first time.

        All ranks learn of every rank's failures and count the same, so that all mask the same streams and all stop
        together; a rank that stopped alone would leave the others waiting for it.
        """
        faults, error = list(self._earlier), None
        try:
            self._plan_ahead()
            faults += self._decode(self._planned[0])
        except MossTrainError as caught:
            error = caught
        told = self._agree([fault.to_json() for fault in faults] + ([{"error": str(error)}] if error else []))
        if error is not None:
            raise error
        for rank, entries in enumerate(told):
            if entries and "error" in entries[-1]:
                raise DataError(f"rank {rank}: {entries[-1]['error']}")
        self._earlier = []
        plan = self._planned.popleft()
        if plan.over_budget and not plan.streams:
            tokens = min(len(stream.ids) for stream in plan.over_budget)
            frames = min(len(stream.frames) for stream in plan.over_budget)
            raise DataError(
                f"every stream of epoch {plan.epoch} step {plan.step} is over budget (smallest: {tokens} tokens, "
                f"{frames} frames): raise data.pack_text_tokens={self._data.pack_text_tokens} or "
                f"data.pack_frames={self._data.pack_frames}"
            )
        known_to_all = [self._fault(corpus, error, plan, "compiler") for corpus, error in plan.bad]
        told_faults = [Fault(**entry) for entries in told for entry in entries]
        return plan, self._quarantine.add([*told_faults, *known_to_all])

    def _after(self, epoch: int, step: int) -> tuple[int, int]:
        return (epoch, step + 1) if step + 1 < self.steps_per_epoch(epoch) else (epoch + 1, 0)

    def _plan_ahead(self) -> None:
        """Keep `prefetch` steps planned beyond the next one, or just that one when nothing decodes in between."""
        ahead = self._data.prefetch + 1 if self._store.pool is not None else 1
        while len(self._planned) < ahead:
            last = self._planned[-1] if self._planned else None
            epoch, step = self._after(last.epoch, last.step) if last else self._next
            self._planned.append(self._plan(epoch, step))

    def _plan(self, epoch: int, step: int) -> _Plan:
        """Compile one global batch, lay it in rows, take this rank's share and ask for its frames."""
        entries = self._blend.global_batch(epoch, step)
        plan = _Plan(epoch, step, [self._corpora[source].keys[number] for source, number in entries])
        for (source, _), key in zip(entries, plan.keys, strict=True):
            corpus = self._corpora[source]
            compiled = self._compile(corpus, key, epoch)
            if isinstance(compiled, SampleError):
                plan.bad.append((corpus, compiled))
            elif len(compiled.ids) > self._data.pack_text_tokens or len(compiled.frames) > self._data.pack_frames:
                plan.over_budget.append(compiled)
            else:
                plan.streams.append(_Stream(corpus, compiled))
        place = self._place
        plan.microbatches = plan_rank_rows(
            [len(stream.compiled.ids) for stream in plan.streams],
            [len(stream.compiled.frames) for stream in plan.streams],
            RowLimits.of(self._data),
            self._data.cost,
            place.data_rank,
            place.data_ranks,
            place.microbatch_multiple,
        )
        for run in plan.microbatches:
            self._request_frames(plan, [number for row in run for number in row])
        return plan

    def _request_frames(self, plan: _Plan, numbers: list[int]) -> None:
        """Ask for this rank's share of the frames of one microbatch, which is made of the streams `numbers`."""
        counts, bounds = self._shares(plan, numbers)
        for number, part in zip(numbers, cut_frames(counts, *self._place.share.of(bounds)), strict=True):
            stream = plan.streams[number]
            # A sample that failed before stays in its row's plan, which all ranks share, but is not tried again.
            if part and not self._is_bad(stream):
                requests = stream.compiled.frames[part.start : part.stop]
                plan.frames[number] = self._store.request(stream.corpus, stream.compiled.key, requests)

    def _shares(self, plan: _Plan, numbers: list[int]) -> tuple[list[int], tuple[int, ...]]:
        """Of a microbatch made of the streams `numbers`, as planned: each stream's frames, and the shares' bounds."""
        counts = [len(plan.streams[number].compiled.frames) for number in numbers]
        return counts, self._place.share.bounds(sum(counts))

    def _microbatch(self, plan: _Plan, rows: list[list[int]]) -> Batch:
        """One planned microbatch without its bad streams."""
        numbers = [number for row in rows for number in row]
        kept = {number for number in numbers if not self._is_bad(plan.streams[number])}
        counts, bounds = self._shares(plan, numbers)
        # What a rank has decoded is its share of the plan, so bad streams leave shares of unequal sizes.
        bounds = bounds_of_kept(bounds, counts, [number in kept for number in numbers])
        good = [[number for number in row if number in kept] for row in rows]
        return collate(
            [[(plan.streams[number].compiled, self._frames(plan, number)) for number in row] for row in good],
            self._image_size,
            [[plan.streams[number].corpus.name for number in row] for row in good],
            self._place.share,
            () if self._place.share == ALL_FRAMES else bounds,
        )

    def _compile(self, corpus: Corpus, key: str, epoch: int) -> CompiledStream | SampleError:
        cached = self._streams.get(corpus.name, key)
        if cached is not None:
            return cached
        try:
            rng = augmentation_rng(self._blend.seed, epoch, key) if self._augmented else None
            compiled = corpus.compile(key, rng)
        except SampleError as error:
            return error
        if not self._augmented:
            self._streams.put(corpus.name, key, compiled)
        return compiled

    def _is_bad(self, stream: _Stream) -> bool:
        return self._quarantine.reason(stream.corpus.name, stream.compiled.key) is not None

    def _decode(self, plan: _Plan) -> list[Fault]:
        """Wait for this rank's frames; returns those that do not decode and are not known yet."""
        faults = []
        for number in plan.frames:
            stream = plan.streams[number]
            if self._is_bad(stream):
                continue
            try:
                self._frames(plan, number)
            except SampleError as error:
                faults.append(self._fault(stream.corpus, error, plan, self._data.decoder))
        return faults

    def _frames(self, plan: _Plan, number: int) -> torch.Tensor:
        """Those of a stream's frames that lie in this rank's share."""
        frames = plan.frames.get(number, self._no_frames)
        return frames.result() if isinstance(frames, PendingFrames) else frames

    def _fault(self, corpus: Corpus, error: SampleError, plan: _Plan, backend: str) -> Fault:
        return Fault(
            key=error.key,
            source=corpus.name,
            fingerprint=corpus.index.fingerprint,
            shard=corpus.shard_name(error.key),
            reason=error.reason,
            exception=error.exception if isinstance(error, DecodeFailure) else type(error.__cause__ or error).__name__,
            backend=backend,
            epoch=plan.epoch,
            step=plan.step,
        )


class _StreamCache:
    """Compiled streams by (source, key), least recently used out first."""

    def __init__(self, room_mb: int):
        self._room = room_mb << 20
        self._bytes = 0
        self._streams: OrderedDict[tuple[str, str], tuple[CompiledStream, int]] = OrderedDict()

    def get(self, source: str, key: str) -> CompiledStream | None:
        found = self._streams.get((source, key))
        if found is None:
            return None
        self._streams.move_to_end((source, key))
        return found[0]

    def put(self, source: str, key: str, stream: CompiledStream) -> None:
        # Measured: an array's header takes about 110 bytes, a request or a slot with its texts about 200.
        size = 1000 + 17 * len(stream.ids) * 2 + 200 * (len(stream.frames) + len(stream.slots))
        self._streams[source, key] = (stream, size)
        self._bytes += size
        while self._bytes > self._room:
            _, (_, oldest) = self._streams.popitem(last=False)
            self._bytes -= oldest
