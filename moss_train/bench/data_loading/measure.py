"""A run of a loader in a process of its own: CPU time with all it started, and, asked for it, what it delivered."""

import json
import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moss_train.bench.data_loading.loaders import RUNS
from moss_train.bench.data_loading.sources import CaseSources
from moss_train.errors import DataError

#: pictures are compared by the means of so many blocks a side: single levels of scaling vanish in them
_BLOCKS = 8
_DEADLINE_S = 600.0


@dataclass(frozen=True)
class RunFigures:
    """All ranks of one run together."""

    cpu_s: float  #: user and system time of every process
    wall_s: float  #: of the slowest rank
    frames: int
    samples: int


def run_case(loader: str, case: CaseSources, size: int, folder: Path, signatures: bool = False) -> RunFigures:
    """All ranks of `case`, side by side in processes that are forked for it; nothing decoded is kept between runs.

    With `signatures` what rank r delivered stands in `folder/<loader>-<case>-<r>.npz` afterwards: key@first picture →
    float32 [F, 3, 8, 8], means of blocks. Raises DataError when a rank fails.
    """
    context = multiprocessing.get_context("fork")
    paths = [folder / f"{loader}-{case.name}-{rank}" for rank in range(case.ranks)]
    processes = [
        context.Process(target=_run_rank, args=(loader, case, size, rank, path, signatures))
        for rank, path in enumerate(paths)
    ]
    for path in paths:
        path.with_suffix(".json").unlink(missing_ok=True)
    for process in processes:
        process.start()
    for process in processes:
        process.join(_DEADLINE_S)
        if process.is_alive():
            process.kill()
    told = []
    for path in paths:
        report = path.with_suffix(".json")
        if not report.exists():
            raise DataError(f"{loader} on {case.name}: a rank died or took longer than {_DEADLINE_S:g} s")
        told.append(json.loads(report.read_text(encoding="utf-8")))
    for rank, figures in enumerate(told):
        if "error" in figures:
            raise DataError(f"{loader} on {case.name}, rank {rank}: {figures['error']}")
    return RunFigures(
        sum(one["cpu_s"] for one in told),
        max(one["wall_s"] for one in told),
        sum(one["frames"] for one in told),
        sum(one["samples"] for one in told),
    )


def _run_rank(loader: str, case: CaseSources, size: int, rank: int, path: Path, signatures: bool) -> None:
    torch.set_num_threads(1)
    before, began = _cpu_s(), time.perf_counter()
    kept: dict[str, np.ndarray] = {}
    frames = samples = 0
    try:
        for key, first, pictures in RUNS[loader](case, size, rank):
            frames += len(pictures)
            samples += 1
            if signatures and len(pictures):
                kept[f"{key}@{first}"] = signature(pictures)
        figures = {"cpu_s": _cpu_s() - before, "wall_s": time.perf_counter() - began}
        figures |= {"frames": frames, "samples": samples}
        if signatures:
            np.savez(path.with_suffix(".npz"), **kept)
    except BaseException:
        figures = {"error": traceback.format_exc()[-2000:]}
    path.with_suffix(".json").write_text(json.dumps(figures), encoding="utf-8")
    os._exit(0)  # nothing of the parent's is to be cleaned up here


def _cpu_s() -> float:
    """Of this process and of those of its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def signature(pictures: torch.Tensor) -> np.ndarray:
    """float32 [F, 3, 8, 8] of uint8 [F, 3, S, S]."""
    return torch.nn.functional.adaptive_avg_pool2d(pictures.float(), _BLOCKS).numpy()


def delivered(loader: str, case: CaseSources, folder: Path) -> dict[str, np.ndarray]:
    """Key → signatures of all pictures of a sample, put together from the shares of all ranks.

    Of ranks that all hold everything the last one counts. Raises DataError when pictures are missing.
    """
    together = {
        key: np.full((len(asked.times), 3, _BLOCKS, _BLOCKS), np.nan, np.float32)
        for key, asked in case.requests.items()
        if asked.times
    }
    for rank in range(case.ranks):
        with np.load(folder / f"{loader}-{case.name}-{rank}.npz") as parts:
            for name, part in parts.items():
                key, _, first = name.rpartition("@")
                together[key][int(first) : int(first) + len(part)] = part
    gone = [key for key, pictures in together.items() if np.isnan(pictures).any()]
    if gone:
        raise DataError(f"{loader} on {case.name}: pictures of {', '.join(gone[:5])} were not delivered")
    return together


def largest_difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray], keys: Iterable[str]) -> float:
    """Of the means of two loaders' blocks, over all pictures; in levels of 0 … 255."""
    return max((float(np.abs(one[key] - other[key]).max()) for key in keys), default=0.0)
