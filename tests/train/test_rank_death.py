"""A process that dies ends the others promptly, with a line that names it; torchrun begins them anew."""

import os
import signal
import time

import pytest
from watched_jobs import endless, training

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
