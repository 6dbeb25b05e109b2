"""`moss-train bench fuzz`: hostile and damaged inputs on a user's way; nothing crashes, hangs, swells or is lost."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from moss_train.bench.fuzzing.cases import Case, draw_case
from moss_train.bench.fuzzing.walk import BATCH, HEALTHY, Bounds, Outcome, Report, walk, write_sources
from moss_train.errors import ConfigError

_SHOWN = 20  #: failures in the last line


@dataclass
class FuzzOptions:
    """How many inputs, and which."""

    inputs: int = 200
    """Hostile media, JSON members and tars."""
    seed: int = 0
    """Inputs are a function of this seed and of their number."""
    case: str | None = None
    """`seed:number` of a line that was printed, to run that input alone."""
    out: str = "outputs/fuzz_failures"
    """Folder for inputs that fail, with what was printed over them; made when there is one."""
    real: str | None = None
    """Folder of clips that are mutated beside the small ones that are made for it."""
    batch: int = 100
    """Inputs that go the way together; when something breaks they are tried in smaller groups, at last alone."""
    deadline_s: float = 240.0
    """A group that takes longer hangs, seconds; an input alone has a third of it."""
    memory_mb: int = 4000
    """Most resident memory of the main process and all decoders together, MB (10⁶ bytes)."""

    def validate(self) -> None:
        """Raise ConfigError for the first field that cannot be."""
        for name in ("inputs", "batch", "memory_mb"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if not self.deadline_s > 0:
            raise ConfigError(f"deadline_s={self.deadline_s}: must be above 0")
        if self.real is not None and not Path(self.real).is_dir():
            raise ConfigError(f"real={self.real} is no folder of clips")
        if self.case is not None:
            seed, _, number = self.case.partition(":")
            if not (seed.isdecimal() and number.isdecimal()):
                raise ConfigError(f"case={self.case}: is not of the form seed:number; copy it from a printed line")


@dataclass
class _Tally:
    """What was found, by kind."""

    inputs: int = 0
    crashes: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    unrecorded: list[str] = field(default_factory=list)
    peak_memory_mb: float = 0.0
    fates: dict[str, int] = field(default_factory=dict)  #: refused, quarantined, delivered, over_budget → inputs

    def count(self, fate: str, inputs: int = 1) -> None:
        self.fates[fate] = self.fates.get(fate, 0) + inputs

    def summary(self, memory_mb: int) -> dict[str, Any]:
        failures = [*self.crashes, *self.hangs, *self.unrecorded]
        if self.peak_memory_mb > memory_mb:
            failures.append(f"peak_memory_mb: {self.peak_memory_mb:.0f}, more than memory_mb={memory_mb}")
        figures = {
            "inputs": self.inputs,
            "crashes": len(self.crashes),
            "hangs": len(self.hangs),
            "unrecorded": len(self.unrecorded),
            "peak_memory_mb": round(self.peak_memory_mb),
            **self.fates,
        }
        return {"name": "bench fuzz", "ok": not failures, "figures": figures, "failures": failures[:_SHOWN]}


class Fuzzer:
    """Sends inputs on the way, tells their fates, and finds the one that breaks a group."""

    def __init__(self, options: FuzzOptions, seed: int, folder: Path, say: Callable[[str], None]):
        self.tally = _Tally()
        self._options = options
        self._seed = seed
        self._folder = folder
        self._say = say

    def run(self, cases: Sequence[Case]) -> None:
        """Judge every input of a group."""
        self.tally.inputs += len(cases)
        self._run(list(cases))

    def _run(self, cases: list[Case]) -> bool:
        """True when the group as a whole came through; else its parts were tried."""
        alone = len(cases) == 1
        deadline = self._options.deadline_s / 3 if alone else self._options.deadline_s
        outcome = walk(cases, self._folder, Bounds(deadline))
        self.tally.peak_memory_mb = max(self.tally.peak_memory_mb, outcome.peak_mb)
        kind, what = _broken(outcome)
        if not kind:
            assert outcome.report is not None
            self._judge(cases, outcome.report, outcome)
            return True
        if alone:
            self._fail(getattr(self.tally, kind), cases[0], what, outcome)
            return False
        self._say(f"  {len(cases)} inputs together: {what.splitlines()[-1][:200]}; trying them apart")
        half = len(cases) // 2
        parts = [self._run(cases[:half]), self._run(cases[half:])]
        if all(parts):
            names = f"inputs {self._seed}:{cases[0].number} to {cases[-1].number} together, not apart"
            getattr(self.tally, kind).append(f"{names}: {what[-300:]}")
        return False

    def _judge(self, cases: list[Case], report: Report, outcome: Outcome) -> None:
        lost: list[tuple[Case, str]] = []
        for case in cases:
            source = f"tar{case.number}" if case.kind == "tar" else BATCH
            if source in report.refused:
                self.tally.count("refused")
                continue
            delivered, bad = set(report.delivered.get(source, [])), report.bad.get(source, {})
            missing = [key for key in case.keys if key not in delivered and key not in bad]
            both = [key for key in case.keys if key in delivered and key in bad]
            unseen = [key for key in case.keys if key in bad and f"  {key}  " not in report.checked[source]]
            # A tar whose headers name members otherwise has other keys in their places.
            others = (delivered | set(bad)) - set(case.keys) if case.kind == "tar" else set()
            if len(others) < len(missing):
                lost.append((case, f"{', '.join(missing)}: neither delivered nor recorded"))
            elif both:
                self._fail(self.tally.unrecorded, case, f"{', '.join(both)}: delivered and quarantined", outcome)
            elif unseen:
                why = f"quarantined ({bad[unseen[0]]}), but data check finds nothing"
                self._fail(self.tally.unrecorded, case, why, outcome)
            if not missing or case.kind == "tar":
                self.tally.count("quarantined" if bad.keys() & set(case.keys) else "delivered")
        gone = {f"healthy{n}" for n in range(HEALTHY)} - set(report.delivered.get(BATCH, []))
        if gone:
            why = f"{', '.join(sorted(gone))}: a healthy sample was lost beside it: {report.bad.get(BATCH, {})}"
            self._fail(self.tally.crashes, cases[0], why[:500], outcome)
        # Of those over budget the loader tells the number, not the keys; only a hostile text makes a sample so long.
        long = [case for case, _ in lost if case.kind == "json"]
        if len(long) == report.over_budget:
            self.tally.count("over_budget", len(long))
            lost = [(case, why) for case, why in lost if case.kind != "json"]
        for case, why in lost:
            self._fail(self.tally.unrecorded, case, why, outcome)

    def _fail(self, kind: list[str], case: Case, why: str, outcome: Outcome) -> None:
        name = f"{self._seed}:{case.number}"
        kind.append(f"case={name} ({case.kind}: {case.what}): {' '.join(why.split())[-400:]}")
        self._say(f"  FAILED case={name} {case.kind} {case.what}: {why[-1500:]}")
        kept = Path(self._options.out) / name.replace(":", "-")
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        write_sources([case], kept)
        (kept / "failure.txt").write_text(f"case={name} {case.what}\n{why}\n\n{outcome.log}", encoding="utf-8")


def _broken(outcome: Outcome) -> tuple[str, str]:
    """("crashes" or "hangs", why) for a walk that did not come to its end as it should; ("", "") for one that did."""
    if outcome.hung:
        return "hangs", f"{outcome.log}\nbeyond the deadline"
    if outcome.report is None:
        return "crashes", f"{outcome.log}\nthe main process died, exit code {outcome.exit_code}"
    if outcome.report.traceback:
        return "crashes", outcome.report.traceback
    if outcome.report.stopped:
        return "crashes", outcome.report.stopped
    return "", ""


def fuzz_command(options: FuzzOptions) -> int:
    """Damaged and hostile media, JSON and tars on the way of a user: index, lengths, loader, data check.

    Each input must be delivered whole, or refused by the index, or quarantined with a reason that `data check` finds
    too; healthy samples beside it must come through. Counted are crashes (an error that is no message to the user, a
    dead process, one sample that stops all), hangs, and inputs that vanish without a record; the last line on standard
    output is JSON. An input that fails is kept in `out` and runs alone with `case=`.
    """
    console = Console(stderr=True)
    seed, numbers = options.seed, list(range(options.inputs))
    if options.case is not None:
        seed, number = map(int, options.case.split(":"))
        numbers = [number]
    real = Path(options.real) if options.real else None
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="moss-train-fuzz-") as folder:
        fuzzer = Fuzzer(options, seed, Path(folder) / "walk", lambda text: console.print(text, highlight=False))
        for start in range(0, len(numbers), options.batch):
            group = [draw_case(seed, number, real) for number in numbers[start : start + options.batch]]
            if options.case is not None:
                console.print(f"{group[0].kind}: {group[0].what}", highlight=False, markup=False)
            fuzzer.run(group)
            done = start + len(group)
            console.print(
                f"{done}/{len(numbers)} inputs, {time.monotonic() - began:.0f} s, {fuzzer.tally.fates}, "
                f"peak {fuzzer.tally.peak_memory_mb:.0f} MB",
                highlight=False,
            )
    summary = fuzzer.tally.summary(options.memory_mb)
    print(json.dumps(summary), flush=True)
    return 0 if summary["ok"] else 1
