"""`moss-train bench recovery`: a run killed at random instants goes on as if nothing had been."""

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moss_train.bench.recovering.course import Course, Recovered
from moss_train.bench.recovering.job import LAUNCHERS
from moss_train.bench.recovering.killing import Killed, draw_kills
from moss_train.bench.recovering.preparing import FIRST_STEPS, SAVE_EVERY
from moss_train.errors import ConfigError

_SHOWN = 20  #: failures in the last line


@dataclass
class RecoveryOptions:
    """How often a run is killed, and which run."""

    kills: int = 4
    """SIGKILLs, each followed by a resume."""
    seed: int = 0
    """Of the instants and of whom they hit, of the weights and of the order of samples."""
    ranks: int = 2
    """Processes that train."""
    steps: int | None = None
    """Of the run's second stage; the first has three. Null: enough for the kills to fall into."""
    overrides: list[str] = field(default_factory=list)
    """More overrides of `moss-train train` for all runs: [layout.tp=2,layout.zero=1]."""
    launcher: str = "forked"
    """`forked`: processes are forked from one that has imported everything; `processes`: each is a Python of its own,
    begun as torchrun would, which takes some seconds more a launch."""
    out: str = "outputs/recovery"
    """Folder for the clips, the two runs and what their processes printed; its earlier runs are removed."""
    deadline_s: float = 300.0
    """Seconds after which a run that has not come to its end, or to the next kill, counts as hanging."""

    def validate(self) -> None:
        """Raise ConfigError for the first field that cannot be."""
        for name in ("kills", "ranks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must be at least 0")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps={self.steps}: must be at least 1, or null")
        if self.launcher not in LAUNCHERS:
            raise ConfigError(f"launcher={self.launcher}: legal values are {', '.join(LAUNCHERS)}")
        if not self.deadline_s > 0:
            raise ConfigError(f"deadline_s={self.deadline_s}: must be above 0 seconds")

    @property
    def last_stage_steps(self) -> int:
        """A kill waits for up to four saves; on average the run gains the steps of less than two."""
        return self.steps if self.steps is not None else 8 + 3 * SAVE_EVERY * self.kills


def recovery_command(options: RecoveryOptions) -> int:
    """Kill a short run again and again, resume it each time, and compare it with the same run left alone.

    A tiny model on rendered clips is trained in two stages with AdamW, a checkpoint every two steps. Kills are SIGKILLs
    of all processes or of one, whose companions must then end by themselves within 15 s: while a checkpoint is written,
    at a random instant of the steps, or on the way to the first. At the end weights, optimizer state, random states,
    positions, metrics and the record of consumed samples must be the same, bit for bit. Prints the kills, then JSON.
    """
    console, began = Console(stderr=True), time.monotonic()
    course = Course(
        Path(options.out),
        options.ranks,
        options.last_stage_steps,
        options.seed,
        options.overrides,
        options.launcher,
        options.deadline_s,
    )
    usual = course.run_whole()
    console.print(
        f"{FIRST_STEPS} + {options.last_stage_steps} steps on {options.ranks} processes without a kill: "
        f"{usual.start:.1f} s to the first step, {usual.step:.3f} s a step, {usual.save:.3f} s a save",
        highlight=False,
    )
    kills = draw_kills(options.kills, options.ranks, SAVE_EVERY, options.seed)

    def say(number: int, killed: Killed) -> None:
        console.print(f"kill {number}/{len(kills)} " + ", ".join(_cells(killed)), highlight=False)

    recovered = course.run_killed(kills, say)
    console.print(_table(recovered), highlight=False)
    result = summary(recovered, options.kills)
    result["figures"]["seconds"] = round(time.monotonic() - began)
    print(json.dumps(result), flush=True)
    if result["ok"]:
        shutil.rmtree(course.folder / "logs", ignore_errors=True)
    return 0 if result["ok"] else 1


def summary(recovered: Recovered, kills: int) -> dict[str, Any]:
    """The last line."""
    done, compared, samples = recovered.kills, recovered.comparison, recovered.samples
    failures = list(recovered.failures)
    if len(done) < kills and not failures:
        failures.append(f"{len(done)} kills hit, not {kills}")
    figures = {
        "kills": len(done),
        # What was not compared is not the same.
        "identical": bool(compared.checkpoints) and not compared.differences,
        "samples_lost": samples.lost,
        "samples_repeated": samples.repeated,
        "samples": samples.consumed,
        "kills_in_a_save": sum(killed.saving is not None for killed in done),
        "kills_of_one_rank": sum(killed.kill.rank is not None for killed in done),
        "slowest_end_s": round(max((killed.end_s for killed in done if killed.end_s is not None), default=0.0), 2),
        "checkpoints": compared.checkpoints,
        "tensors": compared.tensors,
        "steps": compared.rows,
    }
    return {"name": "bench recovery", "ok": not failures, "figures": figures, "failures": failures[:_SHOWN]}


_COLUMNS = ("killed", "after", "last step taken", "in a save", "others ended", "goes on from")


def _cells(killed: Killed) -> list[str]:
    return [
        f"{killed.kill.whom} ({killed.kill.instant})",
        f"{killed.after_s:.2f} s",
        str(killed.reached or "none yet"),
        f"of step {int(killed.saving.split('_')[1].partition('-')[0])}" if killed.saving else "–",
        f"{killed.end_s:.1f} s" if killed.end_s is not None else "–",
        str(killed.newest or "the beginning"),
    ]


def _table(recovered: Recovered) -> Table:
    table = Table(title="kills")
    table.add_column("", justify="right")
    for column in _COLUMNS:
        table.add_column(column)
    for number, killed in enumerate(recovered.kills, 1):
        table.add_row(str(number), *_cells(killed))
    return table
