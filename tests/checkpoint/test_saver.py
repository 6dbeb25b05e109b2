"""Several processes write one checkpoint beside training; what fails on one of them is an error on all."""

import os
import signal
import threading
import time

import pytest
import saver_jobs
import torch

from moss_train.bench.equivalence.ranks import Ranks
from moss_train.checkpoint import files, store
from moss_train.checkpoint.saver import Saver
from moss_train.checkpoint.store import latest, load_checkpoint
from moss_train.engines.pieces import Piece
from moss_train.errors import CheckpointError


@pytest.fixture(scope="module")
def ranks():
    with Ranks(3) as forked:
        yield forked


def test_a_save_is_the_state_it_began_with(ranks, tmp_path):
    told = ranks.run(3, saver_jobs.save_twice, str(tmp_path))
    for rank, one in enumerate(told):
        assert one["steps"] == [1, 2] and one["states"] == [{"step": 1}, {"step": 2}]
        assert one["shared"] == [[10, 10, 11, 11, 12, 12], [20, 20, 21, 21, 22, 22]]
        assert one["own"] == [rank] * 4
    tensors = (tmp_path / "step_00000001").glob("*.safetensors")
    assert told[0]["bytes"] == [sum(file.stat().st_size for file in tensors)] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001", "step_00000002"]
    assert latest(tmp_path).name == "step_00000002"


@pytest.mark.parametrize("how", ["settle", "finish"])
@pytest.mark.parametrize("broken", [0, 2])
def test_a_full_disk_of_one_process_is_an_error_on_all(ranks, tmp_path, broken, how):
    told = ranks.run(3, saver_jobs.save_with_a_full_disk, str(tmp_path), broken, how)
    for message, *left in told:
        assert "step_00000002: cannot be written" in message and "No space left" in message
        assert "earlier checkpoints are intact" in message
        assert left == ["latest", "step_00000001"]
    assert load_checkpoint(latest(tmp_path)).step == 3


def test_a_folder_that_cannot_be_made_is_an_error_on_all(ranks, tmp_path):
    (tmp_path / "taken").write_text("")
    told = ranks.run(2, saver_jobs.save_where_nothing_can_be_made, str(tmp_path))
    assert told[0] == told[1] and "taken" in told[0] and "cannot be written" in told[0]


def test_the_folder_may_be_renamed_as_soon_as_the_last_part_is_seen(ranks, tmp_path):
    for left in ranks.run(3, saver_jobs.save_with_a_slow_process, str(tmp_path)):
        assert left == ["latest", "step_00000001"]


def test_what_a_killed_job_left_behind_writes_into_no_later_save(tmp_path):
    """A process on another host may live for a while after its job was started again."""
    left = store.begin_directory(tmp_path, 1)
    part = left / "part-00001.json"
    part.write_text("{}")
    saver = Saver(tmp_path)
    saver.begin(1, [Piece("model/w", (1,), (0,), torch.ones(1))], {}, {})
    with pytest.raises(FileNotFoundError):
        files.replace(part, b"{}")
    saver.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    assert not list(latest(tmp_path).glob("part-*"))


def test_a_part_that_is_missing_is_never_published(ranks, tmp_path):
    told = ranks.run(2, saver_jobs.save_with_a_gap, str(tmp_path))
    assert told[0] == told[1] and "model/shared: the slices hold 6 of 12 elements" in told[0]
    assert latest(tmp_path) is None


def test_a_tensor_that_is_missing_is_noticed_when_it_is_saved(ranks, tmp_path):
    told = ranks.run(2, saver_jobs.save_without_a_tensor, str(tmp_path))
    assert told[0] == told[1] and "missing model/other [1]" in told[0]
    assert latest(tmp_path) is None


def test_killed_amid_a_save_the_one_before_stands(tmp_path):
    """The whole process dies, threads and all, at instants spread over the time a save takes."""
    pieces = [Piece("model/w", (1 << 20,), (0,), torch.full((1 << 20,), 1.0))]
    saver = Saver(tmp_path)
    began = time.perf_counter()
    saver.begin(1, pieces, {}, {})
    saver.finish()
    takes = time.perf_counter() - began
    found = []
    for number in range(12):
        child = os.fork()
        if child == 0:
            pieces[0].tensor.fill_(2.0 + number)
            Saver(tmp_path).begin(2 + number, pieces, {}, {})
            time.sleep(60)
            os._exit(0)
        time.sleep(takes * number / 8)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        newest = load_checkpoint(latest(tmp_path))
        found.append(newest.step)
        assert (newest.tensors["model/w"] == newest.step).all()
    assert found == sorted(found)


def test_without_a_thread_nothing_is_copied(tmp_path):
    tensor = torch.ones(5)
    saver = Saver(tmp_path, asynchronous=False)
    saver.begin(1, [Piece("model/w", (5,), (0,), tensor)], {}, {})
    tensor.zero_()
    saver.finish()
    assert load_checkpoint(latest(tmp_path)).tensors["model/w"].tolist() == [1.0] * 5
    assert saver.pause_s == 0.0


def test_an_exception_gives_a_running_save_up(tmp_path, monkeypatch):
    def endless(partial, rank, pieces, file_bytes, progress):
        while True:
            progress()
            time.sleep(0.01)

    monkeypatch.setattr("moss_train.checkpoint.saver.write_part", endless)
    saver = Saver(tmp_path)
    with pytest.raises(KeyError), saver:
        saver.begin(1, [Piece("model/w", (5,), (0,), torch.ones(5))], {}, {})
        raise KeyError
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("save-")]
    assert latest(tmp_path) is None


def test_older_checkpoints_that_cannot_be_removed_are_told_of_as_such(tmp_path):
    def denied(directory):
        raise PermissionError(13, "Permission denied")

    saver = Saver(tmp_path, retain=denied)
    saver.begin(1, [Piece("model/w", (5,), (0,), torch.ones(5))], {}, {})
    with pytest.raises(CheckpointError, match="step_00000001 is saved, but .* cannot be removed .*Permission denied"):
        saver.finish()
    assert load_checkpoint(latest(tmp_path)).step == 1
