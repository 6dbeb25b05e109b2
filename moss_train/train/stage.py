"""One stage: model, engine, data and weights put together, resumed where it stopped, trained, saved."""

import gc
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moss_train.checkpoint.provenance import collect_provenance
from moss_train.checkpoint.random_state import capture_random_state, restore_random_state, seed_random_state
from moss_train.checkpoint.retention import apply_retention
from moss_train.checkpoint.store import Checkpoint, latest, load_checkpoint, save_checkpoint
from moss_train.data.batch import FrameShare
from moss_train.data.loader import Loader, build_loader
from moss_train.engines import build_engine
from moss_train.engines.pieces import MemorySource
from moss_train.engines.protocol import Engine
from moss_train.model.build import build_model, whole_model
from moss_train.model.groups import trainable_names
from moss_train.model.precision import Precision
from moss_train.objectives.streaming_loss import StreamingLoss
from moss_train.parallel import groups
from moss_train.parallel.agreement import gather_lists
from moss_train.report.tracker import Tracker
from moss_train.streams.tokenizer import StreamTokenizer
from moss_train.train.compose import resolved_dict
from moss_train.train.config import RunConfig
from moss_train.train.evaluation import Evaluator
from moss_train.train.handoff import StagePlan
from moss_train.train.loop import Progress, train
from moss_train.train.signals import StopRequest
from moss_train.train.weights import Origin


@dataclass
class _Stage:
    """What one stage's training holds in its hands."""

    plan: StagePlan
    engine: Engine
    loader: Loader
    progress: Progress
    origin: str | None  #: fingerprint of the weights it started from
    provenance: dict[str, Any]  #: of what runs; collected once, since files may change under a run

    def save(self) -> None:
        """Write a checkpoint of the last step taken; every rank must call it."""
        state = self.engine.state_dict()
        if groups.state().is_main:
            save_checkpoint(
                self.plan.checkpoints,
                self.progress.step,
                state.tensors | capture_random_state(),
                {
                    "stage": self.plan.name,
                    "origin": self.origin,
                    "progress": self.progress.to_json(),
                    "loader": self.loader.state_dict(),
                    "engine": state.metadata,
                },
                self.provenance,
            )
            apply_retention(self.plan.checkpoints, self.plan.config.keep)
        if dist.get_world_size() > 1:
            dist.barrier()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of this very stage, bit for bit in the layout that wrote it. Every process reads the
        whole tensors' files, of which it copies its parts."""
        self.engine.load(MemorySource(checkpoint.tensors, str(checkpoint.path)), checkpoint.state["engine"])
        self.loader.load_state_dict(checkpoint.state["loader"])
        restore_random_state(checkpoint.tensors)
        self.progress = Progress(**checkpoint.state["progress"])


def finished(plan: StagePlan) -> bool:
    """Whether the stage's newest checkpoint is of its last step."""
    newest = latest(plan.checkpoints)
    return newest is not None and load_checkpoint(newest, only=()).step >= plan.steps


def run_stage(
    run: RunConfig,
    plan: StagePlan,
    origin: Origin | None,
    tokenizer: StreamTokenizer,
    tracker: Tracker,
    evaluator: Evaluator | None,
    stop: StopRequest,
) -> int:
    """Train one stage to its end, from its newest checkpoint or from `origin` (None: fresh weights).

    Returns 0, or the signal that stopped it.
    """
    gc.collect()  # the model of the stage before lies in reference cycles
    state = groups.state()
    newest = latest(plan.checkpoints)
    with torch.device("meta"):
        whole = whole_model(run.model, state)
    is_fresh = newest is None and origin is None
    precision = Precision.named(run.precision)
    model = build_model(
        run.model,
        state,
        precision.dtype,
        run.engine.recompute,
        seed=run.seed if is_fresh else None,
        fp8=precision.fp8,
    )
    seed_random_state(run.seed)  # here, so that it does not matter whether and how weights were drawn
    engine = build_engine(run.engine)
    engine.setup(
        model,
        trainable_names(whole, plan.config.trainable),
        plan.config.optim,
        StreamingLoss(plan.config.objective, tokenizer.special.silence, tuple(plan.sources)),
        plan.steps,
    )
    if newest is None and origin is not None:
        # Through the engine, whose optimizer keeps the digits that 16-bit weights lose.
        engine.load_weights(origin.source(whole))
    with build_loader(
        plan.config.data,
        plan.config.compiler,
        tokenizer,
        run.model.vision.image_size,
        run.seed,
        state.data_rank,
        state.data_ranks,
        _ledger(plan) if state.is_main else None,
        gather_lists,
        FrameShare(state.share_rank, state.share_ranks),
        # The interleaved schedule runs as many microbatches at a time as there are stages.
        run.layout.pp if run.layout.vpp > 1 else 1,
    ) as loader:
        began_from = origin.fingerprint if origin is not None else None
        provenance = collect_provenance(resolved_dict(run), tokenizer.fingerprint)
        stage = _Stage(plan, engine, loader, Progress(total=plan.steps), began_from, provenance)
        if newest is not None:
            stage.restore(load_checkpoint(newest))
        tracker.start_stage(plan.name, plan.steps, stage.progress.step)

        def save() -> None:
            stage.save()
            tracker.event("checkpoint", stage.progress.step)

        evaluate = partial(evaluator.figures, engine, model, plan.config.compiler) if evaluator is not None else None
        signal = train(plan.config, engine, loader, tracker, stage.progress, save, evaluate, stop)
        counters = loader.counters()
        tracker.event("data", stage.progress.step, **counters)
        if state.is_main and counters["masked"]:
            print(f"{plan.name}: {_losses(counters, plan)}", flush=True)
        tracker.end_stage(completed=not signal)
    return signal


def _losses(counters: dict[str, int], plan: StagePlan) -> str:
    masked = counters["masked"]
    return (
        f"{masked} of {masked + counters['streams']} streams were masked; samples in quarantine: "
        f"{counters['quarantined']}, see {_ledger(plan)}"
    )


def _ledger(plan: StagePlan) -> Path:
    return plan.directory / "quarantine.jsonl"
