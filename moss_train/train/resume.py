"""Which checkpoint each stage of a run goes on from: decided once, before anything is trained.

The main process looks which checkpoints there are and tells the others, since file systems may show them different
things; whether one is whole, all find out together. So all processes go on from the same one, or refuse together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moss_train.checkpoint.files import read_json, read_manifest
from moss_train.checkpoint.store import STATE, latest, open_together, step_directories, step_of
from moss_train.errors import CheckpointError
from moss_train.parallel import groups
from moss_train.parallel.agreement import gather_lists


@dataclass(frozen=True)
class ResumePoint:
    """Where one stage goes on."""

    checkpoint: Path | None = None  #: None: it has none, and begins
    step: int = 0  #: of the checkpoint
    digest: str | None = None  #: of the checkpoint, see `checkpoint_digest`
    #: newer ones that were passed over, and why: (name, what is wrong)
    skipped: tuple[tuple[str, str], ...] = ()
    #: What is wrong with the checkpoint itself, of a stage that has ended and whose successor has begun: nothing of it
    #: is read any more, so it is left as it is.
    damage: str | None = None


def resume_points(directories: Mapping[str, Path], resume: str) -> dict[str, ResumePoint]:
    """Stage → where it goes on, for a run's stages in order (name → directory of its checkpoints). Collective.

    resume: `fallback` passes over damaged checkpoints, and the main process prints which and why; under every other
    value a damaged one raises CheckpointError on all processes, and so does a stage of which none is whole.
    """
    points: dict[str, ResumePoint] = {}
    after: ResumePoint | None = None
    for name, directory in reversed(directories.items()):
        points[name] = after = resume_point(name, directory, resume, after)
    return {name: points[name] for name in directories}


def resume_point(name: str, directory: Path, resume: str, after: ResumePoint | None = None) -> ResumePoint:
    """Where stage `name` goes on. Collective; see `resume_points`. after: where the stage after it does."""
    candidates, faults = _candidates(directory, resume)
    told = groups.state().is_main
    for path in candidates:
        try:
            opened = open_together(path)
        except CheckpointError as error:
            if resume != "fallback":
                raise CheckpointError(_refusal(name, str(error), len(candidates) - 1)) from error
            if (ended := _ended(path, after, str(error))) is not None:
                if told:
                    print(f"{name}: damaged, but the stage after it has begun and needs no more of it: {error}")
                return ended
            faults.append((path.name, str(error)))
            continue
        if told and faults:
            print("\n".join(f"{name}: {passed} is passed over: {reason}" for passed, reason in faults))
            print(f"{name}: goes on from {path.name}, step {opened.step} (resume=fallback)", flush=True)
        return ResumePoint(path, opened.step, opened.digest, tuple(faults))
    if faults:
        raise CheckpointError(
            f"stages.{name}: no checkpoint in {directory} is whole; put a file back, or remove {directory.parent} to "
            "train the stage anew:" + "".join(f"\n  {passed}: {reason}" for passed, reason in faults)
        )
    return ResumePoint()


def _candidates(directory: Path, resume: str) -> tuple[list[Path], list[tuple[str, str]]]:
    """The checkpoints to try in turn, as the main process finds them, and what is wrong with the pointer to them."""
    names: list[str] = []
    faults: list[tuple[str, str]] = []
    if groups.state().is_main:
        found = step_directories(directory)
        newest_first = [(step, found[step].name) for step in sorted(found, reverse=True)]
        try:
            if (pointed := latest(directory)) is not None:
                names = [pointed.name, *(name for step, name in newest_first if step < step_of(pointed))]
        except CheckpointError as error:
            names = [name for _, name in newest_first]
            faults = [("latest", str(error))]
    told = gather_lists([{"names": names, "faults": faults}] if names or faults else [])[0]
    if not told:
        return [], []
    faults = [(what, reason) for what, reason in told[0]["faults"]]
    if faults and resume != "fallback":
        raise CheckpointError(faults[0][1])
    return [directory / name for name in told[0]["names"]], faults


def _ended(path: Path, after: ResumePoint | None, damage: str) -> ResumePoint | None:
    """The point of a stage that the next one has begun from, going by its damaged last checkpoint's manifest; None when
    that is damaged too, or another one was begun from."""
    own: list[object] = []
    if after is not None and after.checkpoint is not None and after.damage is None and groups.state().is_main:
        try:
            manifest = read_manifest(path)
            if read_json(after.checkpoint / STATE).get("origin") == manifest["digest"]:
                own = [manifest["step"], manifest["digest"]]
        except CheckpointError:
            pass
    told = gather_lists(own)[0]
    return ResumePoint(path, told[0], told[1], damage=damage) if told else None


def _refusal(name: str, fault: str, older: int) -> str:
    there = f"{older} older there" if older else "none older is there"
    return (
        f"stages.{name}: {fault}. No other checkpoint is taken unasked: put the file back, or set resume=fallback to "
        f"go on from the newest one that is whole ({there})"
    )
