"""Which checkpoints of a directory are kept."""

from pathlib import Path

from moss_train.checkpoint.store import latest, remove_checkpoint, step_directories


def apply_retention(directory: Path, keep_last: int, keep_every: int | None = None) -> list[Path]:
    """Delete all but the newest `keep_last` checkpoints and those whose step is a multiple of `keep_every`.

    The one `latest` points at is never deleted. Returns what was deleted, oldest first.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last={keep_last}: must be at least 1")
    found = step_directories(directory)
    kept = set(sorted(found)[-keep_last:])
    if keep_every:
        kept |= {step for step in found if step % keep_every == 0}
    pointed = latest(directory)
    doomed = [found[step] for step in sorted(found) if step not in kept and found[step] != pointed]
    for path in doomed:
        remove_checkpoint(path)
    return doomed
