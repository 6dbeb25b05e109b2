"""The quarantine ledger: samples that could not be used, why, and how many are too many."""

import json
import math
import os
from collections import Counter
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
    backend: str  #: "compiler", or the decoder that was asked: "auto", "decord", "pyav", "torchcodec"
    epoch: int | None = None  #: None: found before training
    step: int | None = None  #: within the epoch

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Quarantine:
    """Counts bad samples, writes each once to the ledger (one JSON line), and stops the run beyond the budget.

    The budget of a source is `max_bad_fraction` of its samples, rounded up: a fixed number, so that one bad sample in
    the first batch stops nothing, and a source that fails throughout stops the run early however large the others are.

    Every rank counts the same faults; the one that was given the ledger's path writes it. What the ledger holds from
    an earlier run over the same data is in `earlier`, to be added like a fault of this run, so that all ranks learn it.

    Args:
        path: the ledger; None on ranks that do not write it.
        samples: source → its samples.
        max_bad_fraction: the budget.
        fingerprints: source → fingerprint of its index.

    Raises DataError when the ledger that is there cannot be read.
    """

    def __init__(
        self,
        path: Path | None,
        samples: Mapping[str, int],
        max_bad_fraction: float,
        fingerprints: Mapping[str, str] | None = None,
    ):
        self._path = path
        self._samples = dict(samples)
        self._fraction = max_bad_fraction
        self._bad: dict[tuple[str, str], str] = {}
        self._count: Counter[str] = Counter()
        self.earlier: list[Fault] = []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            fingerprints = fingerprints or {}
            self.earlier = [f for f in read_ledger(path) if fingerprints.get(f.source) == f.fingerprint]
        self._written = {(fault.source, fault.key) for fault in self.earlier}

    def __len__(self) -> int:
        """Distinct samples quarantined, over all ranks and over earlier runs that wrote the same ledger."""
        return len(self._bad)

    def reason(self, source: str, key: str) -> str | None:
        """Why a sample is quarantined; None when it is not."""
        return self._bad.get((source, key))

    def count(self, source: str) -> int:
        """Distinct samples of one source that are quarantined."""
        return self._count[source]

    def add(self, faults: Iterable[Fault]) -> list[Fault]:
        """Record failed samples, the same ones on every rank; returns those that the ledger did not hold.

        Raises DataError when a source's budget is exceeded, after all of them are written.
        """
        new: list[Fault] = []
        latest: dict[str, Fault] = {}
        for fault in faults:
            place = fault.source, fault.key
            if place in self._bad:
                continue
            self._bad[place] = fault.reason
            self._count[fault.source] += 1
            latest[fault.source] = fault
            if place not in self._written:
                new.append(fault)
                if self._path is not None:
                    _append_line(self._path, json.dumps(fault.to_json(), ensure_ascii=False))
        for source, fault in latest.items():
            samples = self._samples.get(source, 0)
            if self._count[source] > math.ceil(self._fraction * samples):
                where = f"; all are listed in {self._path}" if self._path else ""
                raise DataError(
                    f"{self._count[source]} of the {samples} samples of source {source!r} are bad, more than "
                    f"data.max_bad_fraction={self._fraction} allows; the latest: sample {fault.key!r}: "
                    f"{fault.reason}{where}"
                )
        return new


def read_ledger(path: Path) -> list[Fault]:
    """The entries of a ledger, none when there is no such file. Raises DataError for a line that is no entry."""
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
