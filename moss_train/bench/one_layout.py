"""Training steps in one layout, on every rank of it: how long they take, what they send, what memory they need."""

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moss_train.bench.predicted import Microbatch, predicted_bytes
from moss_train.bench.traffic import Traffic
from moss_train.data.batch import Batch, FrameShare, plain_places
from moss_train.engines import build_engine
from moss_train.engines.config import EngineConfig, OptimConfig
from moss_train.engines.memory import LiveTensors, MemoryFigures, measure_step
from moss_train.engines.protocol import Engine
from moss_train.model.build import build_model, whole_model
from moss_train.model.config import ModelConfig, RecomputeConfig
from moss_train.model.groups import resolve_groups, trainable_names
from moss_train.objectives.config import ObjectiveConfig
from moss_train.objectives.streaming_loss import StreamingLoss
from moss_train.parallel import groups
from moss_train.parallel.config import LayoutConfig
from moss_train.streams.compiled import IGNORED_LABEL, Kind

_SILENCE = 0  #: stands for the silence token in random text


@dataclass(frozen=True)
class Shape:
    """One microbatch of a synthetic global batch; every row has the same frames, an anchor and some text for each."""

    rows: int = 1
    frames: int = 2  #: of a row
    tokens_a_frame: int = 16  #: anchor and text; of the whole row when it has no frames


@dataclass(frozen=True)
class Work:
    """What is trained, on what, and how."""

    model: ModelConfig
    layout: LayoutConfig
    microbatches: tuple[Shape, ...]  #: of the global batch; data rank d of n takes those from d on, every n-th
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    trainable: str = "all"  #: a preset of `model.groups`
    seed: int = 0
    engine: str = "megatron"
    deepspeed: Mapping[str, Any] = field(default_factory=dict)  #: further fields of DeepSpeed's JSON

    @property
    def engine_config(self) -> EngineConfig:
        """What the engine is told."""
        return EngineConfig(name=self.engine, recompute=self.recompute, deepspeed=dict(self.deepspeed))

    @property
    def ranks(self) -> int:
        """Processes it runs on."""
        return self.layout.tp * self.layout.pp * self.layout.cp * (self.layout.dp or 1)


@dataclass(frozen=True)
class RankFigures:
    """What one rank measured: memory and bytes on one step, the time on those after it."""

    step_seconds: tuple[float, ...]
    memory: MemoryFigures
    foreign: int  #: live bytes that were there before the model
    sent: dict[str, float]  #: bytes by `<kind>.<operation>`
    predicted: dict[str, float]  #: empty for deepspeed, for which there is no formula
    losses: tuple[float, ...]  #: of every step

    @property
    def loss(self) -> float:
        """Of the first step."""
        return self.losses[0]

    @property
    def peak_memory(self) -> int:
        """Most live tensor bytes: weights, gradients, optimizer state, batch and what the step adds to them."""
        return self.memory.peak - self.foreign


def measure(rank: int, ranks: int, work: Work, steps: int, unobserved: int = 0) -> RankFigures:
    """A job for `equivalence.ranks.Ranks`: one step under observation, then `steps` timed ones on the same batches.

    unobserved: steps before these, for engines whose first one is not like the others.
    """
    gc.collect()
    with LiveTensors() as live:
        foreign = live.current
    engine, batches, labels = prepare(work, unobserved + steps)
    _, first_losses = _timed(engine, batches, unobserved)
    with Traffic() as traffic:
        output, memory = measure_step(lambda: engine.train_step(batches), groups.state().device)
    predicted: dict[str, float] = {}
    if work.engine == "megatron":
        sizes = [Microbatch(b.rows, b.ids_RT.shape[1], b.frames, n) for b, n in zip(batches, labels, strict=True)]
        trained = resolve_groups(work.trainable)
        predicted = predicted_bytes(work.model, work.layout, ranks, rank, sizes, trained, work.recompute)
    seconds, losses = _timed(engine, batches, steps)
    return RankFigures(seconds, memory, foreign, dict(traffic.bytes), predicted, (*first_losses, output.loss, *losses))


def time_only(rank: int, ranks: int, work: Work, steps: int) -> tuple[float, ...]:
    """A job as `measure`, for the seconds alone: one step to warm up, then `steps` timed ones."""
    engine, batches, _ = prepare(work, steps)
    engine.train_step(batches)
    seconds, _ = _timed(engine, batches, steps)
    return seconds


