"""`moss-train bench data`: our loader beside webdataset and Energon, what packing leaves empty, what planning costs."""

import contextlib
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moss_train.bench.data_loading.loaders import ENERGON, OURS, RUNS, WEBDATASET, prepared_folder
from moss_train.bench.data_loading.measure import RunFigures, delivered, largest_difference, run_case
from moss_train.bench.data_loading.planning import data_wait, make_blend, plan_figures
from moss_train.bench.data_loading.sources import CASES, QUICK, CaseSources, Sizes, make_cases, startup_case
from moss_train.cli_options import parse_options
from moss_train.data.shards.pack import PackOptions, pack_command
from moss_train.errors import ConfigError, DataError

REALTIME = "realtime"
#: least (`vs_…`) or most of each figure; those of a case stand for both loaders
LEAST = {"": 1.5, ".sparse": 2.0, ".short": 0.95, ".dense": 0.95, ".sharded": 1.7, ".transcoded": 4.0}
MOST = {
    "text_padding": 0.03,
    "frame_padding": 0.05,
    "imbalance_64": 1.03,
    "plan_ms": 5.0,
    "data_wait": 0.01,
    "open_10m_s": 5.0,
    "open_10m_gb": 2.0,
}
#: levels by which the mean of a block of pixels may differ: decord and PyAV scale with other arithmetic
SAME_PICTURES = 2.0
#: the same where the pictures were encoded anew
TRANSCODED_PICTURES = 16.0


@dataclass
class DataOptions:
    """How much is measured, and where the clips are kept."""

    out: str = "outputs/bench_data"
    """Folder of clips and shards; they are made once, about 2 GB with `index10m`, else 100 MB."""
    repeats: int = 5
    """Runs of each loader on each case; figures are of the medians."""
    size: int = 448
    """Pixels of a side of the delivered tiles."""
    cases: str = "all"
    """`all`, or names joined by commas: sparse, short, dense, sharded, realtime, transcoded, planning, wait."""
    quick: bool = False
    """Tiny clips and one run each: shows that all of it works; its ratios mean nothing and have no targets."""
    index10m: bool = False
    """Make an index of ten million samples too, and measure how it is opened."""

    def validate(self) -> None:
        """Raise ConfigError for the first field that cannot be."""
        for name, least in (("repeats", 1), ("size", 16)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")
        legal = ("all", *CASES, "planning", "wait")
        for name in self.cases.split(","):
            if name not in legal:
                raise ConfigError(f"cases={self.cases}: {name!r} is none of {', '.join(legal)}")

    def wants(self, name: str) -> bool:
        return "all" in self.cases.split(",") or name in self.cases.split(",")


def data_command(options: DataOptions) -> int:
    """Our loader, webdataset with decord and Energon with decord over the same shards, one worker each.

    For every case all three deliver the same pictures, which is checked; `vs_<loader>.<case>` is their CPU time (all
    processes, start-up taken off) ÷ ours, medians of `repeats` runs in turns. Then padding and balance of batches of
    real-time lengths, the cost of planning one, and the share of a training step that waits for data. The last line on
    standard output is JSON; exit code 0 when all pictures are the same and every figure meets its target.
    """
    for name, extra in (("decord", "video"), ("av", "video"), ("megatron.energon", "energon")):
        try:
            # Also so that forked runs do not count the import.
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"bench data needs {name}: install moss_train[{extra}]") from error
    console = Console(stderr=True)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    folder = Path(options.out) / ("quick" if options.quick else "full")
    folder.mkdir(parents=True, exist_ok=True)
    repeats = 1 if options.quick else options.repeats
    figures: dict[str, Any] = {}
    failures: list[str] = []
    cases = _wanted_cases(folder, options, say)
    if cases:
        measured = compare(cases, startup_case(folder), options.size, repeats, folder, failures, say)
        figures |= ratios(measured)
        console.print(_table(measured))
    if options.wants("planning"):
        say("planning: lengths of real-time training, batches delivered in tiny tiles")
        samples, batch, ranks = (64, 32, 2) if options.quick else (1024, 256, 8)
        planned = plan_figures(make_blend(folder, samples), batch, ranks, samples, max(5, repeats))
        say(
            f"  padding {planned.text_padding:.1%} of text and {planned.frame_padding:.1%} of frames "
            f"({planned.text_padding_8_rows:.1%}, {planned.frame_padding_8_rows:.1%} with eight rows a microbatch); "
            f"imbalance {planned.imbalance:.3f}; {planned.plan_ms:.2f} ms to plan {planned.largest_batch} streams"
        )
        figures |= {"text_padding": planned.text_padding, "frame_padding": planned.frame_padding}
        figures["text_padding.8_rows"] = planned.text_padding_8_rows
        figures["frame_padding.8_rows"] = planned.frame_padding_8_rows
        figures |= {"imbalance_64": planned.imbalance, "plan_ms": planned.plan_ms}
    if options.wants("wait"):
        clips, batch, epochs = (8, 4, 2) if options.quick else (64, 16, 5)
        waited, steps = data_wait(folder / "wait", clips, batch, epochs)
        say(f"data_wait: {waited:.4f} of a step, median of {steps} steps after the first epoch (model tiny, 1 worker)")
        figures["data_wait"] = waited
    if options.index10m:
        figures |= _ten_million(folder, say)
    failures += [] if options.quick else missed(figures)
    result = {"name": "bench data", "ok": not failures, "figures": _rounded(figures), "failures": failures}
    print(json.dumps(result))
    return 0 if result["ok"] else 1


