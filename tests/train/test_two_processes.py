"""The pipeline on two processes, as torchrun starts it: stopped inside a stage, it ends with the same bits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moss_train.checkpoint.store import latest, load_checkpoint


@pytest.fixture
def start():
    """Starts a run on two processes; whatever still runs when the test is over is ended."""
    started: list[subprocess.Popen] = []

    def start(overrides: list[str], output: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "moss_train", "train", *overrides, f"output_dir={output}"]
        started.append(subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()  # torchrun ends its workers first
            process.wait(60)


def newest(output: Path) -> Path | None:
    return latest(output / "realtime" / "checkpoints")


def test_two_processes_stopped_and_resumed_equal_two_that_were_not(small, start, tmp_path):
    overrides = [*small, "stages.align.steps=1", "stages.realtime.steps=30", "stages.realtime.save_every=1"]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    uninterrupted = start(overrides, whole)
    first = start(overrides, stopped)
    deadline = time.monotonic() + 240
    while newest(stopped) is None:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)  # torchrun hands it on to both
    first.wait(240)
    step = load_checkpoint(newest(stopped), only=()).step
    assert 1 <= step < 30

    assert start(overrides, stopped).wait(240) == 0
    assert uninterrupted.wait(240) == 0
    ours, theirs = load_checkpoint(newest(stopped)), load_checkpoint(newest(whole))
    assert ours.step == theirs.step == 30
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert not [name for name in ours.tensors if not torch.equal(ours.tensors[name], theirs.tensors[name])]
    assert ours.state["loader"] == theirs.state["loader"]
    for name in ("step", "trained_tokens", "streams"):
        assert ours.state["progress"][name] == theirs.state["progress"][name]
