"""The quarantine ledger: samples that could not be used, why, and how many are too many."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moss_train.errors import DataError


@dataclass(frozen=True)
class Fault:
    """One sample that failed, where and how; a line of the ledger."""

    key: str
    source: str
    fingerprint: str  #: of the source's index: a fault of other data says nothing about these
    shard: str
    reason: str
    exception: str  #: name of the exception's type
    backend: str  #: "compiler", or the decoder that was asked: "auto", "decord", "pyav"
    epoch: int
    step: int  #: within the epoch

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Quarantine:
    """Counts bad samples, writes each once to the ledger (one JSON line), and stops the run beyond the budget.

    The budget is `max_bad_fraction` of the blend's distinct samples, rounded up: a fixed number, so that one bad
    sample in the first batch stops nothing and a source that fails throughout stops the run early.

    Every rank counts the same faults; the one that was given the ledger's path writes it. What the ledger holds from
    an earlier run over the same data is in `earlier`, to be added like a fault of this run, so that all ranks learn it.

    Args:
        path: the ledger; None on ranks that do not write it.
        samples: distinct samples of the blend.
        max_bad_fraction: the budget.
        fingerprints: source → fingerprint of its index.

    Raises DataError when the ledger that is there cannot be read.
    """

    def __init__(
        self, path: Path | None, samples: int, max_bad_fraction: float, fingerprints: Mapping[str, str] | None = None
    ):
        self._path = path
        self._samples = samples
        self._fraction = max_bad_fraction
        self._allowed = math.ceil(max_bad_fraction * samples)
        self._bad: dict[tuple[str, str], str] = {}
        self.earlier: list[Fault] = []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            fingerprints = fingerprints or {}
            self.earlier = [f for f in _read_ledger(path) if fingerprints.get(f.source) == f.fingerprint]
        self._written = {(fault.source, fault.key) for fault in self.earlier}

    def __len__(self) -> int:
        """Distinct samples quarantined, over all ranks and over earlier runs that wrote the same ledger."""
        return len(self._bad)

    def reason(self, source: str, key: str) -> str | None:
        """Why a sample is quarantined; None when it is not."""
        return self._bad.get((source, key))

    def add(self, faults: Iterable[Fault]) -> list[Fault]:
        """Record failed samples, the same ones on every rank; returns those that the ledger did not hold.

        Raises DataError when the budget is exceeded, after all of them are written.
        """
        new, latest = [], None
        for fault in faults:
            place = fault.source, fault.key
            if place in self._bad:
                continue
            self._bad[place] = fault.reason
            latest = fault
            if place not in self._written:
                new.append(fault)
                if self._path is not None:
                    _append_line(self._path, json.dumps(fault.to_json(), ensure_ascii=False))
        if latest is not None and len(self._bad) > self._allowed:
            where = f"; all are listed in {self._path}" if self._path else ""
            raise DataError(
                f"{len(self._bad)} of {self._samples} samples are bad, more than data.max_bad_fraction="
                f"{self._fraction} allows; the latest: sample {latest.key!r}: {latest.reason}{where}"
            )
        return new


def _read_ledger(path: Path) -> list[Fault]:
    if not path.exists():
        return []
    faults = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            faults.append(Fault(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path} line {number} is no entry of a quarantine ledger: delete the line") from error
    return faults


def _append_line(path: Path, line: str) -> None:
    """One write in append mode, so that a crash leaves whole lines."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (line + "\n").encode())
    finally:
        os.close(descriptor)
