"""`moss-train bench cost`: what a token, a pair of tokens, a frame and a token seeing a frame cost on this machine."""

import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from moss_train.bench.names import model_of
from moss_train.bench.one_layout import Shape, Work, time_only
from moss_train.errors import ConfigError
from moss_train.parallel import groups
from moss_train.parallel.config import LayoutConfig

#: columns of the fit; `step` is what a step costs whatever is in it, the optimizer above all
TERMS = ("step", "token", "token_squared", "token_frame", "frame")
_COEFFICIENTS = TERMS[1:]


@dataclass
class CostOptions:
    """Which model, and the rows that are timed."""

    model: str = "bench"
    """Sizes, a file of recipes/model."""
    tokens: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048])
    """Text tokens of the timed rows."""
    frames: list[int] = field(default_factory=lambda: [0, 2, 4])
    """Frames of the timed rows; every number of tokens is timed with every number of frames."""
    repeats: int = 3
    """Timed steps of each row; the median counts."""
    trainable: str = "all"
    """What is trained, a preset of parameter groups: frozen parts cost a forward pass only."""
    max_error: float = 0.15
    """Largest median of the fit's relative errors that is accepted."""

    def validate(self) -> None:
        """Raise ConfigError for the first field that cannot be."""
        if self.repeats < 1:
            raise ConfigError(f"repeats={self.repeats}: must be at least 1")
        for name, least in (("tokens", 1), ("frames", 0)):
            values = getattr(self, name)
            if any(value < least for value in values):
                raise ConfigError(f"{name}={values}: each must be at least {least}")
            if len(set(values)) < 3:
                raise ConfigError(f"{name}={values}: needs three different numbers, or the fit has no hold")
        if len(rows_of(self.tokens, self.frames)) < len(TERMS) + 1:
            raise ConfigError(f"tokens={self.tokens}: must be larger than the numbers of frames, {self.frames}")


def rows_of(tokens: Sequence[int], frames: Sequence[int]) -> list[tuple[int, int]]:
    """(tokens, frames) of each timed row: tokens are rounded down to a multiple of the frames."""
    pairs = itertools.product(sorted(set(tokens)), sorted(set(frames)))
    return [(t - t % max(1, f), f) for t, f in pairs if t >= f]


@dataclass(frozen=True)
class Fit:
    """Seconds of each term, and how well they explain the times."""

    seconds: dict[str, float]
    errors: list[float]  #: relative, of each timed row

    @property
    def overrides(self) -> dict[str, float]:
        """The fields of `CostConfig`, in units of one token's cost, as far as a token costs anything by itself."""
        unit = self.seconds["token"] or max(self.seconds[name] for name in _COEFFICIENTS) or 1.0
        return {name: float(f"{self.seconds[name] / unit:.4g}") for name in _COEFFICIENTS}


def fit_costs(rows: Sequence[tuple[int, int]], seconds: Sequence[float]) -> Fit:
    """Least squares of relative errors with coefficients that are not negative: the best of all choices of terms."""
    t, f = np.asarray(rows, np.float64).T
    columns = np.stack([np.ones_like(t), t, t * t, t * f, f], axis=1)
    relative = columns / np.asarray(seconds)[:, None]
    # Columns of like size, or least squares takes the small ones for noise.
    sizes = np.linalg.norm(relative, axis=0)
    sizes[sizes == 0] = 1.0
    best, least = np.zeros(len(TERMS)), np.inf
    for count in range(1, len(TERMS) + 1):
        for chosen in itertools.combinations(range(len(TERMS)), count):
            found, *_ = np.linalg.lstsq(relative[:, chosen] / sizes[list(chosen)], np.ones(len(t)), rcond=None)
            if (found < 0).any():
                continue
            coefficients = np.zeros(len(TERMS))
            coefficients[list(chosen)] = found / sizes[list(chosen)]
            missed = float(((relative @ coefficients - 1) ** 2).sum())
            if missed < least - 1e-12:
                best, least = coefficients, missed
    return Fit(dict(zip(TERMS, best.tolist(), strict=True)), np.abs(relative @ best - 1).tolist())


def cost_command(options: CostOptions) -> int:
    """Time training steps of one row each and fit the four coefficients of `data.cost`, by which rows are dealt.

    Forward and backward pass of the real model with its engine, on the device that training would use; what a step
    costs in any case (the optimizer) is fitted apart and left out. Prints the overrides to paste; the last line on
    standard output is JSON, `ok` when the median error of the fit is at most `max_error`.
    """
    model = model_of(options.model)
    rows = rows_of(options.tokens, options.frames)
    console = Console(file=sys.stderr)
    seconds = []
    try:
        for tokens, frames in rows:
            shape = Shape(rows=1, frames=frames, tokens_a_frame=tokens // max(1, frames))
            work = Work(model, LayoutConfig(), (shape,), trainable=options.trainable)
            seconds.append(statistics.median(time_only(0, 1, work, options.repeats)))
            console.print(f"{tokens:6} tokens {frames:4} frames: {seconds[-1]:.4f} s", highlight=False)
    finally:
        groups.shutdown()
    fit = fit_costs(rows, seconds)
    console.print(_table(rows, seconds, fit))
    print("\n".join(f"stages.*.data.cost.{name}={value:g}" for name, value in fit.overrides.items()))
    result = summary(options, fit)
    print(json.dumps(result))
    return 0 if result["ok"] else 1


def summary(options: CostOptions, fit: Fit) -> dict[str, Any]:
    """The last line."""
    error = statistics.median(fit.errors)
    failures = []
    if error > options.max_error:
        failures.append(f"fit_error: {error:.3g}, should be at most {options.max_error}: is the machine idle?")
    figures = fit.overrides | {"fit_error": error, "worst_error": max(fit.errors)}
    figures |= {f"seconds_per_{name}": fit.seconds[name] for name in TERMS}
    figures = {name: float(f"{value:.4g}") for name, value in figures.items()}
    return {"name": "bench cost", "ok": not failures, "figures": figures, "failures": failures}


def _table(rows: Sequence[tuple[int, int]], seconds: Sequence[float], fit: Fit) -> Table:
    table = Table(title="one training step of one row")
    for title in ("tokens", "frames", "seconds", "fit", "error"):
        table.add_column(title, justify="right")
    for (tokens, frames), measured, error in zip(rows, seconds, fit.errors, strict=True):
        terms = (1, tokens, tokens**2, tokens * frames, frames)
        told = sum(fit.seconds[name] * term for name, term in zip(TERMS, terms, strict=True))
        table.add_row(str(tokens), str(frames), f"{measured:.4f}", f"{told:.4f}", f"{error:.1%}")
    return table
