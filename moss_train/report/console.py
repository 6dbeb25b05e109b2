"""What a person reads while a run goes on: one line per logged step."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from moss_train.report.metrics_file import MetricsRow

#: the loss by kind, in the order in which it is shown, and its short name
_KINDS = {"text": "text", "onset": "onset", "idle_silence": "idle", "stop_silence": "stop", "revision": "revise"}


_MUCH_WAITING = 0.1  # share of a step spent waiting for data from which it is worth a look

#: what is shown of an evaluation, which measures some hundred figures; all are in the metrics file
_HEADLINES = (
    "speak_f1",
    "silence_f1",
    "answer_accuracy",
    "revision_accuracy",
    "false_revision_rate",
    "teacher_forced/lm_ppl",
    "offline_accuracy",
)


class ConsoleSink:
    """Prints rows: where the stage stands, its loss, its speed, and when it will be done."""

    def __init__(self, console: Console | None = None):
        self._console = console or Console(highlight=False)
        self._started_at = 0.0
        self._started_step = 0

    def start(self, stage: str, total: int, step: int) -> None:
        self._started_at, self._started_step = time.monotonic(), step
        begun = f"goes on after step {step}" if step else "starts"
        self._print(Text.assemble((stage, "bold cyan"), f" {begun}, {total} steps"))

    def write(self, row: MetricsRow) -> None:
        metrics = row.metrics
        measured = {name.removeprefix("eval/"): value for name, value in metrics.items() if name.startswith("eval/")}
        held_out = {name: measured[name] for name in _HEADLINES if name in measured} or measured
        if held_out:
            figures = "  ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in held_out.items())
            self._print(Text.assemble((f"{row.stage:<9}", "cyan"), ("held out  ", "magenta"), figures))
        if "memory/peak_mb" in metrics:
            kept, peak = metrics["memory/activations_mb"], metrics["memory/peak_mb"]
            figures = f"a step keeps {kept:.3g} MB of activations, holds {peak:.3g} MB of tensors at its peak"
            self._print(Text.assemble((f"{row.stage:<9}", "cyan"), ("memory    ", "magenta"), figures))
        if "loss" not in metrics:
            return
        line = Text()
        line.append(f"{row.stage:<9}", "cyan")
        line.append(f"{row.step:>{len(str(row.total))}}/{row.total}", "bold")
        line.append(f" {row.step / max(1, row.total):>4.0%}  ", "dim")
        line.append("loss ", "dim")
        line.append(f"{metrics['loss']:<10.4g}", "bold green")
        kinds = [(short, metrics.get(f"loss/{kind}")) for kind, short in _KINDS.items()]
        line.append(" ".join(f"{short} {value:.3g}" for short, value in kinds if value is not None), "dim")
        for part in (_learning_rates(metrics), _gradient(metrics), _speed(metrics), self._eta(row)):
            if part:
                line.append("  " + part)
        wait = metrics.get("data_wait")
        if wait is not None:
            line.append(f"  data {wait:.0%}", "bold red" if wait > _MUCH_WAITING else "dim")
        self._print(line)

    def event(self, stage: str, step: int, name: str, fields: Mapping[str, Any]) -> None:
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in fields.items()}
        details = "".join(f"  {key} {value}" for key, value in shown.items())
        place = f"{step} " if step else ""
        self._print(Text.assemble((f"{stage:<9}", "cyan"), place, (name.replace("_", " "), "yellow"), details))

    def finish(self, completed: bool) -> None:
        took = clock(time.monotonic() - self._started_at)
        self._print(Text(f"{'done' if completed else 'stopped'} after {took}", "dim"))

    def _eta(self, row: MetricsRow) -> str:
        done = row.step - self._started_step
        if done <= 0 or row.step >= row.total:
            return ""
        return "eta " + clock((time.monotonic() - self._started_at) / done * (row.total - row.step))

    def _print(self, line: Text) -> None:
        self._console.print(line, soft_wrap=True)


def clock(seconds: float) -> str:
    """`7 s`, `4:05`, `2:03:09`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def count(number: float) -> str:
    """`950`, `3.2k`, `1.7M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _learning_rates(metrics: Mapping[str, float]) -> str:
    rates = [value for name, value in metrics.items() if name.split("/")[0] == "learning_rate"]
    if not rates:
        return ""
    low, high = min(rates), max(rates)
    return f"lr {high:.2g}" if low == high else f"lr {low:.2g}…{high:.2g}"


def _gradient(metrics: Mapping[str, float]) -> str:
    return f"grad {metrics['grad_norm']:.3g}" if "grad_norm" in metrics else ""


def _speed(metrics: Mapping[str, float]) -> str:
    rates = {"tok/s": metrics.get("tokens_per_s"), "fr/s": metrics.get("frames_per_s")}
    return "  ".join(f"{count(rate)} {unit}" for unit, rate in rates.items() if rate is not None)
