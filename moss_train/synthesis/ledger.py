"""What became of every video: samples as they are made, outcomes line by line, and the summary at the end.

A killed run has lost nothing that its ledger names: samples are complete before their line is written, and a line that
was cut short is no line.
"""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moss_train.data.convert import place_medium, write_lines
from moss_train.data.shards.storage import ShardStore
from moss_train.synthesis.dialogue import Rejection
from moss_train.synthesis.sources import Footage

#: what a finished folder holds beside its samples
MARKER_NAME = "synth.jsonl"
REJECTED_NAME = "rejected.jsonl"
_OUTCOMES = "outcomes.jsonl"


@dataclass(frozen=True)
class Outcome:
    """What became of one video."""

    key: str
    sample: str | None  #: JSON of the stream, None when the video gave none
    rejections: tuple[Rejection, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)  #: of the kept items and of the planned questions


class Ledger:
    """The outcomes of a run, on disk and in mind."""

    def __init__(self, folder: Path, copy: bool, store: ShardStore):
        """Reads what an earlier run has left in `folder`."""
        self._folder, self._copy, self._store = folder, copy, store
        self._path = folder / _OUTCOMES
        self.rows: dict[str, dict] = {}
        text = self._path.read_bytes() if self._path.is_file() else b""
        whole = text[: text.rfind(b"\n") + 1]
        for line in whole.splitlines():
            row = json.loads(line)
            self.rows[row["key"]] = row
        if len(whole) < len(text):
            os.truncate(self._path, len(whole))

    def add(self, outcome: Outcome, footage: Footage | None) -> None:
        """Write a sample with its video, then the outcome's line."""
        if outcome.sample is not None:
            assert footage is not None
            video = self._folder / f"{outcome.key}.{footage.medium['member']}"
            video.unlink(missing_ok=True)  # a killed run may have left it
            if isinstance(footage.video, Path):
                place_medium(footage.video, video, self._copy)
            else:
                video.write_bytes(footage.video.read(self._store))
            unfinished = self._folder / f".{outcome.key}.json"
            unfinished.write_text(outcome.sample + "\n", encoding="utf-8")
            unfinished.replace(self._folder / f"{outcome.key}.json")
        row = {
            "key": outcome.key,
            "written": outcome.sample is not None,
            "rejections": [asdict(rejection) for rejection in outcome.rejections],
            "counts": {name: count for name, count in outcome.counts.items() if count},
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows[outcome.key] = row

    def summary(self) -> dict[str, Any]:
        """Counts that add up: videos = samples + rejected videos, and questions planned = kept + rejected + lost with
        a rejected video."""
        rows = list(self.rows.values())
        reasons: Counter = Counter()
        counts: Counter = Counter()
        for row in rows:
            counts.update(row["counts"])
            reasons.update(f"{rejection['item']}: {rejection['reason']}" for rejection in row["rejections"])
        rejected = sum(count for reason, count in reasons.items() if not reason.startswith("video"))
        kept = counts["questions"]
        return {
            "videos": len(rows),
            "samples": sum(row["written"] for row in rows),
            "rejected_videos": sum(not row["written"] for row in rows),
            "questions_planned": counts["planned"],
            "questions": kept,
            "rejected_questions": rejected,
            "lost_questions": counts["planned"] - kept - rejected,
            **{name: counts[name] for name in ("answers", "revisions", "confirmations", "interruptions", "silent")},
            "reasons": dict(sorted(reasons.items(), key=lambda entry: (-entry[1], entry[0]))),
        }

    def finish(self, made_by: dict, usage: dict | None) -> dict[str, Any]:
        """Write the marker and the rejected items in the order of their keys; returns the summary."""
        rejected = [{"key": key} | rejection for key in sorted(self.rows) for rejection in self.rows[key]["rejections"]]
        if rejected:
            write_lines(self._folder / REJECTED_NAME, rejected)
        summary = self.summary()
        write_lines(self._folder / MARKER_NAME, [{"made_by": made_by}, {"summary": summary | {"usage": usage}}])
        self._path.unlink(missing_ok=True)
        return summary


def print_summary(summary: dict[str, Any], out: str, console: Console) -> None:
    """The counts as a table, and below it what was rejected and why."""
    console.print(f"{out}: {summary['samples']} streams of {summary['videos']} videos", soft_wrap=True)
    table = Table()
    for column in ("", "kept", "rejected"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("videos", str(summary["samples"]), str(summary["rejected_videos"]))
    lost = f" + {summary['lost_questions']} with their video" if summary["lost_questions"] else ""
    table.add_row("questions", str(summary["questions"]), f"{summary['rejected_questions']}{lost}")
    reasons = summary["reasons"]
    for name, item in (("answers", "answer"), ("revisions", "revise"), ("confirmations", "confirm")):
        count = sum(number for reason, number in reasons.items() if reason.startswith(f"{item}:"))
        table.add_row(f"  {name}", str(summary[name]), str(count))
    table.add_row("  interruptions", str(summary["interruptions"]), "")
    table.add_row("  streams without a question", str(summary["silent"]), "")
    console.print(table)
    for reason, count in reasons.items():
        console.print(f"rejected {count} × {reason.replace('_', ' ')}")
    if reasons:
        console.print(f"each is listed in {out}/{REJECTED_NAME}", soft_wrap=True)
