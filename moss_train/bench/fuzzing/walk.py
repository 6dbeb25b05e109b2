"""The way of a user, walked by a process of its own: index, lengths, one epoch of the loader, `data check`.

The process may crash or hang; it is watched from outside, with the memory of all that it started.
"""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from moss_train.bench.fuzzing.cases import Case, healthy_sample
from moss_train.bench.fuzzing.tars import Entry, tar_of
from moss_train.cli_options import parse_options
from moss_train.data.config import DataConfig, SourceConfig
from moss_train.data.loader import build_loader
from moss_train.data.shards.check import CheckOptions, check_command
from moss_train.data.shards.index_command import IndexOptions, index_command
from moss_train.errors import MossTrainError
from moss_train.streams.config import CompilerConfig, TokenizerConfig
from moss_train.streams.tokenizer import load_tokenizer

BATCH = "batch"  #: the source of the hostile samples and the healthy ones
HEALTHY = 4
_IMAGE_SIZE = 32
_LOOK_EVERY_S = 0.05


@dataclass(frozen=True)
class Bounds:
    """What one walk may take."""

    deadline_s: float = 120.0  #: of the whole walk
    decode_s: float = 8.0  #: of one clip
    decode_mb: int = 1024  #: of a decoder process


@dataclass
class Report:
    """What the process told before it ended."""

    refused: dict[str, str] = field(default_factory=dict)  #: source → the error with which indexing ended
    delivered: dict[str, list[str]] = field(default_factory=dict)  #: source → keys that were in a batch
    bad: dict[str, dict[str, str]] = field(default_factory=dict)  #: source → key → reason, from the ledger
    over_budget: int = 0
    checked: dict[str, str] = field(default_factory=dict)  #: source → what `data check` printed
    stopped: str = ""  #: our own error where none was due: the damage of one sample stopped a source or the run
    traceback: str = ""  #: of an error that is not ours
    phase: str = ""  #: where it was last
    seconds: dict[str, float] = field(default_factory=dict)  #: by phase


@dataclass
class Outcome:
    """A walk as it was seen from outside."""

    report: Report | None  #: None: the process died or was killed
    exit_code: int | None
    hung: bool
    peak_mb: float  #: resident memory of the process and all it started, together, at its most; 10⁶ bytes
    log: str  #: the end of what was printed


def walk(cases: Sequence[Case], folder: Path, bounds: Bounds) -> Outcome:
    """Write the inputs below `folder`, send a process over them and watch it until it ends or the deadline passes."""
    shutil.rmtree(folder, ignore_errors=True)
    sources = write_sources(cases, folder)
    report_path, log_path = folder / "report.json", folder / "log.txt"
    process = multiprocessing.get_context("fork").Process(
        target=_travel, args=(sources, report_path, log_path, bounds), daemon=False
    )
    process.start()
    began, peak, hung = time.monotonic(), 0.0, False
    while process.is_alive():
        peak = max(peak, _resident_mb(process.pid))
        if time.monotonic() - began > bounds.deadline_s:
            hung = True
            _kill_tree(process.pid)
        process.join(_LOOK_EVERY_S)
    log = log_path.read_text(encoding="utf-8", errors="replace")[-6000:] if log_path.exists() else ""
    report = Report(**json.loads(report_path.read_text(encoding="utf-8"))) if report_path.exists() else None
    if report is not None and report.phase != "done" and not report.traceback:
        log, report = f"{log}\nwas at: {report.phase}", None
    return Outcome(report, process.exitcode, hung, peak, log)


