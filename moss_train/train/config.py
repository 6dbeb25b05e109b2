"""The configuration of a run: what recipes and overrides fill, in one tree, checked once after all overrides."""

import math
import os
from dataclasses import dataclass, field
from typing import Any

from moss_train.checkpoint.config import CheckpointConfig
from moss_train.cli_options import unknown_name
from moss_train.data.config import DataConfig
from moss_train.engines.config import EngineConfig, OptimConfig
from moss_train.engines.engine_rules import check_engine, check_optimizer
from moss_train.errors import ConfigError, MossTrainError
from moss_train.evaluate.config import DecodeConfig, EvaluationConfig
from moss_train.evaluate.judges import check_judge
from moss_train.evaluate.metrics import OFFLINE, OFFLINE_SILENT, figure_names
from moss_train.model.config import ModelConfig
from moss_train.model.layout_rules import check_layout
from moss_train.objectives.config import ObjectiveConfig
from moss_train.parallel.config import LayoutConfig
from moss_train.report.config import TrackingConfig
from moss_train.streams.config import CompilerConfig, TokenizerConfig
from moss_train.train.watchdog_config import WatchdogConfig

RESUME = ("auto", "fallback", "never")
SPIKE_POLICIES = ("off", "warn", "skip", "stop")
KEEP_BEST_MODES = ("max", "min")


@dataclass
class GuardConfig:
    """When a stage does not take an update, or ends. A step whose loss or gradient is not finite is always skipped."""

    max_skipped_in_a_row: int | None = 10
    """Most steps skipped one after the other before the run ends; 0 allows none, null any number. With fp16, a step
    skipped because gradients overflowed is not counted, and ends no row, while the loss scale still falls in answer."""
    max_skipped: int | None = 100
    """Most steps skipped in the whole stage before the run ends, counted likewise; 0 allows none, null any number."""
    spike: str = "warn"
    """What a loss spike does: `off` (none is looked for), `warn` (an event is logged, the update taken), `skip` (the
    update is not taken, on any rank, and counts as skipped), `stop` (the run ends, nothing new is saved)."""
    spike_window: int = 128
    """How many losses of steps that were taken a step's loss is compared with. No step is a spike before half of them
    are there."""
    spike_factor: float = 6.0
    """A spike is a loss above the window's median + this × its spread: 1.4826 × the median absolute deviation from the
    median, which is the standard deviation of normally distributed losses."""
    spike_floor: float = 0.05
    """Least spread, as a share of the median: with a factor of 6 and 0.05 no loss below 1.3 × the median is a spike. 0
    sets none."""

    def validate(self) -> None:
        for name in ("max_skipped_in_a_row", "max_skipped"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"guards.{name}={value}: must be at least 0, or null for any number")
        if self.spike not in SPIKE_POLICIES:
            raise ConfigError(f"guards.spike={self.spike!r}: legal values are {', '.join(SPIKE_POLICIES)}")
        if self.spike_window < 8:
            raise ConfigError(f"guards.spike_window={self.spike_window}: must be at least 8, or set guards.spike=off")
        if not self.spike_factor > 0:
            raise ConfigError(f"guards.spike_factor={self.spike_factor}: must be above 0, or set guards.spike=off")
        if not self.spike_floor >= 0:
            raise ConfigError(f"guards.spike_floor={self.spike_floor}: must be at least 0")


