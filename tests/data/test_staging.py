"""Output folders: whole or absent, and an older one is never lost."""

from pathlib import Path

import pytest

from moss_train.data.shards import staging
from moss_train.data.shards.staging import check_target, staged_folder
from moss_train.errors import DataError


def write(out: Path, text: str) -> None:
    with staged_folder(out) as partial:
        (partial / "made").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_takes_the_place_of_the_old_one(tmp_path):
    out = tmp_path / "deep" / "out"
    write(out, "first")
    (out / "more").mkdir()
    write(out, "second")
    assert (out / "made").read_text() == "second" and names(out) == ["made"] and names(out.parent) == ["out"]


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, "first")
    with pytest.raises(KeyboardInterrupt), staged_folder(out) as partial:
        (partial / "made").write_text("second")
        raise KeyboardInterrupt
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no"):
        write(out, "third")
    assert (out / "made").read_text() == "first" and names(tmp_path) == ["out"]


def test_the_old_folder_stands_until_the_new_one_is_there(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, "first")
    removed = []

    def watch(path: Path, **options) -> None:
        removed.append(path.name)
        assert not path.exists() or (out / "made").read_text() == "second"

    monkeypatch.setattr(staging.shutil, "rmtree", watch)
    write(out, "second")
    assert any(name.endswith(".old") for name in removed)


def test_only_folders_of_the_same_verb_are_replaced(tmp_path):
    out = tmp_path / "out"
    check_target(out, "made", "data pack", overwrite=False)
    out.mkdir()
    check_target(out, "made", "data pack", overwrite=False)
    (out / "letter").write_text("dear")
    with pytest.raises(DataError, match="`data pack` did not write"):
        check_target(out, "made", "data pack", overwrite=True)
    (out / "made").write_text("x")
    check_target(out, "made", "data pack", overwrite=True)
    with pytest.raises(DataError, match="overwrite=true"):
        check_target(out, "made", "data pack", overwrite=False)
    with pytest.raises(DataError, match="is a file"):
        check_target(out / "made", "made", "data pack", overwrite=True)
