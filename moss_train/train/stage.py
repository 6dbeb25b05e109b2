"""One stage: model, engine, data and weights put together, resumed where it stopped, trained, saved."""

import contextlib
import gc
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moss_train.checkpoint.provenance import collect_provenance
from moss_train.checkpoint.random_state import (
    capture_random_state,
    restore_random_state,
    seed_anew,
    seed_random_state,
)
from moss_train.checkpoint.retention import BestBy, apply_retention
from moss_train.checkpoint.saver import SaveFigures, Saver
from moss_train.checkpoint.store import CheckpointReader, latest, open_together
from moss_train.data.batch import FrameShare
from moss_train.data.loader import Loader, build_loader
from moss_train.engines import build_engine
from moss_train.engines.pieces import Piece
from moss_train.engines.protocol import Engine
from moss_train.model.build import build_model, whole_model
from moss_train.model.groups import trainable_names
from moss_train.model.precision import Precision
from moss_train.objectives.streaming_loss import StreamingLoss
from moss_train.parallel import groups, phases
from moss_train.parallel.agreement import gather_lists
from moss_train.report.samples_file import FILE_NAME, SamplesFile
from moss_train.report.tracker import Tracker
from moss_train.streams.tokenizer import StreamTokenizer
from moss_train.train.compose import resolved_dict
from moss_train.train.config import RunConfig, StageConfig
from moss_train.train.evaluation import Evaluator
from moss_train.train.guards import Guards
from moss_train.train.handoff import StagePlan
from moss_train.train.loop import Progress, train
from moss_train.train.signals import StopRequest
from moss_train.train.weights import Origin, WithFreshHead


@dataclass
class _Stage:
    """What one stage's training holds in its hands."""

    plan: StagePlan
    engine: Engine
    loader: Loader
    progress: Progress
    guards: Guards
    saver: Saver
    tracker: Tracker
    origin: str | None  #: fingerprint of the weights it started from
    provenance: dict[str, Any]  #: of what runs; collected once, since files may change under a run

    def save(self) -> None:
        """Begin a checkpoint of the last step taken; every rank must call it. Training may go on when it returns."""
        state = groups.state()
        random_states = [
            Piece(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor, constant=True)
            for name, tensor in capture_random_state(state.rank).items()
        ]
        before = self.saver.begin(
            self.progress.step,
            [*self.engine.pieces(), *random_states],
            {
                "stage": self.plan.name,
                "origin": self.origin,
                "ranks": state.world_size,
                "progress": self.progress.to_json(),
                "loader": self.loader.state_dict(),
                "engine": self.engine.metadata(),
                "guards": self.guards.state_dict(),
                "metrics": self.progress.metrics(),
            },
            self.provenance,
            self.engine.expected_shapes(),
        )
        self._note(before)
        self.tracker.record_metric("save/pause_s", self.saver.pause_s, reduce="max")

    def settle(self) -> None:
        """Between steps: note it when the running save is complete, raise when it failed. Every rank must call it."""
        self._note(self.saver.settle())

    def finish(self) -> None:
        """Wait for the running save. Every rank must call it."""
        self._note(self.saver.finish())

    def newest(self) -> Path | None:
        """What the run can go on from, once the running save is complete. Every rank must call it."""
        self.finish()
        return latest(self.plan.checkpoints)

    def _note(self, saved: SaveFigures | None) -> None:
        if saved is not None:
            self.tracker.event(
                "checkpoint", saved.step, pause_s=saved.pause_s, seconds=saved.seconds, bytes=saved.bytes
            )

    def restore(self, checkpoint: CheckpointReader, seed: int) -> None:
        """Go on from a checkpoint of this very stage, bit for bit in the layout that wrote it. Every process reads the
        blocks it needs."""
        self.engine.load(checkpoint, checkpoint.state["engine"])
        self.loader.load_state_dict(checkpoint.state["loader"])
        state = groups.state()
        if checkpoint.state["ranks"] == state.world_size:
            restore_random_state(checkpoint.tensors(f"random/{state.rank}/"), state.rank)
        else:
            seed_anew(seed, checkpoint.step, state.rank)
        self.origin = checkpoint.state.get("origin")
        self.progress = Progress.from_state(checkpoint.state)
        self.guards.load_state_dict(checkpoint.state.get("guards", {}))  # none where it is from before there were any


