"""`moss-train bench engines`: what each engine and ZeRO stage costs on a CPU: time, memory, bytes sent."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from moss_train.bench.against_one import BYTES_TOLERANCE, MB, AgainstOne, bytes_error
from moss_train.bench.equivalence.ranks import JobError, Ranks
from moss_train.bench.names import ONE, model_of, named_layout
from moss_train.bench.one_layout import RankFigures, Work
from moss_train.bench.predicted import parameter_count
from moss_train.bench.work_options import WorkOptions
from moss_train.bench.zero_sizes import scaled_sizes
from moss_train.engines.config import ENGINES, OptimConfig
from moss_train.engines.engine_rules import check_engine, check_optimizer
from moss_train.errors import ConfigError
from moss_train.model.config import ModelConfig, RecomputeConfig
from moss_train.model.layout_rules import check_layout
from moss_train.parallel.config import LayoutConfig

LOSS_TOLERANCE = 1e-5  #: relative, of every step
_ZERO = (0, 1, 2, 3)
#: Steps before the one whose memory and bytes are told: in its first one ZeRO 3 takes note of the order of modules,
#: which processes then compare, and prefetches nothing yet.
_UNOBSERVED = 1
_WIDTH = 140  #: columns of the table where it goes to a file

Say = Callable[[str], None]  #: takes a line about what goes on


@dataclass
class EnginesOptions(WorkOptions):
    """Which models, engines, stages and layouts, and how much work."""

    models: list[str] = field(default_factory=lambda: ["tiny", "bench_100m"])
    """Sizes, files of recipes/model."""
    engines: list[str] = field(default_factory=lambda: list(ENGINES))
    """megatron, deepspeed."""
    zero: list[int] = field(default_factory=lambda: list(_ZERO))
    """ZeRO stages, 0 to 3, of every layout. What an engine does not have is left out, with a line that says why."""
    layouts: list[str] = field(default_factory=lambda: ["dp2"])
    """Names as `bench parallel` has them, without zero: dp2, tp2+dp2, pp2+dp2, …"""
    scaled_sizes: bool = True
    """Whether DeepSpeed's buckets, and what ZeRO 3 leaves gathered, are as large beside the model as its defaults are
    beside the 11B; false takes the defaults, 2 GB of bucket for any model."""
    quick: bool = False
    """The first model alone, one timed step: shows that all of it works."""

    def validate(self) -> None:
        """Raise ConfigError for the first field that cannot be."""
        super().validate()
        for name, legal in (("engines", ENGINES), ("zero", _ZERO)):
            for value in getattr(self, name):
                if value not in legal:
                    raise ConfigError(f"{name}={value}: legal values are {', '.join(map(str, legal))}")
        for name in ("models", "engines", "zero", "layouts"):
            values = getattr(self, name)
            if not values:
                raise ConfigError(f"{name}=[]: names nothing to measure; give at least one")
            if len(set(values)) < len(values):
                raise ConfigError(f"{name}={values}: names one twice; give each once")
        for name in self.layouts:
            layout, _ = named_layout(name)
            if layout.zero:
                raise ConfigError(f"layouts={name}: stages are given apart; leave zero{layout.zero} out, set zero=")
            self.require_even(name, layout)


@dataclass(frozen=True)
class Setup:
    """One engine with one ZeRO stage in one layout, on one model."""

    model: str
    engine: str
    layout: str  #: its name, without the stage
    work: Work

    @property
    def name(self) -> str:
        """Under which its figures stand."""
        return f"{self.model}.{self.engine}.{self.layout}+zero{self.work.layout.zero}"


@dataclass(frozen=True)
class Measured:
    """What a setup's processes measured."""

    setup: Setup
    ranks: list[RankFigures]
    step_time_ratio: float

    @property
    def peak_memory(self) -> int:
        """Of the process that needs most."""
        return max(one.peak_memory for one in self.ranks)

    @property
    def sent(self) -> dict[str, float]:
        """By kind, of the process that sends most in one step."""
        return max((one.sent for one in self.ranks), key=lambda sent: sum(sent.values()))


def engines_command(options: EnginesOptions) -> int:
    """Train some steps with each engine and ZeRO stage, each on processes of its own, and compare with one process.

    One process is the megatron engine alone with the whole global batch, timed before and after each of the others.
    After a step to warm up, every process counts its live tensor bytes and what it sends in one step; those after it
    are timed. Fails when a loss is not one process's, when megatron's bytes are not the formula's, or when something
    did not run; never because of times. The last line on standard output is JSON; exit code 0 when nothing failed.
    """
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else _WIDTH)

    def say(line: str) -> None:
        console.print(line, highlight=False)

    models = {name: model_of(name) for name in (options.models[:1] if options.quick else options.models)}
    setups = {name: list(setups_of(name, model, options, say)) for name, model in models.items()}
    if not any(setups.values()):
        raise ConfigError(f"zero={options.zero}: none of these is possible; see the lines above")
    steps = 1 if options.quick else options.steps
    found: list[Measured] = []
    failures: list[str] = []
    with Ranks(max(setup.work.ranks for of_model in setups.values() for setup in of_model)) as ranks:
        for name, model in models.items():
            say(f"{name}: {parameter_count(model):,} parameters")
            one = Setup(name, "megatron", ONE, options.work(model, LayoutConfig(dp=1), RecomputeConfig()))
            found += _measured(ranks, one, setups[name], steps, failures, say)
    result = judge(found, failures)
    console.print(_table(found))
    print(json.dumps(result))
    return 0 if result["ok"] else 1


