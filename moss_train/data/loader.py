"""The training loader: global batches in the order of the run, this rank's rows decoded and collated.

Every rank plans every global batch from the tables of lengths (no file but the index involved), so all ranks agree on
rows and microbatches without talking to each other; each compiles only the streams of its own rows and decodes only
their frames, and of these only its own share (`FrameShare`) where several ranks work on the same rows. What only the
rank that tried can know, a clip that does not decode or a shard that it cannot read, is told to all (`agree`) before
the step is delivered. The loader's state is (epoch, step, fingerprint), whatever the number of ranks and workers.

While a step is trained a thread makes the next one ready, and decoder processes are at work on those after it.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moss_train.data.batch import ALL_FRAMES, Batch, FrameShare
from moss_train.data.blend import order_changes
from moss_train.data.config import DataConfig
from moss_train.data.decoding.pool import DecodePool
from moss_train.data.packing import RowLimits
from moss_train.data.planning import Place, Planner, SourceCounts
from moss_train.data.preparing import Prepared, Preparer, Waits
from moss_train.data.quarantine import Fault, Quarantine
from moss_train.data.shards.storage import ShardStore
from moss_train.data.sources import OpenBlend, SourceFigures, open_blend
from moss_train.errors import ConfigError, DataError, MossTrainError
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
    key_sources: list[str]  #: of each key, the name of its source
    data_wait_s: float  #: seconds the caller waited for this step
    masked: int  #: streams left out of the whole global batch because they are bad
    sources: dict[str, SourceCounts] = field(default_factory=dict)  #: what the whole global batch holds of each source
    own_keys: list[str] = field(default_factory=list)  #: of this rank's rows
    imbalance: float = 1.0  #: estimated work of the data rank that has most ÷ the mean
    quarantined: list[Fault] = field(default_factory=list)  #: samples of all ranks that are new in the ledger

    @property
    def samples(self) -> list[tuple[str, str]]:
        """(source, key) of every stream of the whole global batch, in its order."""
        return list(zip(self.key_sources, self.keys, strict=True))


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
    waits: Waits | None = None,
) -> "Loader":
    """Open every source of the blend. `image_size` in pixels; `quarantine_path` is the ledger to append to.

    Ranks that share a `data_rank` see the same batches; of their frames each decodes and delivers its `frame_share`.
    Every step has a multiple of `microbatch_multiple` microbatches; the last ones may be padding alone.

    Where there are several ranks of either kind, give the ledger's path to one of them and `agree`
    (`parallel.agreement.gather_lists`) to all: without it each rank masks and counts what it alone could not decode.
    `waits` is told, by whichever thread prepares, which samples' frames it waits for.
    Raises ConfigError for illegal settings, DataError for sources that are missing, damaged or stale.
    """
    if not 0 <= data_rank < data_ranks:
        raise ConfigError(f"data rank {data_rank} does not exist among {data_ranks} data ranks")
    if microbatch_multiple < 1:
        raise ConfigError(f"microbatch_multiple={microbatch_multiple} must be at least 1")
    store = ShardStore.of(data)
    opened = open_blend(data, compiler, tokenizer, image_size, seed, store)
    place = Place(data_rank, data_ranks, frame_share, microbatch_multiple)
    planner = Planner(opened, RowLimits.of(data), data.cost, place)
    quarantine = Quarantine(
        quarantine_path,
        {corpus.name: len(corpus) for corpus in opened.corpora},
        data.max_bad_fraction,
        {corpus.name: corpus.index.fingerprint for corpus in opened.corpora},
    )
    pool = DecodePool.of(data, data.workers, store) if data.workers else None
    # Augmented streams differ from epoch to epoch, so keeping them would only fill memory.
    preparer = Preparer(data, opened, planner, quarantine, place, image_size, compiler.augmented, pool, store, waits)
    return Loader(opened, preparer, quarantine, agree)


class Loader:
    """Iterates for ever over `GlobalStep`; use as a context manager or call `close()`."""

    def __init__(self, opened: OpenBlend, preparer: Preparer, quarantine: Quarantine, agree: Agree | None):
        self._blend = opened.blend
        self._opened = opened
        self._preparer = preparer
        self._quarantine = quarantine
        self._untold = quarantine.earlier  #: faults of the ledger that the other ranks have not heard of yet
        self._known = _uncompilable(opened)  #: faults that all ranks know, but are not recorded yet
        self._agree = agree or (lambda own: [own])
        self._counters: Counter[str] = Counter()
        self._next = (0, 0)  #: the step to be delivered next
        self._closed = False

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the decoder processes and threads. May be called twice."""
        self._closed = True
        self._preparer.close()

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
            changes = order_changes(state.get("order", {}), self._blend.order_settings)
            raise DataError(
                f"the order of samples differs from the saved run's ({'; '.join(changes)}): restore these settings, "
                "or start the stage anew"
            )
        epoch, step = state["epoch"], state["step"]
        if not (epoch >= 0 and 0 <= step < self.steps_per_epoch(epoch)):
            raise DataError(f"the saved position, epoch {epoch} step {step}, does not exist")
        self._next = (epoch, step)
        self._preparer.restart()

    def summary(self) -> dict[str, SourceFigures]:
        """Source → figures of the blend, to be shown before training."""
        return self._opened.figures()

    def counters(self) -> dict[str, int]:
        """Since the loader was built, over all ranks: streams delivered, masked, and samples quarantined; of this rank:
        clips, or its shares of them, decoded and served from the cache."""
        return {
            "streams": self._counters["streams"],
            "masked": self._counters["masked"],
            "quarantined": len(self._quarantine),
            "clips_decoded": self._preparer.frames.decoded,
            "clips_cached": self._preparer.frames.cached,
        }

    def __iter__(self) -> Iterator[GlobalStep]:
        return self

    def __next__(self) -> GlobalStep:
        if self._closed:
            raise RuntimeError("the loader is closed")
        began = time.perf_counter()
        prepared, quarantined = self._agreed()
        plan = prepared.plan
        # The following step is made ready while this one is trained.
        self._next = self._blend.after(*self._next)
        self._preparer.begin(*self._next)
        masked = self._preparer.masked(plan, prepared.keys)
        # Rarely another rank told of a stream that this one had taken for good.
        batches = prepared.batches if prepared.masked == masked & set(plan.own()) else None
        microbatches = batches if batches is not None else self._preparer.collate(prepared, masked)
        self._counters["streams"] += len(prepared.keys) - len(masked)
        self._counters["masked"] += len(masked)
        return GlobalStep(
            epoch=plan.epoch,
            step=plan.step,
            microbatches=microbatches,
            keys=prepared.keys,
            key_sources=[self._opened.corpora[source].name for source in plan.sources],
            data_wait_s=time.perf_counter() - began,
            masked=len(masked),
            own_keys=[prepared.keys[stream] for stream in plan.own()],
            sources=self._preparer.planner.counts(plan, sorted(masked)),
            imbalance=plan.imbalance,
            quarantined=quarantined,
        )

    def _agreed(self) -> tuple[Prepared, list[Fault]]:
        """The next step, decoded, and the samples that failed in it for the first time.

        All ranks learn of every rank's failures and count the same, so that all mask the same streams and all stop
        together; a rank that stopped alone would leave the others waiting for it.
        """
        faults, prepared, error = list(self._untold), None, None
        try:
            prepared = self._preparer.take(*self._next)
            faults += prepared.faults
        except Exception as caught:  # whatever it is: the other ranks would wait for this one
            error = caught
        reason = str(error) if isinstance(error, MossTrainError) else f"{type(error).__name__}: {error}"
        told = self._agree([fault.to_json() for fault in faults] + ([{"error": reason}] if error else []))
        if error is not None:
            raise error
        assert prepared is not None
        for rank, entries in enumerate(told):
            if entries and "error" in entries[-1]:
                raise DataError(f"rank {rank}: {entries[-1]['error']}")
        new = [*(Fault(**entry) for entries in told for entry in entries), *self._known]
        self._untold, self._known = [], []
        return prepared, self._quarantine.add(new)


def _uncompilable(opened: OpenBlend) -> list[Fault]:
    """The samples that were left out of the order because they do not compile."""
    return [
        Fault(
            key=corpus.key(number),
            source=corpus.name,
            fingerprint=corpus.index.fingerprint,
            shard=corpus.index.shard_name(number),
            reason=reason,
            exception="SampleError",
            backend="compiler",
        )
        for corpus, lengths in zip(opened.corpora, opened.lengths, strict=True)
        for number, reason in lengths.faults.items()
    ]
