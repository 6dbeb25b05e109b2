"""Two runs of which one was killed: is everything they left the same, bit for bit?"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moss_train.bench.recovering.folder import RunFolder
from moss_train.checkpoint.store import Checkpoint, load_checkpoint
from moss_train.report.metrics_file import FILE_NAME, MetricsRow, read_metrics

#: metrics that tell of the machine, not of the training
_MEASURED = {"tokens_per_s", "frames_per_s", "data_wait", "step_seconds"}
_MEASURED_PREFIXES = ("memory/", "save/")
#: of state.json: seconds that were spent, and the digest of the checkpoint before, which holds such seconds
_STATE_APART = {"progress.seconds", "origin"}
_SHOWN = 4  #: names of what differs
_LENGTH = 80  #: characters of a value that differs


@dataclass
class Comparison:
    """What was compared, and what differs."""

    checkpoints: int = 0
    tensors: int = 0
    rows: int = 0
    differences: list[str] = field(default_factory=list)


def compare_runs(whole: RunFolder, killed: RunFolder) -> Comparison:
    """Checkpoints that both kept, the newest of each stage among them, and the metrics of every step."""
    found = Comparison()
    for stage in whole.stages:
        ours, theirs = killed.checkpoints(stage), whole.checkpoints(stage)
        if not ours or max(ours) != max(theirs):
            found.differences.append(f"{stage}: the newest checkpoints are of {_newest(ours)} and {_newest(theirs)}")
        for step in sorted(ours.keys() & theirs.keys()):
            found.checkpoints += 1
            _compare_checkpoints(f"{stage} {step}", theirs[step], ours[step], found)
    _compare_metrics(whole, killed, found)
    return found


def _newest(checkpoints: dict[int, Path]) -> str:
    return f"step {max(checkpoints)}" if checkpoints else "no step"


def _compare_checkpoints(where: str, whole: Path, killed: Path, found: Comparison) -> None:
    theirs, ours = load_checkpoint(whole), load_checkpoint(killed)
    names = sorted(theirs.tensors.keys() ^ ours.tensors.keys())
    if names:
        found.differences.append(f"{where}: only one run has {_some(names)}")
    both = sorted(theirs.tensors.keys() & ours.tensors.keys())
    found.tensors += len(both)
    differing = [name for name in both if not _same_bits(theirs.tensors[name], ours.tensors[name])]
    for kind, named in _by_kind(differing).items():
        found.differences.append(f"{where}: {len(named)} tensors of {kind} differ: {_some(named)}")
    states = [_state(checkpoint) for checkpoint in (theirs, ours)]
    found.differences += [
        f"{where}: state.json: {key} is {_short(states[1].get(key))}, not {_short(states[0].get(key))}"
        for key in sorted(states[0].keys() | states[1].keys())
        if states[0].get(key) != states[1].get(key)
    ]


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Not `torch.equal`, for which NaN differs from itself and the two zeros do not."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def _by_kind(names: list[str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.split("/", 1)[0], []).append(name)
    return kinds


def _state(checkpoint: Checkpoint) -> dict[str, Any]:
    """state.json as dotted keys."""
    return {key: value for key, value in _flat(checkpoint.state).items() if key not in _STATE_APART}


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LENGTH else f"{text[:_LENGTH]}…"


def _compare_metrics(whole: RunFolder, killed: RunFolder, found: Comparison) -> None:
    theirs, ours = (_rows(folder.output) for folder in (whole, killed))
    found.rows = len(theirs)
    missing = [f"{stage} {step}" for stage, step in theirs.keys() ^ ours.keys()]
    if missing:
        found.differences.append(f"metrics: only one run has the steps {_some(sorted(missing))}")
    differing: Counter[str] = Counter()
    for place in theirs.keys() & ours.keys():
        differing.update(_differing(theirs[place], ours[place]))
    found.differences += [f"metrics: {name} differs in {steps} steps" for name, steps in sorted(differing.items())]


def _rows(output: Path) -> dict[tuple[str, int], MetricsRow]:
    return {(row.stage, row.step): row for row in read_metrics(output / FILE_NAME)}


def _differing(one: MetricsRow, other: MetricsRow) -> list[str]:
    names = {
        name
        for name in one.metrics.keys() | other.metrics.keys()
        if name not in _MEASURED and not name.startswith(_MEASURED_PREFIXES)
    }
    # As text, for which NaN equals itself.
    return [name for name in names if repr(one.metrics.get(name)) != repr(other.metrics.get(name))]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
