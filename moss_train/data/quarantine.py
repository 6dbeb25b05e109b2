"""The quarantine ledger: samples that could not be used, why, and how many are too many."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from moss_train.errors import DataError, SampleError


@dataclass(frozen=True)
class Fault:
    """Where and how a sample failed."""

    source: str
    shard: str
    epoch: int
    step: int
    backend: str  #: "compiler", or the decoder that was asked: "auto", "decord", "pyav"
    exception: str  #: name of the exception's type


class Quarantine:
    """Counts bad samples, writes each once to the ledger (one JSON line), and stops the run beyond the budget.

    Samples that do not compile are known to every rank, clips that do not decode only to the rank that tried.

    The budget is `max_bad_fraction` of the blend's distinct samples, rounded up: a fixed number, so that one bad
    sample in the first batch stops nothing and a source that fails throughout stops the run early.
    """

    def __init__(self, path: Path | None, samples: int, max_bad_fraction: float):
        self._path = path
        self._samples = samples
        self._fraction = max_bad_fraction
        self._allowed = math.ceil(max_bad_fraction * samples)
        self._bad: dict[tuple[str, str], str] = {}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        """Distinct samples quarantined in this process."""
        return len(self._bad)

    def reason(self, source: str, key: str) -> str | None:
        """Why a sample is quarantined; None when it is not."""
        return self._bad.get((source, key))

    def add(self, error: SampleError, fault: Fault, write: bool = True) -> None:
        """Record a failed sample; `write` is False on ranks that know of it but do not own the ledger line.

        Raises DataError when the budget is exceeded.
        """
        if (fault.source, error.key) in self._bad:
            return
        self._bad[fault.source, error.key] = error.reason
        if write and self._path is not None:
            entry = {
                "key": error.key,
                "source": fault.source,
                "shard": fault.shard,
                "reason": error.reason,
                "exception": fault.exception,
                "backend": fault.backend,
                "epoch": fault.epoch,
                "step": fault.step,
            }
            _append_line(self._path, json.dumps(entry, ensure_ascii=False))
        if len(self._bad) > self._allowed:
            where = f"; all are listed in {self._path}" if self._path else ""
            raise DataError(
                f"{len(self._bad)} of {self._samples} samples are bad, more than data.max_bad_fraction="
                f"{self._fraction} allows; the latest: {error}{where}"
            )


def _append_line(path: Path, line: str) -> None:
    """One write in append mode, so that lines of several ranks do not mix."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (line + "\n").encode())
    finally:
        os.close(descriptor)
