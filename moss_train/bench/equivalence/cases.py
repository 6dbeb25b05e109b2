"""What is compared: a problem (what is trained on which data) and the ways to work on it (a layout and its options).

Every way to work on one problem must end with the same numbers, so a problem has one reference.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from moss_train.bench.equivalence.streams import IMAGE_SIZE, tokenizer
from moss_train.data.config import DataConfig, SourceConfig
from moss_train.engines.config import EngineConfig, OptimConfig
from moss_train.errors import ConfigError
from moss_train.model.config import ModelConfig, RecomputeConfig, TextConfig, VisionConfig
from moss_train.objectives.config import ObjectiveConfig
from moss_train.parallel.config import LayoutConfig
from moss_train.train.config import RunConfig, StageConfig

STEPS = 5  #: optimizer steps of a comparison
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Problem:
    """What is trained on which data."""

    trainable: str = "all"  #: a preset of `model.groups`
    optimizer: str = "sgd"
    clip: float = 0.0
    normaliser: str = "valid"
    streams: str = "mixed"  #: a diet of `streams.DIETS`
    cross_layers: tuple[int, ...] = (1, 4, 6)
    pieces: bool = False  #: with a decision head, class balance, position weight and margins
    rounded: bool = False  #: the starting weights are bfloat16 numbers
    seed: int = 0

    def model(self) -> ModelConfig:
        """Every part of the real model, small; gates are open, so that no path is dead."""
        return ModelConfig(
            name="equivalence",
            vision=VisionConfig(
                hidden_size=16,
                local_layers=2,
                global_layers=1,
                attention_heads=2,
                mlp_size=24,
                patch_size=7,
                image_size=IMAGE_SIZE,
                intermediate_layers=[0, 1],
            ),
            text=TextConfig(
                vocabulary_size=tokenizer().vocabulary_size,
                hidden_size=32,
                layers=8,
                cross_layers=list(self.cross_layers),
                attention_heads=4,
                key_value_heads=2,
                mlp_size=48,
                rope_theta=10000.0,
                rope_scaling=None,
            ),
            pool_stride=2,
            initial_gate=0.7,
            init_std=0.15,
            decision_head=self.pieces,
        )

    def optim(self) -> OptimConfig:
        """A steady rate. AdamW's epsilon is far above the rounding noise of small gradients, which it would blow up."""
        steady: dict[str, Any] = {"clip": self.clip, "schedule": "constant", "warmup_steps": 0}
        if self.optimizer == "sgd":
            # In bfloat16 what one step rounds must not grow over the next ones.
            return OptimConfig(name="sgd", lr=0.02 if self.rounded else 0.2, **steady)
        return OptimConfig(name="adamw", lr=1e-2, eps=1e-3, weight_decay=0.1, **steady)

    def objective(self) -> ObjectiveConfig:
        """Unequal weights and a focal factor: labels must keep their places and their kinds."""
        pieces: dict[str, Any] = {}
        if self.pieces:
            pieces = {"balance": "state", "frame_position_weight": 0.6, "margin": 2.0, "margin_weight": 0.3}
        return ObjectiveConfig(
            weights={"idle_silence": 0.3, "onset": 2.0, "stale": 0.5}, focal_gamma=1.0, normaliser=self.normaliser,
            **pieces,
        )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One way to work on one problem."""

    problem: Problem = Problem()
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    precision: str = "fp32"
    pack: bool = True
    micro_batch_rows: int = 1
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    engine_name: str = "megatron"

    @property
    def world_size(self) -> int:
        """Processes it runs on."""
        return self.layout.tp * self.layout.cp * self.layout.pp * (self.layout.dp or 1)

    def engine(self) -> EngineConfig:
        """What the engine is told."""
        return EngineConfig(
            name=self.engine_name,
            recompute=self.recompute,
            overlap_grad_reduce=self.overlap_grad_reduce,
            overlap_param_gather=self.overlap_param_gather,
        )

    def check(self) -> None:
        """Raise ConfigError unless `moss-train train` would start in this way on as many processes."""
        problem = self.problem
        stage = StageConfig(
            trainable=problem.trainable,
            data=DataConfig(sources={"streams": SourceConfig(path="")}),
            objective=problem.objective(),
            optim=problem.optim(),
            steps=STEPS,
        )
        run = RunConfig(
            model=problem.model(),
            stages={"stage": stage},
            layout=self.layout,
            engine=self.engine(),
            precision=self.precision,
        )
        with _started(self.world_size):
            run.validate()

    def describe(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON values; `described` reads it back."""
        return _changes(self)

    def __str__(self) -> str:
        return json.dumps(self.describe())


@contextlib.contextmanager
def _started(processes: int) -> Iterator[None]:
    """As torchrun tells it to each of `processes`."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(processes)
    try:
        yield
    finally:
        if before is None:
            del os.environ["WORLD_SIZE"]
        else:
            os.environ["WORLD_SIZE"] = before


def _changes(value: Any) -> dict[str, Any]:
    plain = type(value)()
    changes: dict[str, Any] = {}
    for one in fields(value):
        mine, usual = getattr(value, one.name), getattr(plain, one.name)
        if mine != usual:
            changes[one.name] = (
                _changes(mine) if is_dataclass(mine) else list(mine) if isinstance(mine, tuple) else mine
            )
    return changes


def described(changes: dict[str, Any]) -> Case:
    """The case that `Case.describe` gave `changes` of. ConfigError for anything else."""
    return _changed(Case(), changes, "case")


def _changed(plain: Any, changes: Any, path: str) -> Any:
    if not isinstance(changes, dict):
        raise ConfigError(f"{path}={changes!r}: must be an object of the fields that are changed")
    values = {}
    for name, value in changes.items():
        if name not in {one.name for one in fields(plain)}:
            raise ConfigError(f"{path}.{name}: there is no such field")
        usual = getattr(plain, name)
        if is_dataclass(usual):
            value = _changed(usual, value, f"{path}.{name}")
        values[name] = tuple(value) if isinstance(usual, tuple) else value
    return replace(plain, **values)
