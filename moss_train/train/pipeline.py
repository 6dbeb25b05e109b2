"""The pipeline: check every stage, then train one after the other, each from where the one before ended."""

from pathlib import Path
from signal import Signals

import torch

from moss_train.checkpoint.store import latest
from moss_train.data.sources import SourceFigures
from moss_train.engines import require_engine
from moss_train.errors import CheckpointError, ConfigError
from moss_train.model.config import RecomputeConfig
from moss_train.model.parts import split_layers
from moss_train.model.precision import Precision
from moss_train.parallel import groups
from moss_train.parallel.agreement import gather_lists
from moss_train.report.tracker import Tracker
from moss_train.streams.tokenizer import load_tokenizer
from moss_train.train.compose import resolved_dict, save_run
from moss_train.train.config import RunConfig
from moss_train.train.evaluation import Evaluator
from moss_train.train.handoff import StagePlan, plan_pipeline
from moss_train.train.resume import resume_point
from moss_train.train.signals import StopRequest
from moss_train.train.stage import run_stage
from moss_train.train.watchdog import Watchdog
from moss_train.train.weights import Origin


def run_pipeline(run: RunConfig, stop: StopRequest | None = None) -> int:
    """Train every stage that is not finished yet; returns 0, or the number of the signal that stopped it.

    Nothing is written and no weight is made before every stage has passed the checks of `plan_pipeline`.
    `stop`: entered already, so that no signal before this call is lost; None enters one.
    Raises PeerLost when another process of the job is gone.
    """
    if stop is None:
        with StopRequest() as stop:
            return run_pipeline(run, stop)
    with Watchdog(run.watchdog) as watchdog:
        return _run_stages(run, stop, watchdog)


def _run_stages(run: RunConfig, stop: StopRequest, watchdog: Watchdog) -> int:
    tokenizer = load_tokenizer(run.tokenizer)
    if run.model.text.vocabulary_size is None:
        run.model.text.vocabulary_size = tokenizer.vocabulary_size
        run.check_layout()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    Precision.named(run.precision).check_supported(device)
    if run.model.attention == "flex" and device.type == "cpu":
        raise ConfigError("model.attention=flex: has no backward pass on CPUs; set model.attention=segments")
    state = groups.initialize(run.layout, run.seed)
    watchdog.connect(state)
    precisions = sorted({name for (name,) in gather_lists([run.precision])})
    if len(precisions) > 1:  # `auto` on unlike machines
        raise ConfigError(f"precision: the processes chose {' and '.join(precisions)}; give precision=fp32 or bf16")
    require_engine(run.engine, run.layout, run.precision)
    plans = plan_pipeline(run, tokenizer)
    if state.is_main:
        print(describe(run, plans), flush=True)
    signal = stop.agreed(state.device)
    if signal and state.is_main:
        print(f"stopped by {Signals(signal).name} before its first step; the same command goes on", flush=True)
    if signal or run.dry_run:
        return signal
    output = Path(run.output_dir)
    if state.is_main:
        output.mkdir(parents=True, exist_ok=True)
        save_run(run, output)
    evaluator = Evaluator(run, tokenizer) if run.evaluate.source is not None else None
    if evaluator is not None and any(stage.eval_every for stage in run.stages.values()):
        evaluator.open()
    before: StagePlan | None = None
    with Tracker(run.tracking, output, run.name, resolved_dict(run), main=state.is_main) as tracker:
        for plan in plans:
            if not plan.finished:
                signal = run_stage(run, plan, _origin(run, plan, before), tokenizer, tracker, evaluator, stop)
                if signal:
                    if state.is_main:
                        print(f"{plan.name}: {_stopped(signal, plan)}", flush=True)
                    return signal
            elif state.is_main:
                print(f"{plan.name}: finished earlier, {plan.point.checkpoint}", flush=True)
            before = plan
    return 0


def _stopped(signal: int, plan: StagePlan) -> str:
    newest = latest(plan.checkpoints)
    saved = f"saved as {newest}" if newest is not None else "before there was anything to save"
    return f"stopped by {Signals(signal).name}, {saved}; the same command goes on"


