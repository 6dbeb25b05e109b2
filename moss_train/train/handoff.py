"""Checks of the whole pipeline before step 0 of anything: does every stage fit the one before it, the model, the
tokenizer and the data? The model is built on the meta device and the data are known from their indexes alone, so a
mistake in the last stage costs seconds, not the run."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moss_train.checkpoint.store import Checkpoint, checkpoint_shapes, load_checkpoint
from moss_train.data.blend import Blend
from moss_train.data.shards.index import load_index
from moss_train.data.shards.transfer import shown
from moss_train.data.sources import OpenBlend, SourceFigures, open_blend
from moss_train.engines.fit import require_fit
from moss_train.engines.trainable import check_trainable
from moss_train.errors import CheckpointError, ConfigError, DataError, MossTrainError
from moss_train.model.build import whole_model
from moss_train.model.groups import parameter_groups, trainable_names
from moss_train.model.video_model import VideoModel
from moss_train.parallel import groups
from moss_train.parallel.agreement import gather_lists
from moss_train.streams.tokenizer import StreamTokenizer
from moss_train.train.blend import apply_blend
from moss_train.train.compose import resolved_dict, run_from_dict
from moss_train.train.config import RunConfig, StageConfig
from moss_train.train.resume import ResumePoint, resume_points
from moss_train.train.weights import Origin, expected_shapes, find_origin_together

#: Parts of a stage's configuration that a resumed stage must keep; the data order has its own fingerprint.
_KEPT = ("trainable", "compiler", "objective", "optim")


@dataclass(frozen=True)
class StagePlan:
    """One stage as it will run."""

    name: str
    config: StageConfig
    directory: Path  #: `<output_dir>/<stage>`
    point: ResumePoint  #: where it goes on, if it has begun
    origin: Origin | None  #: weights to start from; None: random, or the stage before in this run
    steps: int
    epochs: float  #: passes over the blend
    epoch_samples: int  #: of the first epoch; a part of a split sample counts as one
    sources: dict[str, SourceFigures]  #: what the blend takes from each source
    trained_parameters: int
    parameters: int

    @property
    def checkpoints(self) -> Path:
        """Folder of the stage's checkpoints."""
        return self.directory / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether its last step has been taken, and saved."""
        return self.point.checkpoint is not None and self.point.step >= self.steps


def plan_pipeline(run: RunConfig, tokenizer: StreamTokenizer) -> list[StagePlan]:
    """Every stage in order, checked. Process groups must exist.

    Raises ConfigError (a field), DataError (a source) or CheckpointError (a predecessor) that names the stage.
    """
    check_tokenizer(run, tokenizer)
    with torch.device("meta"):
        model = whole_model(run.model, groups.state())
    points = resume_points({name: _checkpoints(run, name) for name, _ in run.ordered_stages()}, run.resume)
    plans: list[StagePlan] = []
    for name, stage in run.ordered_stages():
        try:
            plans.append(_plan_stage(run, tokenizer, model, name, stage, points[name], plans))
        except MossTrainError as error:
            if f"stages.{name}" in str(error):
                raise
            raise type(error)(f"stages.{name}: {error}") from error
    if run.evaluate.source is not None:
        kinds = load_index(run.evaluate.source).totals.kinds
        if "stream" not in kinds:
            raise ConfigError(
                f"evaluate.source={shown(run.evaluate.source)}: it holds no stream, only {', '.join(sorted(kinds))}"
            )
    return plans


def check_tokenizer(run: RunConfig, tokenizer: StreamTokenizer) -> None:
    """Raise ConfigError unless the tokenizer's ids have rows in the embedding and, but for the anchor, in the head."""
    text = run.model.text
    if tokenizer.vocabulary_size != text.vocabulary_size:
        raise ConfigError(
            f"model.text.vocabulary_size={text.vocabulary_size}, but the tokenizer has {tokenizer.vocabulary_size} "
            "rows: choose the model's own tokenizer with tokenizer.path, or set model.text.vocabulary_size=null"
        )
    rows = text.vocabulary_size + text.extra_embedding_rows
    if tokenizer.special.anchor >= rows:
        raise ConfigError(
            f"model.text.extra_embedding_rows={text.extra_embedding_rows}: the anchor's id {tokenizer.special.anchor} "
            f"needs at least {tokenizer.special.anchor - text.vocabulary_size + 1}"
        )


def _plan_stage(
    run: RunConfig,
    tokenizer: StreamTokenizer,
    model: VideoModel,
    name: str,
    stage: StageConfig,
    point: ResumePoint,
    before: list[StagePlan],
) -> StagePlan:
    trained = trainable_names(model, stage.trainable)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    check_trainable(trained, parameter_groups(model), stage.optim)
    origin = None
    if stage.init == "previous":
        if not before:
            raise ConfigError(
                f"stages.{name}.init=previous, but this recipe has no stage before it: "
                f"give stages.{name}.init=<checkpoint>, or scratch"
            )
        # A finished predecessor must fit; one that is still to run has this very model.
        found = before[-1].point
        if found.checkpoint is not None and found.damage is None:
            Origin(found.checkpoint, hugging_face=False).check(model, tokenizer)
    elif stage.init != "scratch":
        origin = find_origin_together(stage.init)
        origin.check(model, tokenizer)
    apply_blend(name, stage)
    opened = _main_first(
        lambda: open_blend(
            stage.data,
            stage.compiler,
            tokenizer,
            run.model.vision.image_size,
            run.seed,
            progress=groups.state().is_main,
        )
    )
    steps = _steps(name, stage, opened.blend)
    stage.check_keep_best(name, steps)
    plan = StagePlan(
        name=name,
        config=stage,
        directory=_checkpoints(run, name).parent,
        point=point,
        origin=origin,
        steps=steps,
        epochs=opened.blend.epochs_of(steps),
        epoch_samples=opened.blend.epoch_size(0),
        sources=opened.figures(),
        trained_parameters=sum(sizes[parameter] for parameter in trained),
        parameters=sum(sizes.values()),
    )
    _check_progress(run, plan, before[-1] if before else None, tokenizer, expected_shapes(model))
    return plan