def run_stage(
    run: RunConfig,
    plan: StagePlan,
    origin: Origin | None,
    tokenizer: StreamTokenizer,
    tracker: Tracker,
    evaluator: Evaluator | None,
    stop: StopRequest,
) -> int:
    """Train one stage to its end, from where it goes on or, when it begins, from `origin` (None: fresh weights).

    Returns 0, or the signal that stopped it.
    """
    phases.begin_stage()
    gc.collect()  # the model of the stage before lies in reference cycles
    state = groups.state()
    newest = plan.point.checkpoint
    with torch.device("meta"):
        whole = whole_model(run.model, state)
    is_fresh = newest is None and origin is None
    precision = Precision.named(run.precision)
    engine = build_engine(run.engine)
    model = build_model(
        run.model,
        state,
        precision.dtype,
        run.engine.recompute,
        seed=run.seed if is_fresh else None,
        fp8=precision.fp8,
        store=engine.parameter_store(),
    )
    seed_random_state(run.seed)  # here, so that it does not matter whether and how weights were drawn
    engine.setup(
        model,
        trainable_names(whole, plan.config.trainable),
        plan.config.optim,
        StreamingLoss(plan.config.objective, tokenizer.special.silence, tuple(plan.sources), tokenizer.special.anchor),
        plan.steps,
    )
    fresh: list[str] = []
    if newest is None and origin is not None:
        source = origin.source(whole)
        # Through the engine, whose optimizer keeps the digits that 16-bit weights lose.
        engine.load_weights(source)
        fresh = sorted(source.fresh) if isinstance(source, WithFreshHead) else []
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
        phases.wait_for,
    ) as loader:
        began_from = origin.fingerprint if origin is not None else None
        provenance = collect_provenance(resolved_dict(run), tokenizer.fingerprint)
        saver = Saver(
            plan.checkpoints,
            retain=partial(_retain, plan.config),
            asynchronous=run.checkpoint.asynchronous,
        )
        guards = Guards(plan.config.guards, plan.name, lambda: stage.newest())
        stage = _Stage(plan, engine, loader, Progress(total=plan.steps), guards, saver, tracker, began_from, provenance)
        saver.check()
        if newest is not None:
            stage.restore(open_together(newest), run.seed)
        tracker.start_stage(plan.name, plan.steps, stage.progress.step)
        if fresh:
            tracker.event("starts_fresh", 0, weights=", ".join(fresh), because=f"{origin.path} has none")
        for passed_over, reason in plan.point.skipped:
            tracker.event("fallback", stage.progress.step, passed_over=passed_over, reason=reason)
        evaluate = partial(evaluator.figures, engine, plan.config.compiler) if evaluator is not None else None
        with saver:
            with phases.steps(), _samples_file(run, plan, stage.progress.step) as samples:
                signal = train(
                    plan.config, engine, loader, tracker, stage.progress, stage, evaluate, stop, guards, samples
                )
            stage.finish()
        counters = loader.counters()
        tracker.event("data", stage.progress.step, **counters)
        if state.is_main and counters["masked"]:
            print(f"{plan.name}: {_losses(counters, plan)}", flush=True)
        tracker.end_stage(completed=not signal)
    return signal


def _retain(stage: StageConfig, directory: Path) -> None:
    """Remove the checkpoints that need not be kept."""
    best = BestBy(stage.keep_best, stage.keep_best_mode) if stage.keep_best is not None else None
    apply_retention(directory, stage.keep, stage.keep_every, best)


def _samples_file(run: RunConfig, plan: StagePlan, step: int) -> contextlib.AbstractContextManager[SamplesFile | None]:
    """The record of consumed samples, where this process keeps one."""
    if not (run.tracking.samples and groups.state().is_main):
        return contextlib.nullcontext()
    return SamplesFile(plan.directory / FILE_NAME, step)


def _losses(counters: dict[str, int], plan: StagePlan) -> str:
    masked = counters["masked"]
    return (
        f"{masked} of {masked + counters['streams']} streams were masked; samples in quarantine: "
        f"{counters['quarantined']}, see {_ledger(plan)}"
    )


def _ledger(plan: StagePlan) -> Path:
    return plan.directory / "quarantine.jsonl"
