"""`moss-train bench layouts`: does any layout change a number? Layouts and batches at random, against one process."""

import json
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from moss_train.bench.equivalence.cases import Case, described
from moss_train.bench.equivalence.compare import Comparison, worse
from moss_train.bench.equivalence.comparing import Comparer
from moss_train.bench.equivalence.drawing import draw_case
from moss_train.bench.equivalence.ranks import JobError
from moss_train.engines.config import ENGINES
from moss_train.errors import ConfigError

BOTH = "both"
_SHOWN = 3  #: failures of one layout that are told; the others are of the same kind


_FIGURES = ("loss", "grad_norm", "gradient", "weight")


@dataclass
class LayoutsOptions:
    """How many layouts are drawn."""

    samples: int = 50
    """Layouts to try."""
    seed: int = 0
    """Of the layouts, the options of their training, the weights and the data."""
    ranks: int = 8
    """Processes of the largest layout."""
    engine: str = BOTH
    """megatron, deepspeed, or both: which engine trains is drawn too."""
    case: str | None = None
    """One case, as a line of an earlier run shows it (JSON): that one alone is tried."""
    deadline_s: float = 180.0
    """Seconds after which a layout counts as hanging; a few are used on two cores that are not busy otherwise."""

    def validate(self) -> None:
        """Raise ConfigError for the first field that cannot be."""
        for name in ("samples", "ranks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must be at least 0")
        if self.engine not in (BOTH, *ENGINES):
            raise ConfigError(f"engine={self.engine}: legal values are {', '.join((BOTH, *ENGINES))}")
        if not self.deadline_s > 0:
            raise ConfigError(f"deadline_s={self.deadline_s}: must be above 0 seconds")


class _Tally:
    """The summary: worst deviations and what failed."""

    def __init__(self):
        self.layouts = 0
        self.failures: list[str] = []
        # Looser tolerances apply to AdamW's weights and to bfloat16; their deviations are told apart.
        self.worst = {"worst_loss": 0.0, "worst_gradient": 0.0, "worst_weight": 0.0}

    def add(self, case: Case, comparison: Comparison) -> None:
        half = ".bf16" if case.precision == "bf16" else ""
        optimizer = ".adamw" if not half and case.problem.optimizer == "adamw" else ""
        self._worst(f"worst_loss{half}", comparison.loss)
        self._worst(f"worst_gradient{half}", comparison.gradient)
        self._worst(f"worst_weight{half}{optimizer}", comparison.weight)
        self._count(case, comparison.failures)

    def add_error(self, case: Case, error: Exception) -> None:
        self._count(case, [str(error)])

    def _count(self, case: Case, failures: list[str]) -> None:
        self.layouts += 1
        if failures:
            self.failures.append(f"{case}: " + "; ".join(failures[:_SHOWN]))

    def _worst(self, name: str, value: float) -> None:
        self.worst[name] = worse(self.worst.get(name, 0.0), value)

    def summary(self) -> dict[str, Any]:
        worst = {name: _number(value) for name, value in self.worst.items()}
        figures = {"layouts": self.layouts, "failures": len(self.failures)} | worst
        return {"name": "bench layouts", "ok": not self.failures, "figures": figures, "failures": self.failures}


def _number(value: float) -> float | None:
    """JSON knows no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _cases(options: LayoutsOptions) -> list[Case]:
    if options.case is None:
        rng = np.random.default_rng(options.seed)
        engines = ENGINES if options.engine == BOTH else (options.engine,)
        return [draw_case(rng, options.ranks, engines) for _ in range(options.samples)]
    try:
        case = described(json.loads(options.case))
    except json.JSONDecodeError as error:
        raise ConfigError(f"case={options.case}: is not JSON ({error}); copy the case of a printed line") from error
    case.check()
    return [case]


def layouts_command(options: LayoutsOptions) -> int:
    """Train small models in random layouts on forked CPU processes and compare with plain PyTorch in one process.

    Engine, layout, recompute, precision, what is trained, optimizer, packing and streams are drawn from what
    `moss-train train` accepts. Losses, every gradient, and every weight after one and five steps are compared;
    `worst_…` are the largest relative deviations in fp32 (weights under SGD), `….adamw` and `….bf16` those with
    tolerances of their own. Prints one JSON line a layout, then the summary.
    """
    console, tally = Console(stderr=True), _Tally()
    cases = _cases(options)
    with Comparer(max(case.world_size for case in cases)) as comparer:
        for number, case in enumerate(cases):
            following = cases[number + 1].problem if number + 1 < len(cases) else None
            told = f"{number + 1}/{len(cases)} {case.engine_name}, {case.world_size} processes {case.layout}"
            console.print(told, highlight=False)
            began = time.monotonic()
            line: dict[str, Any] = {"case": case.describe(), "processes": case.world_size}
            try:
                comparison = comparer.compare(case, deadline_s=options.deadline_s, ahead=following)
            except (JobError, AssertionError) as error:
                tally.add_error(case, error)
                line |= {"ok": False, "error": str(error)}
            else:
                tally.add(case, comparison)
                line |= {
                    "ok": comparison.ok,
                    **{name: _number(getattr(comparison, name)) for name in _FIGURES},
                    "failures": comparison.failures,
                }
            print(json.dumps(line | {"seconds": round(time.monotonic() - began, 2)}), flush=True)
    summary = tally.summary()
    print(json.dumps(summary), flush=True)
    return 0 if summary["ok"] else 1