def _checkpoints(run: RunConfig, stage: str) -> Path:
    return Path(run.output_dir) / stage / "checkpoints"


def _main_first(open_sources: Callable[[], OpenBlend]) -> OpenBlend:
    """The sources, opened by the main process first: it measures the lengths that are missing, the others read what it
    has stored."""
    state = groups.state()
    if state.world_size == 1:
        return open_sources()
    opened, error = None, None
    if state.is_main:
        try:
            opened = open_sources()
        except MossTrainError as caught:
            error = caught
    told = gather_lists([str(error)] if error is not None else [])
    if error is not None:
        raise error
    if told[0]:
        raise DataError(told[0][0])
    return opened or open_sources()


def _check_progress(
    run: RunConfig,
    plan: StagePlan,
    before: StagePlan | None,
    tokenizer: StreamTokenizer,
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """Raise unless the stage's own newest checkpoint, if there is one, may be gone on from."""
    newest = plan.point.checkpoint
    if newest is None:
        return
    if run.resume == "never" and not _restarted():
        raise ConfigError(f"resume=never, but {newest} exists: choose another output_dir, or resume=auto")
    if plan.point.damage is not None:
        return  # nothing of it is read
    checkpoint = load_checkpoint(newest, only=())
    _check_same_run(run, plan, tokenizer, checkpoint)
    _check_lineage(plan, before, checkpoint)
    found = {name: shape for name, shape in checkpoint_shapes(newest).items() if name in shapes}
    require_fit(found, shapes, str(newest))


def _restarted() -> bool:
    """Whether torchrun has started the workers again, which then meet the checkpoints of their own run. Each node's
    agent counts what failed on its own node, so it is asked of all. Collective."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return any(gather_lists([True] if restarted else []))


def _steps(name: str, stage: StageConfig, blend: Blend) -> int:
    """The stage's steps; ConfigError when they need more passes over the data than the stage allows."""
    if stage.steps is None:
        assert stage.epochs is not None  # validated
        return blend.steps_of(stage.epochs)
    if stage.epochs is not None and stage.steps > blend.steps_of(stage.epochs):
        batch, size = stage.data.global_batch_size, blend.epoch_size(0)
        raise ConfigError(
            f"stages.{name}.steps={stage.steps} × data.global_batch_size={batch} = {stage.steps * batch} samples, but "
            f"the blend has {size} an epoch and stages.{name}.epochs={stage.epochs} allows {stage.epochs:g}: "
            f"raise epochs to {stage.steps / blend.steps_per_epoch(0):.2f}, or lower steps"
        )
    return stage.steps


def _check_lineage(plan: StagePlan, before: StagePlan | None, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError when a stage would be kept, or gone on with, that began from other weights than are there
    now: a stage before it was trained anew since, or `init` is another."""
    fingerprint, where = plan.origin.fingerprint if plan.origin else None, f"init={plan.config.init}"
    if plan.config.init == "previous":
        assert before is not None  # checked when planning
        fingerprint, where = before.point.digest, f"what {before.checkpoints} holds now"
    if checkpoint.state.get("origin") != fingerprint:
        raise CheckpointError(
            f"{checkpoint.path} was not trained from {where}: put back what it was trained from, "
            f"or remove {plan.directory} to train the stage anew"
        )


def _check_same_run(run: RunConfig, plan: StagePlan, tokenizer: StreamTokenizer, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError when a stage would go on under another model, objective or optimizer than it began with."""
    # A field that is newer than the checkpoint had its default.
    saved, now = resolved_dict(run_from_dict(checkpoint.provenance["config"])), resolved_dict(run)
    if checkpoint.state["stage"] != plan.name:
        raise CheckpointError(f"{checkpoint.path} is of stage {checkpoint.state['stage']!r}, not of {plan.name!r}")
    kept_of_run = ("seed", "model", "tokenizer", "precision")
    pairs: list[tuple[str, Any, Any]] = [(name, saved.get(name), now[name]) for name in kept_of_run]
    saved_stage = saved["stages"].get(plan.name, {})
    pairs += [(f"stages.{plan.name}.{name}", saved_stage.get(name), now["stages"][plan.name][name]) for name in _KEPT]
    pairs.append(
        ("the tokenizer's fingerprint", checkpoint.provenance.get("tokenizer_fingerprint"), tokenizer.fingerprint)
    )
    total = checkpoint.state["progress"]["total"]
    changes = [change for name, before, after in pairs for change in _changes(name, before, after)]
    if total != plan.steps:
        changes.append(f"the stage's steps were {total}, are {plan.steps}")
    if changes:
        # `auto` names no precision, and means another one on another machine.
        given = "" if saved["precision"] == now["precision"] else f" (precision={saved['precision']} among it)"
        raise CheckpointError(
            f"{checkpoint.path} was made by another configuration ({'; '.join(changes[:5])}): "
            f"restore it{given}, choose another output_dir, or remove {plan.directory} to train the stage anew"
        )


def _changes(name: str, before: Any, after: Any) -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        return [change for key in keys for change in _changes(f"{name}.{key}", before.get(key), after.get(key))]
    return [] if before == after else [f"{name} was {before!r}, is {after!r}"]