def setups_of(name: str, model: ModelConfig, options: EnginesOptions, say: Say) -> Iterator[Setup]:
    """Every engine and stage that can train the model in the layouts asked for; the others are told, and why."""
    parameters = parameter_count(model)
    for layout_name in options.layouts:
        layout, recompute = named_layout(layout_name)
        for engine in options.engines:
            for zero in options.zero:
                scaled = engine == "deepspeed" and options.scaled_sizes
                sizes = {"deepspeed": scaled_sizes(parameters, zero)} if scaled else {}
                work = options.work(model, replace(layout, zero=zero), recompute, engine=engine, **sizes)
                setup = Setup(name, engine, layout_name, work)
                try:
                    check_layout(model, work.layout, work.ranks)
                    check_engine(work.engine_config, work.layout, "fp32")
                    check_optimizer(work.engine_config, work.layout, OptimConfig().name)
                except ConfigError as error:
                    say(f"{setup.name} is left out: {error}")
                else:
                    yield setup


def _measured(
    ranks: Ranks, one: Setup, setups: Sequence[Setup], steps: int, failures: list[str], say: Say
) -> Iterator[Measured]:
    """One process, then the setups; what does not run is added to `failures`."""
    try:
        against_one = AgainstOne(ranks, one.work, steps, _UNOBSERVED)
    except JobError as error:
        failures.append(f"{one.model}.{ONE}: did not run, nor did what it is compared with: {_reason(error)}")
        return
    yield Measured(one, against_one.figures_of_one, 1.0)
    for setup in setups:
        try:
            measured = Measured(setup, *against_one.measure(setup.work))
        except JobError as error:
            failures.append(f"{setup.name}: did not run: {_reason(error)}")
            say(f"{setup.name}: did not run\n{error}")
        else:
            say(f"{setup.name}: {measured.step_time_ratio:.2f} of one process's step time")
            yield measured


def _reason(error: JobError) -> str:
    """The last line of the traceback that it brings."""
    return str(error).strip().splitlines()[-1]


def judge(found: Sequence[Measured], failures: Sequence[str] = ()) -> dict[str, Any]:
    """The result line: figures by model, engine, layout and stage, and what must hold of them.

    On every rank the loss of every step is one process's (relative 1e-5); bytes that the megatron engine sends equal
    the formula's. failures: of what did not run.
    """
    figures: dict[str, Any] = {}
    failures = list(failures)
    losses = {one.setup.model: one.ranks[0].losses for one in found if one.setup.layout == ONE}
    for one in found:
        is_one = one.setup.layout == ONE
        name = f"{one.setup.model}.{ONE}" if is_one else one.setup.name
        figures[f"{name}.step_time_ratio"] = one.step_time_ratio
        figures[f"{name}.peak_memory_mb"] = one.peak_memory / MB
        figures[f"{name}.rss_mb"] = max(rank.memory.rss for rank in one.ranks) / MB
        figures[f"{name}.bytes"] = sum(one.sent.values())
        figures[f"{name}.bytes_by_kind"] = dict(sorted(one.sent.items()))
        for rank, of_rank in enumerate(one.ranks):
            wrong = _first_difference(of_rank.losses, losses[one.setup.model])
            if wrong is not None:
                step, loss, expected = wrong
                failures.append(f"{name}.loss: {loss} on rank {rank} in step {step}, one process has {expected}")
                break
        errors = [bytes_error(of_rank) for of_rank in one.ranks if one.setup.engine == "megatron"]
        if max(errors, default=0.0) > BYTES_TOLERANCE:
            failures.append(f"{name}.bytes: differ from the formula's by {max(errors):.3g}")
    return {"name": "engines", "ok": not failures, "figures": figures, "failures": failures}


def _first_difference(losses: Sequence[float], expected: Sequence[float]) -> tuple[int, float, float] | None:
    for step, (mine, theirs) in enumerate(zip(losses, expected, strict=True)):
        if not abs(mine - theirs) <= LOSS_TOLERANCE * abs(theirs):
            return step, mine, theirs
    return None


def _table(found: Sequence[Measured]) -> Table:
    table = Table(title="memory and bytes of the process with most of them; MB = 10⁶ bytes, sent in one step")
    for title in ("model", "engine", "zero", "layout", "time ÷ one process", "peak MB", "sent MB"):
        table.add_column(title, justify="left" if title in ("model", "engine", "layout") else "right")
    for one in found:
        table.add_row(
            one.setup.model,
            one.setup.engine,
            str(one.setup.work.layout.zero),
            one.setup.layout,
            f"{one.step_time_ratio:.2f}",
            f"{one.peak_memory / MB:.0f}",
            f"{sum(one.sent.values()) / MB:.2f}",
        )
    return table
