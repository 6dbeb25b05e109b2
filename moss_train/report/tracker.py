"""The one door through which figures of a run leave the training loop.

The loop records metrics as they come; `commit` reduces what came since the last commit to one row and hands it to every
sink. Names that the console knows how to show: `loss`, `loss/<kind>`, `learning_rate`, `learning_rate/<group>`,
`grad_norm`, `tokens_per_s`, `frames_per_s`, `data_wait` (share of the step's time), `eval/<figure>`,
`memory/activations_mb`, `memory/peak_mb`.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from moss_train.report.config import TrackingConfig
from moss_train.report.metrics_file import FILE_NAME, MetricsRow, append_line

REDUCTIONS = ("mean", "sum", "min", "max", "last", "rate")


class Sink(Protocol):
    """Where rows go. `start` and `finish` embrace the rows of one stage."""

    def start(self, stage: str, total: int, step: int) -> None: ...

    def write(self, row: MetricsRow) -> None: ...

    def event(self, stage: str, step: int, name: str, fields: Mapping[str, Any]) -> None: ...

    def finish(self, completed: bool) -> None: ...


class Tracker:
    """Records metrics of a pipeline, stage by stage.

    Use on the main process; others build it with `main=False`, which drops everything.

    Args:
        config: which sinks.
        run_directory: the run's folder; must exist.
        run_name: the pipeline's name, which groups its stages.
        settings: the resolved configuration, kept beside the figures with secrets hidden.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_directory: Path,
        run_name: str,
        settings: Mapping[str, Any] | None = None,
        main: bool = True,
        sinks: list[Sink] | None = None,
    ):
        config.validate()
        if not main:
            self._sinks: list[Sink] = []
        elif sinks is not None:
            self._sinks = sinks
        else:
            self._sinks = _sinks_of(config, run_directory, run_name, settings or {})
        self._stage: str | None = None
        self._total = 0
        self._pending: dict[str, tuple[str, list[float]]] = {}
        self._committed_at = 0.0

    def start_stage(self, stage: str, total_steps: int, step: int = 0) -> None:
        """A stage begins, or goes on after its first `step` steps."""
        if self._stage is not None:
            raise RuntimeError(f"stage {self._stage!r} is still open")
        self._stage, self._total = stage, total_steps
        self._pending = {}
        self._committed_at = time.perf_counter()
        for sink in self._sinks:
            sink.start(stage, total_steps, step)

    def record_metric(self, name: str, value: Any, reduce: str = "mean") -> None:
        """Note a value; it is published by the next `commit`.

        Args:
            value: a number or a tensor of one element.
            reduce: how the values since the last commit become one: mean, sum, min, max, last, or rate (their sum over
                the seconds that passed, for names like `tokens_per_s`).
        """
        if reduce not in REDUCTIONS:
            raise ValueError(f"reduce={reduce!r}: legal values are {', '.join(REDUCTIONS)}")
        known, values = self._pending.setdefault(name, (reduce, []))
        if known != reduce:
            raise ValueError(f"metric {name!r} is reduced by {known} and by {reduce} in one interval")
        values.append(float(value))

    def commit(self, step: int) -> dict[str, float]:
        """Publish what was recorded since the last commit as the row of `step`; returns the row's metrics."""
        now = time.perf_counter()
        seconds = now - self._committed_at
        self._committed_at = now
        metrics = {name: _reduced(reduce, values, seconds) for name, (reduce, values) in self._pending.items()}
        self._pending = {}
        if metrics:
            row = MetricsRow(self._open_stage(), step, self._total, time.time(), metrics)
            for sink in self._sinks:
                sink.write(row)
        return metrics

    def event(self, name: str, step: int, **fields: Any) -> None:
        """Something worth a line that is no metric: a checkpoint was saved, a sample was put into quarantine."""
        for sink in self._sinks:
            sink.event(self._open_stage(), step, name, fields)

    def end_stage(self, completed: bool = True) -> None:
        """The stage is over; `completed` is False when it was stopped before its last step."""
        self._open_stage()
        self._stage = None
        for sink in self._sinks:
            sink.finish(completed)

    def close(self) -> None:
        """Flush and release; a stage that is still open counts as stopped."""
        if self._stage is not None:
            self.end_stage(completed=False)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open_stage(self) -> str:
        if self._stage is None:
            raise RuntimeError("no stage is open: call start_stage first")
        return self._stage


class JsonlSink:
    """Appends rows to `metrics.jsonl` in the run's folder."""

    def __init__(self, run_directory: Path):
        self._path = run_directory / FILE_NAME

    def start(self, stage: str, total: int, step: int) -> None:
        self.event(stage, step, "resume" if step else "start", {"total": total})

    def write(self, row: MetricsRow) -> None:
        append_line(
            self._path,
            {"stage": row.stage, "step": row.step, "total": row.total, "time": row.time, "metrics": row.metrics},
        )

    def event(self, stage: str, step: int, name: str, fields: Mapping[str, Any]) -> None:
        append_line(self._path, {"stage": stage, "step": step, "time": time.time(), "event": name, **fields})

    def finish(self, completed: bool) -> None:
        pass


def _sinks_of(config: TrackingConfig, run_directory: Path, run_name: str, settings: Mapping[str, Any]) -> list[Sink]:
    sinks: list[Sink] = []
    if config.jsonl:
        sinks.append(JsonlSink(run_directory))
    if config.wandb != "disabled":
        from moss_train.report.wandb_sink import WandbSink

        sinks.append(WandbSink(config, run_directory, run_name, settings))
    if config.console:
        from moss_train.report.console import ConsoleSink

        sinks.append(ConsoleSink())
    return sinks


def _reduced(reduce: str, values: list[float], seconds: float) -> float:
    if reduce == "mean":
        return math.fsum(values) / len(values)
    if reduce == "sum":
        return math.fsum(values)
    if reduce == "rate":
        return math.fsum(values) / seconds if seconds > 0 else math.nan
    if reduce == "last":
        return values[-1]
    return min(values) if reduce == "min" else max(values)