def write_sources(cases: Sequence[Case], folder: Path) -> dict[str, Path]:
    """One source of all hostile samples among healthy ones, and one of each hostile tar."""
    samples = [(case.keys[0], case.members) for case in cases if case.kind != "tar"]
    samples += [healthy_sample(number) for number in range(HEALTHY)]
    sources = {BATCH: folder / "sources" / BATCH}
    sources[BATCH].mkdir(parents=True)
    entries = [Entry(f"{key}.{member}".encode(), data) for key, members in samples for member, data in members.items()]
    (sources[BATCH] / "shard-000000.tar").write_bytes(tar_of(entries))
    for case in cases:
        if case.kind == "tar":
            sources[f"tar{case.number}"] = folder / "sources" / f"tar{case.number}"
            sources[f"tar{case.number}"].mkdir()
            (sources[f"tar{case.number}"] / "shard-000000.tar").write_bytes(case.tar)
    return sources


def _resident_mb(pid: int | None) -> float:
    """Resident memory of a process and its descendants."""
    total = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total / 1e6


def _kill_tree(pid: int | None) -> None:
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.Error):
                process.kill()


def _travel(sources: dict[str, Path], report_path: Path, log_path: Path, bounds: Bounds) -> None:
    """What the process does."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["XDG_CACHE_HOME"] = str(report_path.parent / "cache")
    report = Report()

    def enter(phase: str) -> None:
        now = time.monotonic()
        if report.phase:
            report.seconds[report.phase.split()[0]] = report.seconds.get(report.phase.split()[0], 0) + now - began[0]
        report.phase, began[0] = phase, now
        report_path.write_text(json.dumps(vars(report)), encoding="utf-8")

    began = [time.monotonic()]
    try:
        for name, path in sources.items():
            enter(f"index {name}")
            code, printed = _call(index_command, IndexOptions, [f"path={path}"])
            if code:
                report.refused[name] = printed
                if name == BATCH:
                    report.stopped = f"data index: {printed}"
        enter("loader")
        try:
            _one_epoch({name: path for name, path in sources.items() if name not in report.refused}, report, bounds)
        except MossTrainError as error:
            report.stopped = f"{type(error).__name__} in the loader: {error}"
        for name, path in sources.items():
            enter(f"check {name}")
            _, report.checked[name] = _call(check_command, CheckOptions, [f"path={path}", "decode=all", "show=1000000"])
    except BaseException:
        report.traceback = traceback.format_exc()
    enter("done" if not report.traceback else report.phase)
    os._exit(0)  # nothing of the parent's is to be cleaned up here


def _call(command: Callable[[Any], int], options: type, arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of a verb, as its user would see them."""
    with io.StringIO() as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = command(parse_options(options, arguments))
        except MossTrainError as error:
            print(f"error: {error}")
            code = 2
        return code, out.getvalue()


def _one_epoch(sources: dict[str, Path], report: Report, bounds: Bounds) -> None:
    ledger = next(iter(sources.values())).parent / "quarantine.jsonl"
    data = DataConfig(
        sources={name: SourceConfig(path=str(path)) for name, path in sources.items()},
        global_batch_size=64,
        pack_text_tokens=65_536,
        pack_frames=256,
        prefetch=1,
        frame_cache_mb=0,
        decode_timeout_s=bounds.decode_s,
        decode_memory_mb=bounds.decode_mb,
        max_bad_fraction=1.0,
    )
    tokenizer = load_tokenizer(TokenizerConfig())
    delivered: dict[str, set[str]] = {name: set() for name in sources}
    with build_loader(data, CompilerConfig(), tokenizer, _IMAGE_SIZE, seed=0, quarantine_path=ledger) as loader:
        for _ in range(loader.steps_per_epoch(0)):
            for batch in next(loader).microbatches:
                for keys, names in zip(batch.keys, batch.sources, strict=True):
                    for key, name in zip(keys, names, strict=True):
                        delivered[name].add(key)
        report.over_budget = sum(figures.over_budget for figures in loader.summary().values())
    report.delivered = {name: sorted(keys) for name, keys in delivered.items()}
    for line in ledger.read_text(encoding="utf-8").splitlines() if ledger.exists() else []:
        fault = json.loads(line)
        report.bad.setdefault(fault["source"], {})[fault["key"]] = fault["reason"]
