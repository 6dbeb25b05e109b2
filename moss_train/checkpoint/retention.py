"""Which checkpoints of a directory are kept, and which of them is the best.

The history of a directory ends at the checkpoint that `latest` names. One of a later step is of a future that was given
up: it was found damaged and an older one gone on from, or somebody set the pointer back. The run takes those steps
anew, so the next retention removes what is left of them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moss_train.checkpoint.files import read_json, replace_durably
from moss_train.checkpoint.store import STATE, latest, remove_checkpoint, step_directories, step_of
from moss_train.errors import CheckpointError

BEST = "best"  #: file with the name of the best checkpoint's directory
MODES = ("max", "min")


@dataclass(frozen=True)
class BestBy:
    """What makes a checkpoint the best."""

    metric: str  #: name of an evaluation's figure, as it is logged: `eval/speak_f1`
    mode: str = "max"  #: whether a larger (`max`) or a smaller (`min`) figure is better

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}: legal values are {', '.join(MODES)}")


def apply_retention(
    directory: Path, keep_last: int, keep_every: int | None = None, best: BestBy | None = None
) -> list[Path]:
    """Delete all but the newest `keep_last` checkpoints, those whose step is a multiple of `keep_every`, and the best.

    The one `latest` names is never deleted, those after it always are. `best` names the best one in the file `best`.
    Returns what was deleted, oldest first. Killed at any instant, it leaves what `latest` and `best` name whole.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last={keep_last}: must be at least 1")
    if keep_every is not None and keep_every < 1:
        raise ValueError(f"keep_every={keep_every}: must be at least 1, or None")
    found = step_directories(directory)
    pointed = latest(directory)
    if pointed is None:
        return []
    history = {step: path for step, path in found.items() if step <= step_of(pointed)}
    kept = {*sorted(history)[-keep_last:], step_of(pointed)}
    if keep_every is not None:
        kept |= {step for step in history if step % keep_every == 0}
    if best is not None and (step := best_step(history, best)) is not None:
        kept.add(step)
        _point_at_best(directory, history[step].name)
    doomed = [found[step] for step in sorted(found) if step not in kept]
    for path in doomed:
        remove_checkpoint(path)
    return doomed


def best_checkpoint(directory: Path) -> Path | None:
    """What the file `best` names; None where none is named, CheckpointError when it does not exist."""
    pointer = Path(directory) / BEST
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8", errors="replace").removesuffix("\n")
    for path in step_directories(directory).values():
        if path.name == name:
            return path
    raise CheckpointError(f"{pointer}: names no checkpoint that exists; write the name of a step directory into it")


def best_step(checkpoints: Mapping[int, Path], best: BestBy) -> int | None:
    """The step of the best of `checkpoints` (step → directory), of equals the newest; None when none was measured."""
    figures = {step: figure_of(path, best.metric) for step, path in checkpoints.items()}
    sign = 1.0 if best.mode == "max" else -1.0
    measured = [(sign * figure, step) for step, figure in figures.items() if figure is not None]
    return max(measured)[1] if measured else None


def figure_of(checkpoint: Path, metric: str) -> float | None:
    """What an evaluation measured of this very checkpoint; None when there was none at its step, or it gave no
    number."""
    try:
        state = read_json(checkpoint / STATE)
        step, measured = state["progress"]["step"], state["metrics"]
        figure = measured["figures"][metric] if measured["step"] == step else None
    except (CheckpointError, KeyError, TypeError):
        return None  # damaged, or of a time before figures were saved
    return float(figure) if isinstance(figure, (int, float)) and math.isfinite(figure) else None


def _point_at_best(directory: Path, name: str) -> None:
    pointer = directory / BEST
    content = f"{name}\n".encode()
    if not pointer.is_file() or pointer.read_bytes() != content:
        replace_durably(pointer, content)
