"""Output folders that appear complete or not at all, and take the place of an older one only when they are whole."""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from moss_train.errors import DataError


def check_target(out: Path, marker: str, verb: str, overwrite: bool, state: str = "exists and is not empty") -> None:
    """Raise DataError unless `out` is free, or made by `verb` (it holds the file `marker`) and may be replaced.

    `state` says in the message what is the matter with one that may not.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out} is a file: choose another out=…")
    if not any(out.iterdir()):
        return
    if not (out / marker).is_file():
        raise DataError(f"{out} holds files that `{verb}` did not write: choose another out=…")
    if not overwrite:
        raise DataError(f"{out} {state}: choose another out=… or give overwrite=true")


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that becomes `out` when the block ends, and is removed when the block raises."""
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    _remove_abandoned(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _put_in_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def resumable_folder(out: Path, made_by: str) -> Iterator[Path]:
    """Like `staged_folder`, for work that is worth keeping: what a block has written when it is killed or raises stays
    in `<out>.unfinished`, and the next block finds it there if its `made_by` is the same. What another left is removed.

    Raises DataError while another process works on the same folder.
    """
    partial = out.with_name(f"{out.name}.unfinished")
    partial.mkdir(parents=True, exist_ok=True)
    note, lock = partial / ".made_by", partial / ".lock"
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"another process is writing {partial}: wait for it, or give another out=") from None
        if not note.is_file() or note.read_text(encoding="utf-8") != made_by:
            for path in partial.iterdir():
                if path != lock:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            note.write_text(made_by, encoding="utf-8")
        yield partial
        note.unlink()
        lock.unlink()
        _put_in_place(partial, out)


def _remove_abandoned(out: Path) -> None:
    """Remove what processes of this machine that were killed have left of the same folder."""
    left = re.compile(rf"{re.escape(out.name)}\.(\d+)\.partial")
    for folder in out.parent.iterdir() if out.parent.is_dir() else ():
        found = left.fullmatch(folder.name)
        if found and not psutil.pid_exists(int(found[1])):
            shutil.rmtree(folder)


def _put_in_place(partial: Path, out: Path) -> None:
    """Rename `partial` to `out`; an older `out` is deleted only after the new one stands, and put back if it cannot."""
    if not out.exists():
        partial.rename(out)
        return
    old = out.with_name(f"{out.name}.{os.getpid()}.old")
    out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old)