@dataclass
class StageConfig:
    """One training of the pipeline. The published stages stand in `recipes/stage/`."""

    order: int = 0
    """Place in the pipeline: stages run by increasing order."""
    init: str = "previous"
    """Weights to start from: `scratch` (random), `previous` (the stage before), or the path of a checkpoint, of a
    stage's folder (its newest) or a run's (its last trained stage's), a file `best` of `keep_best`, or of a folder of
    Hugging Face safetensors."""
    trainable: Any = "all"
    """What is trained: a preset (`all`, `projector_only`, …) or a list of parameter groups; see `model/groups.py`."""
    data: DataConfig = field(default_factory=DataConfig)
    """The blend and how it is batched."""
    blend: str | None = None
    """Mixture whose shares of text, image and video samples become `data.shares`: a file of `data_specs/blends/` by
    name (`moss_sft`) or a path. Null leaves `data.shares` as given."""
    compiler: CompilerConfig = field(default_factory=CompilerConfig)
    """How samples become tokens: frame rate, frame limits, visibility."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What the loss weighs; a name takes a published objective of `recipes/objective/`: moss_vl, streamo, dispider."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning-rate schedule."""
    steps: int | None = None
    """Optimizer steps; null trains for `epochs` passes over the blend."""
    epochs: float | None = 1.0
    """Passes over the blend. With `steps` set it is the most passes allowed, a guard against repeating data unawares;
    null allows any number."""
    save_every: int = 200
    """Steps between checkpoints; 0 saves only at the end. The reference saves every 200."""
    keep: int = 2
    """How many checkpoints of a stage are kept, the newest; at least 1."""
    keep_every: int | None = None
    """Checkpoints whose step is a multiple of this are kept for ever; null keeps none for that."""
    keep_best: str | None = None
    """The figure of an evaluation (`eval/speak_f1`, `eval/teacher_forced/lm_ppl`, `eval/offline_accuracy`) by which one
    more checkpoint is kept, the best: of those that were evaluated at their very step, of equals the newer. Null keeps
    none for that."""
    keep_best_mode: str = "max"
    """Whether the best has the largest figure (`max`) or the smallest (`min`, for rates of errors and delays)."""
    eval_every: int = 0
    """Steps between free-running evaluations on `evaluate.source`; 0 evaluates only after the run."""
    log_every: int = 1
    """Steps between logged lines; an evaluated step has one too."""
    guards: GuardConfig = field(default_factory=GuardConfig)
    """Budgets of skipped steps, and what a loss spike does."""

    def validate(self, name: str) -> None:
        """Raise ConfigError for the first illegal field, its path starting with `stages.<name>`."""
        for field_name, least in (("save_every", 0), ("keep", 1), ("eval_every", 0), ("log_every", 1)):
            value = getattr(self, field_name)
            if value < least:
                raise ConfigError(f"stages.{name}.{field_name}={value}: must be at least {least}")
        if self.steps is None and self.epochs is None:
            raise ConfigError(f"stages.{name}: set steps or epochs; both are null")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"stages.{name}.steps={self.steps}: must be at least 1, or null to count by epochs")
        if self.epochs is not None and not self.epochs > 0:
            raise ConfigError(f"stages.{name}.epochs={self.epochs}: must be above 0, or null")
        legal = isinstance(self.trainable, str) or (
            isinstance(self.trainable, list) and all(isinstance(group, str) for group in self.trainable)
        )
        if not legal or not self.trainable:
            raise ConfigError(f"stages.{name}.trainable={self.trainable}: give a preset or a list of parameter groups")
        if self.keep_every is not None and self.keep_every < 1:
            raise ConfigError(f"stages.{name}.keep_every={self.keep_every}: must be at least 1, or null to keep none")
        if self.keep_every is not None and (self.save_every == 0 or self.keep_every % self.save_every):
            raise ConfigError(
                f"stages.{name}.keep_every={self.keep_every}: must be a multiple of save_every={self.save_every}, "
                "since only saved steps can be kept"
            )
        if self.keep_best_mode not in KEEP_BEST_MODES:
            raise ConfigError(
                f"stages.{name}.keep_best_mode={self.keep_best_mode!r}: legal values are {', '.join(KEEP_BEST_MODES)}"
            )
        for part in (self.data, self.compiler, self.objective, self.optim, self.guards):
            _validate(part, f"stages.{name}.")
        if self.steps is not None:
            self.check_keep_best(name, self.steps)

    def check_keep_best(self, name: str, steps: int) -> None:
        """Raise ConfigError unless checkpoints of a stage of `steps` steps can be told apart by `keep_best`."""
        if self.keep_best is None:
            return
        where = f"stages.{name}.keep_best={self.keep_best}"
        legal = [f"eval/{figure}" for figure in figure_names()]
        if self.keep_best not in legal:
            # The same figure may be measured elsewhere: `eval/lm_ppl` for `eval/teacher_forced/lm_ppl`.
            last = self.keep_best.rpartition("/")[2]
            alike = [name for name in legal if name.rpartition("/")[2] == last]
            if alike:
                raise ConfigError(f"{where}: no such figure; did you mean {' or '.join(alike)}?")
            raise ConfigError(f"{where}: {unknown_name(self.keep_best, self.keep_best, legal, what='figure')}")
        if self.eval_every == 0:
            raise ConfigError(f"{where}: nothing is evaluated during the stage; set stages.{name}.eval_every")
        if self.save_every == 0:
            raise ConfigError(f"{where}: only the last step is saved; set stages.{name}.save_every")
        together = math.lcm(self.save_every, self.eval_every)
        if together > steps and steps % self.eval_every:
            raise ConfigError(
                f"{where}: no checkpoint is ever evaluated, since none of the {steps} steps is a multiple of both "
                f"save_every={self.save_every} and eval_every={self.eval_every}; set both to at most {steps}, one to a "
                "multiple of the other"
            )