def _origin(run: RunConfig, plan: StagePlan, before: StagePlan | None) -> Origin | None:
    """The weights that a stage begins from; None: fresh ones, or it has begun."""
    if plan.point.checkpoint is not None:
        return None
    if plan.config.init != "previous":
        return plan.origin
    assert before is not None  # checked when planning
    # What was found when planning is older than the training since.
    point = before.point if before.finished else resume_point(before.name, before.checkpoints, run.resume)
    if point.checkpoint is None:
        raise CheckpointError(f"stages.{plan.name}.init=previous: {before.checkpoints} holds no checkpoint")
    return Origin(point.checkpoint, hugging_face=False)


def describe(run: RunConfig, plans: list[StagePlan]) -> str:
    """The resolved pipeline in a few lines, for the log and for `dry_run=true`."""
    state = groups.state()
    lines = [
        f"{run.name}: model {run.model.name}, {plans[0].parameters:,} parameters, {state.world_size} process"
        f"{'es' if state.world_size > 1 else ''} on {state.device.type}, seed {run.seed}, output {run.output_dir}",
        f"  layout: {_layout(run)}",
        f"  {run.precision}; recompute: {_recompute(run.engine.recompute)}",
    ]
    for plan in plans:
        stage = plan.config
        start = plan.origin.path if plan.origin else stage.init
        done = plan.point.checkpoint
        lines.append(
            f"  {plan.name}: {plan.steps} steps × {stage.data.global_batch_size} streams "
            f"= {plan.epochs:.2f} epochs of {plan.epoch_samples:,} samples; "
            f"trains {stage.trainable} ({plan.trained_parameters:,}); lr {stage.optim.lr:g} "
            f"{stage.optim.schedule}; from {start}" + (f"; goes on from {done.name}" if done else "")
        )
        lines += [f"    {line}" for name, source in plan.sources.items() for line in _describe_source(name, source)]
        lines += [f"    warning: stages.{plan.name}.{doubt}" for doubt in stage.compiler.doubts()]
    return "\n".join(lines)


def _describe_source(name: str, source: SourceFigures) -> list[str]:
    """What the blend takes from a source, and what it leaves."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in source.kinds.items())
    hours = f"; {source.video_hours:,.1f} h of video" if source.video_hours >= 0.05 else ""
    lines = [
        f"{name}: {kinds}{hours}; {source.epoch_samples:,} an epoch ({source.passes:.2f} passes"
        + (")" if source.max_epochs is None else f", at most {source.max_epochs:g} in the stage)"),
        f"  {source.share:.0%} of the streams, {source.token_share:.0%} of the text, {source.frame_share:.0%} of the "
        f"frames; mean {source.mean_tokens:,.0f} tokens, {source.mean_frames:,.1f} frames",
    ]
    counts = (
        (source.split, f"{source.split:,} longer than a row, split"),
        (source.over_budget, f"{source.over_budget:,} longer than a row, left out"),
        (source.faulty, f"{source.faulty:,} do not compile, left out"),
    )
    notes = [text for count, text in counts if count]
    return [*lines, f"  of its samples {'; '.join(notes)}"] if notes else lines


def _layout(run: RunConfig) -> str:
    layout, state = run.layout, groups.state()
    degrees = f"tp {layout.tp}{' with sp' if layout.sp else ''}, cp {layout.cp}, dp {state.data_ranks}, pp {layout.pp}"
    split = "+".join(map(str, split_layers(run.model, layout)))
    if layout.stage_chunks > 1:
        degrees += f" of {layout.stage_chunks} chunks each{' (DualPipeV)' if layout.dualpipev else ''}"
    shares = f"frames shared by {layout.share_ranks} ({layout.sharding})" if layout.share_ranks > 1 else ""
    engine = f"engine {run.engine.name}" if run.engine.name != "megatron" else ""
    parts = [degrees, f"layers {split}", shares, f"zero {layout.zero}" if layout.zero else "", engine]
    return "; ".join(part for part in parts if part)


def _recompute(recompute: RecomputeConfig) -> str:
    layers = {"self layers": recompute.self_layers, "cross layers": recompute.cross_layers}
    parts = [f"{name} {how}" for name, how in layers.items() if how != "none"]
    if recompute.tower:
        parts.append("tower")
    if recompute.tower_frames is not None:
        parts.append(f"tower by {recompute.tower_frames} frames")
    if recompute.head_positions is not None:
        parts.append(f"head by {recompute.head_positions} positions")
    return ", ".join(parts) or "nothing"