def prepare(work: Work, steps: int) -> tuple[Engine, list[Batch], list[int]]:
    """Engine, this process's microbatches, and how many labels each trains."""
    state = groups.initialize(work.layout, seed=work.seed)
    model = build_model(work.model, state, recompute=work.recompute, seed=work.seed)
    with torch.device("meta"):
        trained = trainable_names(whole_model(work.model, state), work.trainable)
    engine = build_engine(work.engine_config)
    objective = StreamingLoss(ObjectiveConfig(), silence_id=_SILENCE, anchor_id=work.model.text.vocabulary_size)
    engine.setup(model, trained, OptimConfig(lr=1e-4), objective, total_steps=steps + 1)

    batches, labels = [], []
    for number in range(state.data_rank, len(work.microbatches), state.data_ranks):
        batch = synthetic_batch(work.model, work.microbatches[number], number)
        labels.append(int(((batch.labels_RT != IGNORED_LABEL) & (batch.weights_RT > 0)).sum()))
        batches.append(own_frames(batch, state))
    return engine, batches, labels


def _timed(engine: Engine, batches: list[Batch], steps: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds and losses of `steps` steps."""
    seconds, losses = [], []
    for _ in range(steps):
        torch.distributed.barrier()
        began = time.perf_counter()
        output = engine.train_step(batches)
        seconds.append(time.perf_counter() - began)
        losses.append(output.loss)
    return tuple(seconds), tuple(losses)


def own_frames(batch: Batch, state: groups.ParallelState) -> Batch:
    """The batch with the pixels of this process's share, as the loader gives it: in memory of their own, so that the
    others' are freed."""
    shared = batch.share(FrameShare(state.share_rank, state.share_ranks))
    return replace(shared, frames_NCHW=shared.frames_NCHW.clone())


def synthetic_batch(model: ModelConfig, shape: Shape, seed: int) -> Batch:
    """Random tokens and pixels. A token sees every frame whose anchor is at or before it; anchors and the last token of
    a row train nothing, half of the others are silence."""
    generator = torch.Generator().manual_seed(seed)
    side, vocabulary = model.vision.image_size, model.text.vocabulary_size
    assert vocabulary is not None
    rows, frames = shape.rows, shape.frames
    tokens = shape.tokens_a_frame * max(1, frames)

    def drawn(high: int, *size: int) -> torch.Tensor:
        return torch.randint(0, high, size, generator=generator)

    place_T = torch.arange(tokens)
    is_anchor_RT = (place_T % shape.tokens_a_frame == 0).expand(rows, tokens) & (frames > 0)
    ids_RT = drawn(vocabulary, rows, tokens).masked_fill(is_anchor_RT, vocabulary)
    kinds_RT = torch.where(drawn(2, rows, tokens) == 1, int(Kind.IDLE_SILENCE), int(Kind.TEXT))
    labels_RT = drawn(vocabulary, rows, tokens).masked_fill(kinds_RT == Kind.IDLE_SILENCE, _SILENCE)
    ignored_RT = is_anchor_RT | (place_T == tokens - 1)
    anchors_F = torch.arange(frames) * shape.tokens_a_frame
    counters: dict[str, Any] = {
        name: torch.zeros(rows, tokens, dtype=torch.int32)
        for name in ("segments_RT", "visible_lo_RT", "sink_lo_RT", "sink_hi_RT")
    }
    return Batch(
        ids_RT=ids_RT,
        labels_RT=labels_RT.masked_fill(ignored_RT, IGNORED_LABEL),
        kinds_RT=kinds_RT.masked_fill(ignored_RT, int(Kind.IGNORED)).to(torch.uint8),
        weights_RT=torch.ones(rows, tokens),
        positions_RT=place_T.expand(rows, tokens).clone(),
        visible_hi_RT=is_anchor_RT.cumsum(1).to(torch.int32),
        frames_NCHW=drawn(256, rows * frames, 3, side, side).to(torch.uint8),
        frame_rows_N=torch.arange(rows).repeat_interleave(frames),
        frame_slots_N=torch.arange(frames).repeat(rows),
        frame_positions_RF=anchors_F.expand(rows, frames).clone(),
        frame_counts_R=torch.full((rows,), frames),
        origins_RT=torch.full((rows, tokens), -1),
        **plain_places(place_T.expand(rows, tokens).clone()),
        **counters,
    )
