"""The quickstart's verdict: `report.json` in the form of design §7, and the same as a table for the terminal."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moss_train.report.metrics_file import finite_or_none

#: rows of the table, in order, and how they are written
FIGURES: dict[str, str] = {
    "speak_f1": "speak F1",
    "silence_f1": "silence F1",
    "balanced_accuracy": "balanced accuracy",
    "answer_accuracy": "answer accuracy",
    "answer_accuracy_evidence_after": "… evidence after",
    "answer_accuracy_evidence_before": "… evidence before",
    "revision_accuracy": "revision accuracy",
    "revision_delay_frames": "revision delay, frames",
    "false_revision_rate": "false revisions",
    "stale_rate": "stale answers",
    "offline_accuracy": "offline accuracy",
}
COUNTS: dict[str, str] = {
    "n_streams": "streams",
    "n_questions": "questions",
    "n_answers": "… evidence after",
    "n_revisions": "revisions",
    "n_confirmations": "confirmations",
}
VARIANTS: dict[str, str] = {
    "": "free-running",
    "teacher_forced.": "teacher-forced",
    "without_realtime.": "without real-time",
    "untrained.": "untrained",
}


@dataclass(frozen=True)
class Requirements:
    """What the figures must reach. Bounds are inclusive."""

    name: str = "quickstart"
    at_least: Mapping[str, float] = field(
        default_factory=lambda: {
            "speak_f1": 0.95,
            "silence_f1": 0.95,
            "answer_accuracy": 0.90,
            "revision_accuracy": 0.90,
            "n_streams": 256,
            "n_revisions": 100,
            "n_confirmations": 100,
            "n_answers": 100,
        }
    )
    at_most: Mapping[str, float] = field(default_factory=lambda: {"false_revision_rate": 0.05, "seconds": 600})
    #: by how much the trained model must beat the others in each of `compared`; silence F1 is not among them, since a
    #: model that never speaks has a high one
    lead: float = 0.3
    compared: tuple[str, ...] = ("speak_f1", "answer_accuracy", "revision_accuracy")
    compared_with: tuple[str, ...] = ("untrained.", "without_realtime.")

    @property
    def asked(self) -> bool:
        """False when every run would pass, so that passing says nothing."""
        return bool(self.at_least or self.at_most or self.compared)


FULL = Requirements()
#: a run of a few minutes that proves the machinery, not the model
SMOKE = Requirements("smoke", at_least={"n_streams": 1}, at_most={"seconds": 180}, compared=(), compared_with=())


@dataclass(frozen=True)
class Report:
    """The verdict of design §7."""

    name: str
    ok: bool
    figures: dict[str, float]
    failures: list[str]

    def to_json(self) -> dict[str, Any]:
        """Ready for `json.dumps`; a figure that could not be measured is null."""
        return {"name": self.name, "ok": self.ok, "figures": finite_or_none(self.figures), "failures": self.failures}


def build_report(
    variants: Mapping[str, Mapping[str, float]],
    run: Mapping[str, float],
    requirements: Requirements = FULL,
) -> Report:
    """Judge a run.

    Args:
        variants: figures by variant, whose name is their prefix in the report: "" for the trained model free-running,
            "teacher_forced.", "without_realtime.", "untrained.".
        run: figures of the run itself: `seconds`, `parameters`, `trained_tokens`.
        requirements: what is asked; `SMOKE` asks only that everything ran.
    """
    figures = {prefix + name: value for prefix, values in variants.items() for name, value in values.items()}
    figures |= run
    failures = []
    for name, bound in requirements.at_least.items():
        value = figures.get(name, math.nan)
        if not value >= bound:
            failures.append(f"{name} is {_said(value)}, must be at least {bound:g}")
    for name, bound in requirements.at_most.items():
        value = figures.get(name, math.nan)
        if not value <= bound:
            failures.append(f"{name} is {_said(value)}, must be at most {bound:g}")
    for prefix in requirements.compared_with:
        for name in requirements.compared:
            ours, theirs = figures.get(name, math.nan), figures.get(prefix + name, math.nan)
            # a model that never does it has no figure, which is as low as it gets
            theirs = 0.0 if prefix + name in figures and math.isnan(theirs) else theirs
            if not ours - theirs >= requirements.lead:
                lower = f"lower than {name} ({_said(ours)}) by {requirements.lead:g}"
                failures.append(f"{prefix}{name} is {_said(theirs)}, must be {lower}")
    return Report(requirements.name, not failures, figures, failures)


def write_report(report: Report, path: Path) -> Path:
    """Write `report.json`, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def print_report(report: Report, requirements: Requirements = FULL, console: Console | None = None) -> None:
    """The figures as a table, what failed, and the verdict."""
    console = console or Console(highlight=False)
    shown = {prefix: title for prefix, title in VARIANTS.items() if any(_has(report, prefix, name) for name in FIGURES)}
    table = Table(
        title=f"{report.name}: held-out streams",
        title_style="bold",
        header_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("figure", no_wrap=True)
    for prefix, title in shown.items():
        table.add_column(_two_lines(title) + f"\n{streams_text(report, prefix)}", justify="right", no_wrap=True)
    table.add_column("required", justify="right", style="dim", no_wrap=True)
    for name, title in (FIGURES | COUNTS).items():
        if not any(_has(report, prefix, name) for prefix in shown):
            continue
        if name == next(iter(COUNTS)):
            table.add_section()
        cells = [_cell(report, prefix, name, requirements) for prefix in shown]
        table.add_row(title, *cells, required_text(requirements, name))
    console.print(table)
    for failure in report.failures:
        console.print(Text.assemble(("✗ ", "bold red"), failure))
    verdict = ("passed  ", "bold green") if report.ok else ("failed  ", "bold red")
    details = ", ".join(
        f"{name.replace('_', ' ')} {_said(report.figures[name])}" for name in _RUN if name in report.figures
    )
    line = Text.assemble(*([verdict] if requirements.asked else []), details)
    if line:
        console.print(line, soft_wrap=True)


def streams_text(report: Report, prefix: str) -> str:
    """`n=64`: on how many streams a variant was evaluated, always the first ones of the source."""
    return f"n={report.figures.get(prefix + 'n_streams', math.nan):.0f}"


def _two_lines(title: str) -> str:
    for mark in (" ", "-"):
        if mark in title:
            return title.replace(mark, mark.strip() + "\n", 1)
    return title


_RUN = ("seconds", "parameters", "trained_tokens")


def _has(report: Report, prefix: str, name: str) -> bool:
    return prefix + name in report.figures


def required_text(requirements: Requirements, name: str) -> str:
    """`≥ 0.95`, `≤ 0.05`, or nothing."""
    if name in requirements.at_least:
        return f"≥ {requirements.at_least[name]:g}"
    if name in requirements.at_most:
        return f"≤ {requirements.at_most[name]:g}"
    return ""


def _cell(report: Report, prefix: str, name: str, requirements: Requirements) -> Text:
    value = report.figures.get(prefix + name)
    if value is None:
        return Text("")
    style = ""
    if not prefix:
        good = not any(failure.startswith(f"{name} is ") for failure in report.failures)
        style = "" if not required_text(requirements, name) else "green" if good else "bold red"
    return Text(figure_text(name, value), style)


def figure_text(name: str, value: float) -> str:
    """A figure as it stands in tables: counts whole, shares with three digits, "–" for what could not be measured."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if name.startswith("n_") else f"{value:.3f}"


def _said(value: float) -> str:
    if not math.isfinite(value):
        return "not measured"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 10 else f"{value:.4g}"
