"""Killed, cut, flipped, deleted, no space, no permission: the answer is an older checkpoint or a clear refusal."""

import os
import resource
import traceback

import pytest
import torch

from moss_train.checkpoint import files, store
from moss_train.checkpoint.store import latest, load_checkpoint, save_checkpoint
from moss_train.errors import CheckpointError


def save(directory, step: int):
    tensors = {f"model/{name}": torch.full((40, 50), step + name) for name in range(3)}
    return save_checkpoint(directory, step, tensors, {"step": step}, {"config": {"a": 1}}, file_bytes=9000)


def in_child(action) -> int:
    """Run `action` in a forked process; its exit code. 0: returned, 7: `action` left by itself, 1: an error."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return save(tmp_path_factory.mktemp("pristine"), 3)


def copy_of(path, folder):
    copy = folder / path.name
    copy.mkdir()
    for file in path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_any_damage_to_any_file_is_refused_by_name(pristine, tmp_path):
    load_checkpoint(copy_of(pristine, tmp_path))
    path, names = tmp_path / pristine.name, sorted(file.name for file in pristine.iterdir())
    assert {"manifest.json", "index.json", "state.json", "config.yaml", "provenance.json"} < set(names)
    assert len(names) == 8
    for name in names:
        file, content = path / name, (pristine / name).read_bytes()

        def refused(name=name):
            with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                load_checkpoint(path)

        file.unlink()
        refused()
        for length in {0, 1, len(content) // 2, len(content) - 1}:
            file.write_bytes(content[:length])
            refused()
        file.write_bytes(content + b"\n")
        refused()
        for place in range(0, len(content), max(1, len(content) // 40)):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            refused()
        file.write_bytes(content)
    load_checkpoint(path)


@pytest.mark.parametrize("second_step", [1, 2])
def test_killed_at_any_instant_of_a_save(tmp_path, second_step):
    """Die before the n-th call that changes the disk, for every n; then find a whole checkpoint and save again."""
    instants = 0
    while True:
        directory = tmp_path / f"kill{instants}"
        save(directory, 1)

        def die_at(instants=instants, directory=directory):
            left = [instants]

            def dying(call):
                def wrapped(*args, **kwargs):
                    if left[0] == 0:
                        os._exit(7)
                    left[0] -= 1
                    return call(*args, **kwargs)

                return wrapped

            for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
                setattr(os, name, dying(getattr(os, name)))
            save(directory, second_step)

        code = in_child(die_at)
        assert code in (0, 7)
        found = load_checkpoint(latest(directory))
        assert found.step in (1, second_step) and found.state == {"step": found.step}
        assert all((found.tensors[f"model/{name}"] == found.step + name).all() for name in range(3))
        save(directory, 3)
        assert load_checkpoint(latest(directory)).step == 3
        assert not [entry.name for entry in directory.iterdir() if entry.name.startswith(".")]
        if code == 0:
            break
        instants += 1
    assert instants > 15


def test_a_full_disk_is_an_error_and_leaves_the_old_checkpoint(tmp_path):
    old = save(tmp_path, 1)

    def save_with_little_space():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(CheckpointError, match="step_00000002.*earlier checkpoints are intact"):
            save(tmp_path, 2)

    assert in_child(save_with_little_space) == 0
    assert latest(tmp_path) == old
    load_checkpoint(old)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_no_permission_is_an_error_and_leaves_the_old_checkpoint(tmp_path):
    old = save(tmp_path, 1)

    def save_as_nobody():
        if os.geteuid() == 0:
            os.setegid(65534)
            os.seteuid(65534)
        with pytest.raises(CheckpointError, match="cannot be written"):
            save(tmp_path, 2)

    tmp_path.chmod(0o500)
    try:
        assert in_child(save_as_nobody) == 0
    finally:
        tmp_path.chmod(0o700)
    assert latest(tmp_path) == old
    load_checkpoint(old)


def test_a_place_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path / "taken", 1)


def test_a_failed_rename_puts_the_replaced_checkpoint_back(tmp_path, monkeypatch):
    save(tmp_path, 1)
    rename = os.rename

    def failing(source, target):
        if os.path.basename(source).startswith(".tmp-step_00000001"):
            raise PermissionError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(CheckpointError):
        save(tmp_path, 1)
    monkeypatch.undo()
    assert load_checkpoint(latest(tmp_path)).step == 1


def test_a_removal_killed_half_way_leaves_nothing_to_load(tmp_path, monkeypatch):
    save(tmp_path, 1)
    second = save(tmp_path, 2)

    def die(*args, **kwargs):
        os._exit(7)

    def remove():
        store.shutil.rmtree = die
        store.remove_checkpoint(tmp_path / "step_00000001")

    assert in_child(remove) == 7
    assert store.step_directories(tmp_path) == {2: second}


def test_contents_are_read_once_in_a_process(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    hashed = []
    original = files._checksum
    monkeypatch.setattr(files, "_checksum", lambda file: hashed.append(file.name) or original(file))
    load_checkpoint(path)
    assert sorted(hashed) == sorted(file.name for file in path.iterdir() if file.name != files.MANIFEST)
    hashed.clear()
    load_checkpoint(path, only=())
    store.verify(path)
    assert not hashed
    changed = path / "state.json"
    changed.write_bytes(changed.read_bytes().replace(b"1", b"2"))
    with pytest.raises(CheckpointError, match="has changed"):
        load_checkpoint(path)
