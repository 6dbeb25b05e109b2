"""What watches over a stage's steps: updates that could not be taken, and losses that jump.

The engine skips a step whose loss or gradient is not finite, on all ranks alike. `Guards` counts such steps and ends
the run when there are too many, and it knows which loss is too high to be believed.

A spike is a loss above `median + factor × max(1.4826 × MAD, floor × |median|)` of the last losses whose updates were
taken; MAD is their median absolute deviation from their median. The window of 128, half of which must be filled, and
the factor 6 are those of OLMo-core's SkipStepOptimizer, which takes mean and standard deviation. Median and MAD are not
moved by the very spikes they are to find (Leys et al. 2013, "Detecting outliers"); 1.4826 makes the MAD of normally
distributed values their standard deviation. The floor is ours: where losses hardly scatter, a small step is no spike.

Every rank judges the same figures, sums over all ranks, so all come to the same verdict. The state is saved with every
checkpoint: a run that goes on decides what the uninterrupted one did.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from moss_train.engines.protocol import StepOutput
from moss_train.errors import TrainingError
from moss_train.report.tracker import Tracker
from moss_train.train.config import GuardConfig

_NORMAL = 1.4826  #: standard deviation ÷ median absolute deviation of normally distributed values
_NAMED = 4  #: samples of a batch that an event names


@dataclass(frozen=True)
class Limit:
    """Above which loss a step is a spike, and why."""

    loss: float
    middle: float  #: median of the window
    spread: float  #: what counts as its standard deviation
    losses: int  #: in the window


class Guards:
    """The guards of one stage.

    Args:
        config: budgets and policy.
        stage: its name, for messages.
        newest: gives the newest checkpoint that the run can go on from, for messages.
    """

    def __init__(self, config: GuardConfig, stage: str, newest: Callable[[], Path | None]):
        self._config = config
        self._stage = stage
        self._newest = newest
        self._losses: deque[float] = deque(maxlen=config.spike_window)  #: of the last steps that were taken
        self.skipped_in_a_row = 0
        self.skipped = 0  #: steps of the stage that count against its budget
        self.spikes = 0

    def limit(self) -> Limit | None:
        """What the next step's loss is held against; None while too few steps were taken to tell."""
        if self._config.spike == "off" or len(self._losses) < (self._config.spike_window + 1) // 2:
            return None
        middle = median(self._losses)
        deviation = median(abs(loss - middle) for loss in self._losses)
        spread = max(_NORMAL * deviation, self._config.spike_floor * abs(middle))
        return Limit(middle + self._config.spike_factor * spread, middle, spread, len(self._losses))

    def loss_limit(self) -> float | None:
        """For `Engine.train_step`: the loss above which the update is not taken; None takes every finite one."""
        limit = self.limit() if self._config.spike == "skip" else None
        return limit.loss if limit is not None else None

    def heed(self, step: int, output: StepOutput, samples: Sequence[tuple[str, str]], tracker: Tracker) -> None:
        """Judge a step that was taken, or skipped; call once a step, on every rank.

        samples: (source, key) of the global batch. Logs events and the figure `spikes`. Raises TrainingError when the
        run must not go on; the step's figures are logged before.
        """
        limit = self.limit()
        spike = limit is not None and math.isfinite(output.loss) and output.loss > limit.loss
        tracker.record_metric("spikes", float(spike), reduce="sum")
        self.spikes += spike
        if not output.skipped:
            self.skipped_in_a_row = 0
            self._losses.append(output.loss)
        elif spike or not output.overflowed:
            self.skipped_in_a_row += 1
            self.skipped += 1

        figures = {"loss": output.loss, "grad_norm": output.grad_norm}
        if spike:
            ends = self._config.spike == "stop"
            done = "none, the run ends" if ends else "skipped" if output.skipped else "taken"
            tracker.event("spike", step, **figures, limit=limit.loss, update=done, samples=_first(samples))
        elif output.skipped and not output.overflowed:
            counts = {"in_a_row": self.skipped_in_a_row, "of_stage": self.skipped}
            tracker.event("skipped", step, **figures, **counts, samples=_first(samples))

        if spike and self._config.spike == "stop":
            tracker.commit(step)
            raise TrainingError(self._spike_message(step, output, limit) + _listed(samples))
        if output.skipped and (field := self._exceeded()) is not None:
            tracker.commit(step)
            why = f"loss {output.loss:.4g}, gradient norm {output.grad_norm:.4g}"
            why += f"; a spike, above {limit.loss:.4g}" if spike else ""
            raise TrainingError(self._budget_message(step, why, field, spike) + _listed(samples))

    def state_dict(self) -> dict[str, Any]:
        """JSON: what a run that goes on needs to decide the same."""
        return {
            "losses": list(self._losses),
            "skipped_in_a_row": self.skipped_in_a_row,
            "skipped": self.skipped,
            "spikes": self.spikes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`. A window that is smaller by now keeps the newest losses; a stage that began before
        it had guards gives `{}`, and begins to watch."""
        self._losses = deque(state.get("losses", ()), maxlen=self._config.spike_window)
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        self.skipped = state.get("skipped", 0)
        self.spikes = state.get("spikes", 0)

    def _exceeded(self) -> str | None:
        """The field of the budget that is used up."""
        config = self._config
        if config.max_skipped_in_a_row is not None and self.skipped_in_a_row > config.max_skipped_in_a_row:
            return "max_skipped_in_a_row"
        if config.max_skipped is not None and self.skipped > config.max_skipped:
            return "max_skipped"
        return None

    def _budget_message(self, step: int, why: str, field: str, spike: bool) -> str:
        stage, in_a_row = f"stages.{self._stage}", field == "max_skipped_in_a_row"
        counted = (
            f"the {_ordinal(self.skipped_in_a_row)} step in a row"
            if in_a_row
            else f"the {_ordinal(self.skipped)} step of the stage"
        )
        if spike:
            remedy = f"If losses of this height are no fault, give {stage}.guards.spike=warn"
        elif in_a_row:
            remedy = (
                "In a row it is rather the weights that are at fault than the samples: go on from an older checkpoint "
                f"(write its name into `latest`; {stage}.keep_every keeps some from further back), or lower "
                f"{stage}.optim.lr in a new output_dir"
            )
        else:
            remedy = f"Look at the samples below, or lower {stage}.optim.lr in a new output_dir"
        return (
            f"{stage}: step {step} was skipped ({why}), {counted}; {stage}.guards.{field}="
            f"{getattr(self._config, field)} allows no more. {self._where()} The same command meets the same step "
            f"again. {remedy}; or allow more skipped steps (null: any number). Samples of the batch:"
        )

    def _spike_message(self, step: int, output: StepOutput, limit: Limit) -> str:
        stage, config = f"stages.{self._stage}", self._config
        return (
            f"{stage}: the loss of step {step}, {output.loss:.4g}, is a spike: it is above {limit.loss:.4g}, the "
            f"median {limit.middle:.4g} of the last {limit.losses} steps + {config.spike_factor:g} × their spread "
            f"{limit.spread:.4g}. {stage}.guards.spike=stop ends the run there. {self._where()} Give the same command "
            f"with {stage}.guards.spike=skip to leave this update out, or =warn to take it. Samples of the batch:"
        )

    def _where(self) -> str:
        newest = self._newest()
        if newest is None:
            return "Nothing was saved yet: the stage begins anew."
        return f"Nothing new was saved: the run goes on from {newest}."


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _first(samples: Sequence[tuple[str, str]]) -> str:
    named = ", ".join(f"{source}/{key}" for source, key in samples[:_NAMED])
    return named + (f" and {len(samples) - _NAMED} more" if len(samples) > _NAMED else "")


def _listed(samples: Sequence[tuple[str, str]]) -> str:
    return "".join(f"\n  {source}/{key}" for source, key in samples)
