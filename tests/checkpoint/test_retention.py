"""Which checkpoints stay, and that a killed removal leaves nothing that looks like one."""

import pytest
import torch

from moss_train.checkpoint import store
from moss_train.checkpoint.retention import BestBy, apply_retention, best_checkpoint, best_step
from moss_train.checkpoint.store import latest, save_checkpoint, step_directories
from moss_train.errors import CheckpointError


def save(directory, step: int, figure: float | None = None, measured_at: int | None = None):
    measured = {"step": step if measured_at is None else measured_at, "figures": {"eval/speak_f1": figure}}
    state = {"progress": {"step": step}, "metrics": measured}
    return save_checkpoint(directory, step, {"model/x": torch.zeros(1)}, state, {"config": {}})


def steps(directory) -> list[int]:
    return sorted(step_directories(directory))


def test_the_newest_and_every_mth_stay(tmp_path):
    for step in (5, 10, 15, 20, 25):
        save(tmp_path, step)
    removed = apply_retention(tmp_path, keep_last=2, keep_every=10)
    assert [path.name for path in removed] == ["step_00000005", "step_00000015"]
    assert steps(tmp_path) == [10, 20, 25]
    assert apply_retention(tmp_path / "nowhere", keep_last=1) == []
    for illegal in ({"keep_last": 0}, {"keep_last": 1, "keep_every": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            apply_retention(tmp_path, **illegal)


@pytest.mark.parametrize(("mode", "figures", "best"), [("max", (0.2, 0.7, 0.4), 2), ("min", (0.2, 0.7, 0.4), 1)])
def test_the_best_stays_and_is_named(tmp_path, mode, figures, best):
    for step, figure in enumerate((*figures, None, None), 1):
        save(tmp_path, step, figure)
        apply_retention(tmp_path, keep_last=1, best=BestBy("eval/speak_f1", mode))
    assert steps(tmp_path) == [best, 5]
    assert best_checkpoint(tmp_path) == tmp_path / f"step_{best:08d}"
    assert (tmp_path / "best").read_text() == f"step_{best:08d}\n"
    assert latest(tmp_path).name == "step_00000005"


def test_of_equals_the_newer_is_the_best(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, 0.5 if step < 3 else 0.4)
    assert best_step(step_directories(tmp_path), BestBy("eval/speak_f1")) == 2


def test_only_what_was_measured_of_a_checkpoint_itself_counts(tmp_path):
    save(tmp_path, 1, 0.9, measured_at=0)  # of an older step
    save(tmp_path, 2, None)
    save_checkpoint(tmp_path, 3, {}, {}, {})  # from before figures were saved
    assert best_step(step_directories(tmp_path), BestBy("eval/speak_f1")) is None
    apply_retention(tmp_path, keep_last=1, best=BestBy("eval/speak_f1"))
    assert steps(tmp_path) == [3] and best_checkpoint(tmp_path) is None
    save(tmp_path, 4, 0.1)
    apply_retention(tmp_path, keep_last=1, best=BestBy("eval/speak_f1"))
    save(tmp_path, 5)
    (tmp_path / "step_00000005" / "state.json").write_text("{")
    apply_retention(tmp_path, keep_last=1, best=BestBy("eval/speak_f1"))
    assert steps(tmp_path) == [4, 5]
    (tmp_path / "best").write_text("../elsewhere\n")
    with pytest.raises(CheckpointError, match="best"):
        best_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="largest"):
        BestBy("eval/speak_f1", "largest")


def test_the_future_that_was_given_up_goes(tmp_path):
    """After an older checkpoint was gone on from, what lies after the one saved last would pass for the newest."""
    for step in (2, 4, 6, 8):
        save(tmp_path, step, figure=step)
    (tmp_path / "latest").write_text("step_00000004\n")
    save(tmp_path, 5)
    apply_retention(tmp_path, keep_last=2, keep_every=4, best=BestBy("eval/speak_f1"))
    assert steps(tmp_path) == [4, 5]
    assert (tmp_path / "best").read_text() == "step_00000004\n"


def test_what_latest_names_is_never_deleted(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    (tmp_path / "latest").write_text("step_00000002\n")
    apply_retention(tmp_path, keep_last=1)
    assert steps(tmp_path) == [2]


def test_a_killed_removal_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(tmp_path, step)

    def killed(path, **options):
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            apply_retention(tmp_path, keep_last=1)
    assert steps(tmp_path) == [2, 3] and latest(tmp_path).name == "step_00000003"
    for step in steps(tmp_path):
        store.verify(tmp_path / f"step_{step:08d}")
    save(tmp_path, 4)
    apply_retention(tmp_path, keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000004"]


def test_a_kill_between_best_and_removal_keeps_both(tmp_path, monkeypatch):
    best = BestBy("eval/speak_f1")
    save(tmp_path, 1, 0.1)
    apply_retention(tmp_path, 1, best=best)
    save(tmp_path, 2, 0.2)

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moss_train.checkpoint.retention.remove_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            apply_retention(tmp_path, 1, best=best)
    named = tmp_path / (tmp_path / "best").read_text().strip()
    assert named.name == "step_00000002" and named.is_dir()
    assert steps(tmp_path) == [1, 2]
