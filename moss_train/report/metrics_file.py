"""`metrics.jsonl`: one JSON object a line, appended while a run goes on, also over interruptions and resumes.

Rows: `{"stage": …, "step": …, "total": …, "time": …, "metrics": {name: value}}`; events: the same with
`"event": name` instead of `metrics`. A stage that begins writes a `start` event of step 0, one that resumes after
step s a `resume` event; rows of that stage with a later step that stand before it belong to work that was lost, and the
reader drops them.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_train.errors import DataError

FILE_NAME = "metrics.jsonl"
_BEGINNINGS = ("start", "resume")


@dataclass(frozen=True)
class MetricsRow:
    """The metrics of one step of one stage."""

    stage: str
    step: int
    total: int  #: steps of the stage
    time: float  #: seconds since the epoch
    metrics: dict[str, float]


def finite_or_none(value: Any) -> Any:
    """NaN and infinities as None, at any depth: JSON has no word for them."""
    if isinstance(value, Mapping):
        return {name: finite_or_none(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record. A line cut short by a crash is first closed, so that it cannot swallow this one."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(finite_or_none(record), allow_nan=False).encode() + b"\n")


def read_metrics(path: Path) -> list[MetricsRow]:
    """The rows that count, in order of stage (as first met) and step.

    A last line cut short by a crash is ignored; any other line that is no record raises DataError with its number.
    """
    stages: dict[str, dict[int, MetricsRow]] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            stage, step = record["stage"], record["step"]
            rows = stages.setdefault(stage, {})
            if record.get("event") in _BEGINNINGS:
                stages[stage] = {known: row for known, row in rows.items() if known <= step}
            elif "metrics" in record:
                metrics = {name: math.nan if value is None else value for name, value in record["metrics"].items()}
                rows[step] = MetricsRow(stage, step, record["total"], record["time"], metrics)
        except (ValueError, KeyError, TypeError) as error:
            if _cut_short(lines, number):
                continue
            raise DataError(
                f"{path.name} line {number} is no record of metrics ({error}); repair or remove it"
            ) from error
    return [row for rows in stages.values() for _, row in sorted(rows.items())]


def _cut_short(lines: list[str], number: int) -> bool:
    """Whether line `number` may be the torso that a crash left: the last one, or one before a resume."""
    following = [line for line in lines[number:] if line.strip()]
    return not following or any(f'"event": "{name}"' in following[0] for name in _BEGINNINGS)
