"""The training loop of one stage, top to bottom: data, step, figures, evaluation, checkpoint, stop."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

from moss_train.data.collate import padding_of_batches
from moss_train.data.loader import GlobalStep, Loader
from moss_train.engines.memory import MemoryFigures, measure_step
from moss_train.engines.protocol import Engine, StepOutput
from moss_train.parallel import groups, phases
from moss_train.parallel.agreement import gather_lists
from moss_train.report.metrics_file import finite_or_none
from moss_train.report.samples_file import SamplesFile
from moss_train.report.tracker import Tracker
from moss_train.train.config import StageConfig
from moss_train.train.guards import Guards
from moss_train.train.signals import StopRequest


@dataclass
class Progress:
    """How far a stage has come; saved with every checkpoint."""

    step: int = 0  #: steps taken
    total: int = 0  #: steps of the stage
    trained_tokens: int = 0  #: labels that entered the loss, over all steps and ranks
    streams: int = 0  #: streams of all global batches so far, masked ones included
    seconds: float = 0.0  #: spent in the loop, over all runs of the stage
    evaluated: int = 0  #: step of the last evaluation; 0 before the first
    figures: dict[str, float] = field(default_factory=dict)  #: of that evaluation, as logged

    @property
    def finished(self) -> bool:
        return self.step >= self.total

    def to_json(self) -> dict[str, Any]:
        own = asdict(self)
        return {name: own[name] for name in own if name not in ("evaluated", "figures")}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Progress":
        """The progress that a checkpoint's state holds; one from before evaluations were saved has none."""
        measured = state.get("metrics", {"step": 0, "figures": {}})
        return cls(**state["progress"], evaluated=measured["step"], figures=measured["figures"])

    def metrics(self) -> dict[str, Any]:
        """JSON of the last evaluation, by which the best checkpoint is kept."""
        return {"step": self.evaluated, "figures": finite_or_none(self.figures)}


class Checkpoints(Protocol):
    """What the loop asks of whoever saves; every rank asks at the same steps."""

    def save(self) -> None:
        """Begin to save the last step taken."""

    def settle(self) -> None:
        """Note whether an earlier save has been completed; raise when it has failed."""


def train(
    stage: StageConfig,
    engine: Engine,
    loader: Loader,
    tracker: Tracker,
    progress: Progress,
    checkpoints: Checkpoints,
    evaluate: Callable[[], dict[str, float]] | None,
    stop: StopRequest,
    guards: Guards,
    samples: SamplesFile | None = None,
) -> int:
    """Train until `progress.total` steps are taken; returns 0, or the signal that asked to stop earlier.

    A checkpoint of the last step taken has been begun on every way out but an exception. `samples` is the record of
    what was consumed, where this process keeps one.
    """
    device = groups.state().device
    batches = iter(loader)
    measured = False
    if not progress.finished and (signal := stop.agreed(device)):
        return signal  # nothing to save yet
    while not progress.finished:
        began = time.perf_counter()
        phases.begin_step(progress.step + 1)
        with phases.phase("data"):
            batch = next(batches)
        phases.hold(batch.own_keys)
        train_step = partial(engine.train_step, batch.microbatches, guards.loss_limit())
        if measured:
            output = train_step()
        else:
            output, memory = measure_step(train_step, device)
            record_memory(tracker, memory)
            measured = True

        progress.step += 1
        progress.trained_tokens += output.labels
        progress.streams += len(batch.keys)
        progress.seconds += time.perf_counter() - began
        if samples is not None:
            samples.write(progress.step, batch.samples)
        record_step(tracker, batch, output, time.perf_counter() - began)
        guards.heed(progress.step, output, batch.samples, tracker)
        for fault in batch.quarantined:
            tracker.event("quarantine", progress.step, key=fault.key, source=fault.source, reason=fault.reason)

        if evaluate is not None and _every(stage.eval_every, progress.step):
            with phases.phase("evaluate"):
                progress.figures = {f"eval/{name}": value for name, value in evaluate().items()}
            progress.evaluated = progress.step
            for name, value in progress.figures.items():
                tracker.record_metric(name, value, reduce="last")
        evaluated = evaluate is not None and progress.evaluated == progress.step
        if _every(stage.log_every, progress.step) or progress.step == 1 or evaluated or progress.finished:
            tracker.commit(progress.step)

        checkpoints.settle()
        signal = stop.agreed(device)
        if progress.finished or signal or _every(stage.save_every, progress.step):
            if samples is not None:
                samples.sync()
            checkpoints.save()
        if signal and not progress.finished:
            return signal
    return 0


