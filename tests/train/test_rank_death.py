"""A process that dies ends the others promptly, with a line that names it; torchrun begins them anew."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_jobs import rows
from watched_jobs import Job, endless, training

from moss_train.exit_codes import MISTAKE, PEER_LOST

PROMPTLY = 15.0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process(small, tmp_path, rank):
    with endless(small, tmp_path) as job:
        job.wait_until(training(job))
        os.kill(job.pid(rank), signal.SIGKILL)
        assert job.exit_codes(PROMPTLY, [1 - rank]) == [PEER_LOST]
        assert f"error: rank {rank} (dp {rank}), process {job.pid(rank)} on " in job.words_of(1 - rank)
        assert "Traceback" not in job.words_of(1 - rank)


def fail_in_the_third_step(rank: int) -> None:
    from moss_train.engines.megatron import MegatronEngine
    from moss_train.parallel.phases import activity

    take_step = MegatronEngine._take_step

    def failing(engine, *arguments):
        if rank == 1 and activity().step == 3:
            raise ValueError("the third step was too much")
        return take_step(engine, *arguments)

    MegatronEngine._take_step = failing


def wait_without_end(rank: int) -> None:
    """Rank 1 fails; rank 0 does not notice, as if it were waiting for a GPU."""
    fail_in_the_third_step(rank)
    if rank == 0:
        from moss_train.engines.megatron import MegatronEngine
        from moss_train.parallel.phases import activity

        take_step = MegatronEngine._take_step

        def waiting(engine, *arguments):
            if activity().step == 3:
                time.sleep(3600)
            return take_step(engine, *arguments)

        MegatronEngine._take_step = waiting


@pytest.mark.parametrize("mischief", [fail_in_the_third_step, wait_without_end])
def test_what_one_process_raised_is_told_by_the_others(small, tmp_path, mischief):
    # Not for its patience: the watchdog of stalls is off.
    with endless(small, tmp_path, mischief=mischief, more=["watchdog.stall_s=null"]) as job:
        assert job.exit_codes(60) == [PEER_LOST, 1]
    assert "ValueError: the third step was too much" in job.words_of(1)
    (line,) = [line for line in job.words_of(0).splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 1 (dp 1), process ") and "ValueError: the third step was too much" in line


def test_a_mistake_that_all_meet_is_told_as_one(small, tmp_path):
    with endless(small, tmp_path, more=["stages.align.data.sources.align.path=nowhere"]) as job:
        assert job.exit_codes(60) == [MISTAKE, MISTAKE]


def test_torchrun_begins_anew_and_ends_with_the_same_losses(small, tmp_path):
    """Killed in the middle, the run goes on from its newest checkpoint, `resume=never` notwithstanding."""
    steps = ["~stages.realtime", "stages.align.steps=100", "stages.*.save_every=10", "stages.*.log_every=1"]
    overrides = [*small, *steps, "resume=never"]
    with Job([*overrides, f"output_dir={tmp_path / 'whole'}"], tmp_path, 2) as whole:
        assert whole.exit_codes(60) == [0, 0], whole.words()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    with open(tmp_path / "words", "w") as words:
        agent = subprocess.Popen(
            [*torchrun, "-m", "moss_train", "train", *overrides, f"output_dir={tmp_path / 'killed'}"],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=words,
            stderr=words,
        )
    try:
        checkpoints, deadline = tmp_path / "killed" / "align" / "checkpoints", time.monotonic() + 90
        while not (checkpoints / "latest").exists():
            assert agent.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(workers[1]), signal.SIGKILL)
        assert agent.wait(90) == 0, (tmp_path / "words").read_text()
    finally:
        agent.kill()
    assert "error: rank 1 (dp 1), process " in (tmp_path / "words").read_text()
    beginnings = [
        record["event"]
        for record in map(json.loads, (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines())
        if record.get("event") in ("start", "resume")
    ]
    assert beginnings == ["start", "resume"]
    killed, expected = rows(tmp_path / "killed"), rows(tmp_path / "whole")
    assert killed.keys() == expected.keys() and len(killed) == 100
    assert all(killed[place]["loss"] == expected[place]["loss"] for place in expected)