#: case → loader → runs
Measured = dict[str, dict[str, list[RunFigures]]]


def compare(
    cases: list[CaseSources],
    startup: CaseSources,
    size: int,
    repeats: int,
    folder: Path,
    failures: list[str],
    say: Callable[[str], None],
) -> Measured:
    """Check each loader's pictures, then time all of them in turns."""
    measured: Measured = {case.name: {loader: [] for loader in RUNS} for case in [startup, *cases]}
    for case in [startup, *cases]:
        prepared_folder(case)
        for loader in RUNS:
            run_case(loader, case, size, folder, signatures=True)
        pictures = {loader: delivered(loader, case, folder) for loader in RUNS}
        apart = {
            loader: largest_difference(pictures[WEBDATASET], pictures[loader], pictures[WEBDATASET])
            for loader in (OURS, ENERGON)
        }
        apart_text = ", ".join(f"{loader} {levels:.2f}" for loader, levels in apart.items())
        say(
            f"{case.name}: {len(case.requests)} samples, {case.frames} pictures, {case.ranks} rank(s); largest "
            f"difference of a block's mean from webdataset's, levels: {apart_text}"
        )
        bound = SAME_PICTURES if case.originals is None else TRANSCODED_PICTURES
        if apart[OURS] > bound or apart[ENERGON] > SAME_PICTURES:
            failures.append(f"{case.name}: the loaders delivered other pictures, {apart}")
    for repeat in range(repeats):
        for case in [startup, *cases]:
            for loader in RUNS:
                run = run_case(loader, case, size, folder)
                wanted = case.frames * (1 if loader == OURS else case.ranks)
                if run.frames != wanted:
                    raise DataError(f"{loader} on {case.name} delivered {run.frames} pictures, not {wanted}")
                measured[case.name][loader].append(run)
            row = {loader: f"{runs[-1].cpu_s:.2f}" for loader, runs in measured[case.name].items()}
            say(f"run {repeat + 1}/{repeats} {case.name}: CPU seconds {row}")
    return measured


def ratios(measured: Measured) -> dict[str, float]:
    """`vs_<loader>[.<case>]`: their CPU time ÷ ours, start-up taken off both."""
    startup = {loader: _median_cpu(runs) for loader, runs in measured["startup"].items()}
    figures: dict[str, float] = {}
    for case, loaders in measured.items():
        if case == "startup":
            continue
        ranks = {OURS: 1, WEBDATASET: 1, ENERGON: 1} if case not in (REALTIME, "sharded") else dict.fromkeys(RUNS, 2)
        cpu = {loader: _median_cpu(runs) - ranks[loader] * startup[loader] for loader, runs in loaders.items()}
        for other in (WEBDATASET, ENERGON):
            name = f"vs_{other}" if case == REALTIME else f"vs_{other}.{case}"
            figures[name] = cpu[other] / max(cpu[OURS], 1e-3)
    return figures


def missed(figures: dict[str, Any]) -> list[str]:
    """Figures that are not what they should be."""
    failures = []
    for name, value in figures.items():
        if name.startswith("vs_"):
            least = LEAST["." + name.partition(".")[2] if "." in name else ""]
            if not value >= least:
                failures.append(f"{name}: {value:.3g}, should be at least {least}")
        elif name in MOST and not value <= MOST[name]:
            failures.append(f"{name}: {value:.3g}, should be at most {MOST[name]}")
    return failures


def _wanted_cases(folder: Path, options: DataOptions, say: Callable[[str], None]) -> list[CaseSources]:
    """Encoded and packed where that was not done before."""
    names = [name for name in CASES if options.wants(name)]
    if not names:
        return []

    def transcode(source: Path, out: Path) -> None:
        # A keyframe every 8 pictures, two pictures a second: what training at that rate needs.
        how = ("transcode.fps=2", f"transcode.size={options.size}", "transcode.keyframe_gap=8", "transcode.codec=h264")
        with contextlib.redirect_stdout(sys.stderr):
            pack_command(parse_options(PackOptions, [f"source={source}", f"out={out}", *how]))

    began = time.monotonic()
    cases = make_cases(folder, QUICK if options.quick else Sizes(), names, transcode, say)
    say(f"sources are ready after {time.monotonic() - began:.0f} s")
    return cases


def _ten_million(folder: Path, say: Callable[[str], None]) -> dict[str, float]:
    from moss_train.bench.data_loading.ten_million import open_ten_million

    found = open_ten_million(folder / "index10m", say)
    return {"open_10m_s": found.seconds, "open_10m_gb": found.resident_gb}


def _median_cpu(runs: list[RunFigures]) -> float:
    return statistics.median(run.cpu_s for run in runs)


def _rounded(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) for name, value in figures.items()}


def _table(measured: Measured) -> Table:
    table = Table(title="median CPU seconds of all processes of a run, start-up included; spread in brackets")
    table.add_column("case")
    table.add_column("pictures", justify="right")
    for loader in RUNS:
        table.add_column(loader, justify="right")
    for case, loaders in measured.items():
        cells = []
        for runs in loaders.values():
            seconds = [run.cpu_s for run in runs]
            cells.append(f"{statistics.median(seconds):.2f} [{min(seconds):.2f} – {max(seconds):.2f}]")
        table.add_row(case, str(loaders[OURS][0].frames), *cells)
    return table