def record_memory(tracker: Tracker, memory: MemoryFigures) -> None:
    """Note what a step took on the process that needed most; every process must call it. MB are 10⁶ bytes."""
    told = gather_lists([[memory.activations, memory.peak]])
    activations, peak = (max(figures) for figures in zip(*(own[0] for own in told), strict=True))
    tracker.record_metric("memory/activations_mb", activations / 1e6, reduce="last")
    tracker.record_metric("memory/peak_mb", peak / 1e6, reduce="last")


def record_step(tracker: Tracker, batch: GlobalStep, output: StepOutput, seconds: float) -> None:
    """Note the figures of one step, all of them the global batch's but for the padding, which is this process's."""
    tracker.record_metric("loss", output.loss)
    for kind, loss in output.per_kind.items():
        tracker.record_metric(f"loss/{kind}", loss)
        tracker.record_metric(f"share/{kind}", output.per_kind_share.get(kind, 0.0))
    if output.silence_share is not None:
        tracker.record_metric("share/silence", output.silence_share)
    for name, value in output.decisions.items():
        tracker.record_metric(f"decision/{name}", value)
    groups_of_figures = {"calibration": output.calibration, "decision_head": output.decision_head}
    for group, figures in (groups_of_figures | {"margin": output.margin}).items():
        for name, value in figures.items():
            # Sums over the bins of a calibration curve add up over steps, means do not.
            tracker.record_metric(f"{group}/{name}", value, reduce="sum" if "bin_" in name else "mean")
    tracker.record_metric("grad_norm", output.grad_norm)
    tracker.record_metric("learning_rate", max(output.lr.values()), reduce="last")
    for group, rate in output.lr.items():
        tracker.record_metric(f"learning_rate/{group}", rate, reduce="last")
    tracker.record_metric("tokens_per_s", output.labels, reduce="rate")
    tracker.record_metric("frames_per_s", sum(counts.frames for counts in batch.sources.values()), reduce="rate")
    tracker.record_metric("data_wait", batch.data_wait_s / seconds)
    tracker.record_metric("step_seconds", seconds)
    tracker.record_metric("masked", batch.masked, reduce="sum")
    tracker.record_metric("skipped", float(output.skipped), reduce="sum")
    record_sources(tracker, batch, output)


def record_sources(tracker: Tracker, batch: GlobalStep, output: StepOutput) -> None:
    """What each source of the blend gave and how well it is predicted; how evenly the batch was laid out."""
    for name, counts in batch.sources.items():
        tracker.record_metric(f"source/{name}/streams", counts.streams, reduce="sum")
        tracker.record_metric(f"source/{name}/tokens", counts.tokens, reduce="sum")
        tracker.record_metric(f"source/{name}/frames", counts.frames, reduce="sum")
    for name, loss in output.per_source.items():
        tracker.record_metric(f"source/{name}/loss", loss)
    text, frame = padding_of_batches(batch.microbatches)
    tracker.record_metric("data/text_padding", text)
    tracker.record_metric("data/frame_padding", frame)
    tracker.record_metric("data/imbalance", batch.imbalance)


def _every(steps: int, step: int) -> bool:
    return steps > 0 and step % steps == 0