@dataclass
class RunEvaluation:
    """Evaluation on held-out streams, during and after training."""

    source: str | None = None
    """Packed folder of held-out streams; null evaluates nothing."""
    offline_source: str | None = None
    """Packed folder of held-out conversations, answered offline beside the streams of `source`, so that what the
    real-time stage costs is seen; null asks none."""
    offline_stage: str = "sft"
    """The stage whose `compiler` the conversations are compiled with, so that all stages are asked the same; where the
    run has no such stage, the evaluated one's."""
    judge: str = "text"
    """Who decides whether an answer is right: `text` (equal words), `world` (the synthetic world's meaning) or
    `module:Class` of your own."""
    during_training: int | None = 64
    """Most streams, and most conversations, of an evaluation between steps (`eval_every`); null for as many as after
    training."""
    settings: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Batch, tolerance and limit."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """How replies are read from predictions."""


@dataclass
class RunConfig:
    """A run: a model, its tokenizer and a pipeline of stages (a recipe of one stage is a pipeline of one)."""

    name: str = "run"
    """Name in reports and of the output folder."""
    output_dir: str = "outputs/${name}"
    """Where checkpoints, logs and reports go, one folder a stage; relative to the working directory."""
    data_root: str = "data"
    """Folder whose subfolders `align`, `temporal`, `sft`, `realtime` and `heldout` the recipes' sources default to."""
    seed: int = 1
    """Seed of fresh weights, of the data order and of augmentations."""
    resume: str = "auto"
    """`auto` goes on where the newest complete checkpoint of the pipeline's current stage in `output_dir` stopped, and
    refuses one that is damaged; `fallback` then takes the newest that is not, and says so; `never` demands a fresh
    folder."""
    precision: str = "fp32"
    """Number format of weights and activations: fp32, bf16, fp16, or fp8 (8-bit matrices over bf16; Ada GPUs and later
    with Transformer Engine). In all of them the optimizer updates float32 weights. `auto` is bf16 where this machine
    multiplies several times faster in it (GPUs from Ampere on, CPUs with AVX512-BF16), else fp32; the resolved
    configuration names which."""
    dry_run: bool = False
    """Check everything, print the resolved pipeline and stop before training."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model's sizes; named ones stand in `recipes/model/`."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer and its special tokens."""
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """The pipeline: name → stage."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """Parallel degrees."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The training engine."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where metrics go."""
    evaluate: RunEvaluation = field(default_factory=RunEvaluation)
    """Held-out evaluation."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    """When a run counts as stalled and is ended."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """How checkpoints are written."""

    def validate(self) -> None:
        """Raise ConfigError for the first field that cannot be. Called once, after all overrides."""
        if not self.stages:
            raise ConfigError("no stage to train: choose a recipe, for example recipe=realtime")
        if self.resume not in RESUME:
            raise ConfigError(f"resume={self.resume!r}: legal values are {', '.join(RESUME)}")
        check_judge(self.evaluate.judge, "evaluate.judge")
        if self.evaluate.during_training is not None and self.evaluate.during_training < 1:
            raise ConfigError(f"evaluate.during_training={self.evaluate.during_training}: must be at least 1, or null")
        for part in (self.model, self.tokenizer, self.engine, self.tracking, self.evaluate.settings, self.watchdog):
            _validate(part)
        _validate(self.evaluate.decode, "evaluate.")
        if self.evaluate.decode.decide_by == "head" and not self.model.decision_head:
            raise ConfigError(
                "evaluate.decode.decide_by=head: the model has no decision head; set model.decision_head=true"
            )
        self.check_layout()
        for name, stage in self.stages.items():
            stage.validate(name)
            if stage.keep_best is not None:
                self._check_measured(f"stages.{name}.keep_best={stage.keep_best}", stage.keep_best)
            check_optimizer(self.engine, self.layout, stage.optim.name, f"stages.{name}.optim.name")
            if stage.objective.decision_head_weight is not None and not self.model.decision_head:
                where = f"stages.{name}.objective.decision_head_weight={stage.objective.decision_head_weight}"
                raise ConfigError(f"{where}: the model has no decision head; set model.decision_head=true")
        self._check_head_is_trained()
        orders: dict[int, str] = {}
        for name, stage in self.stages.items():
            if stage.order in orders:
                raise ConfigError(f"stages.{name}.order={stage.order}: stages.{orders[stage.order]} has the same order")
            orders[stage.order] = name

    def _check_head_is_trained(self) -> None:
        """A fresh head that is not trained says "50 %" for ever, whatever its loss weighs. Earlier stages may leave
        it to the last one that asks for it."""
        asked = [(name, stage) for name, stage in self.ordered_stages() if stage.objective.decision_head_weight]
        if not asked:
            return
        from moss_train.model.groups import PRESETS  # loads megatron-core, for which help must not wait

        name, stage = asked[-1]
        trained = PRESETS.get(stage.trainable, ()) if isinstance(stage.trainable, str) else stage.trainable
        if "decision_head" not in trained:
            raise ConfigError(
                f"stages.{name}.objective.decision_head_weight={stage.objective.decision_head_weight}: "
                f"stages.{name}.trainable={stage.trainable} leaves the head as it is; add decision_head to it, or set "
                "the weight to null"
            )

    def _check_measured(self, where: str, figure: str) -> None:
        if self.evaluate.source is None:
            raise ConfigError(f"{where}: nothing is evaluated; set evaluate.source")
        if figure in (f"eval/{OFFLINE}", f"eval/{OFFLINE_SILENT}") and self.evaluate.offline_source is None:
            raise ConfigError(f"{where}: no conversation is answered; set evaluate.offline_source")

    def check_layout(self) -> None:
        """Raise ConfigError unless the model can be trained in this layout and precision on the processes that torchrun
        started. A vocabulary that is not known yet is left out: check again when it is."""
        check_layout(self.model, self.layout, int(os.environ.get("WORLD_SIZE", 1)))
        check_engine(self.engine, self.layout, self.precision)
        from moss_train.model.precision import Precision  # loads megatron-core, for which help must not wait

        Precision.named(self.precision).check_sizes(self.model, self.layout.tp)

    def ordered_stages(self) -> list[tuple[str, StageConfig]]:
        """The stages in the order they run."""
        return sorted(self.stages.items(), key=lambda item: item[1].order)


def _validate(part: object, prefix: str = "") -> None:
    """Call the part's own `validate`; its message starts with the part's field name, `prefix` stands before it."""
    validate = getattr(part, "validate", None)
    if validate is None:
        return
    try:
        validate()
    except MossTrainError as error:
        raise ConfigError(f"{prefix}{error}") from error
