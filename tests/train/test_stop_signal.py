"""A scheduler's signals as processes meet them: the step in progress ends, is saved, and the exit code says why."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from watched_jobs import endless, training

from moss_train.checkpoint.store import latest
from moss_train.exit_codes import INTERRUPTED, REQUEUE
from moss_train.report.metrics_file import read_metrics


def saved_step(folder: Path) -> int:
    saved = latest(folder / "run" / "align" / "checkpoints")
    return int(saved.name.removeprefix("step_")) if saved is not None else 0


# SIGTERM comes below, while torch is imported.
@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, REQUEUE), (signal.SIGINT, INTERRUPTED)])
def test_a_signal_to_one_process_stops_all_saved(small, tmp_path, number, code):
    with endless(small, tmp_path) as job:
        job.wait_until(training(job))
        os.kill(job.pid(1), number)
        assert job.exit_codes(30) == [code, code], job.words()
    assert 4 <= saved_step(tmp_path) < 100000


def stop_in_evaluation(rank: int) -> None:
    from moss_train.train.evaluation import Evaluator

    def figures(*_) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.2)
        return {"seen": 1.0}

    Evaluator.figures = figures


def stop_while_planning(rank: int) -> None:
    from moss_train.train import pipeline

    plan = pipeline.plan_pipeline

    def stopping(*arguments):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return plan(*arguments)

    pipeline.plan_pipeline = stopping


def stop_while_loading(rank: int) -> None:
    from moss_train.train import stage

    build = stage.build_model

    def stopping(*arguments, **more):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return build(*arguments, **more)

    stage.build_model = stopping


def test_a_signal_during_an_evaluation_is_honoured_after_it(small, tmp_path):
    with endless(small, tmp_path, 1, stop_in_evaluation, ["stages.align.eval_every=3"]) as job:
        assert job.exit_codes(30) == [REQUEUE], job.words()
    assert saved_step(tmp_path) == 3
    (row,) = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row.step == 3]
    assert row.metrics["eval/seen"] == 1.0


@pytest.mark.parametrize("mischief", [stop_while_planning, stop_while_loading])
def test_a_signal_before_the_first_step_is_not_lost(small, tmp_path, mischief):
    with endless(small, tmp_path, 2, mischief) as job:
        assert job.exit_codes(30) == [REQUEUE, REQUEUE], job.words()
        assert "Traceback" not in job.words()
    assert saved_step(tmp_path) == 0
    assert (tmp_path / "run").exists() == (mischief is stop_while_loading)


def come_never(rank: int) -> None:
    from moss_train.train import signals

    signals._MEETING_S = 1.0
    if rank == 1:
        time.sleep(3600)
    print("COMES", flush=True)


def test_a_signal_while_the_others_have_not_come(small, tmp_path):
    with endless(small, tmp_path, 2, come_never) as job:
        job.wait_until(lambda: "COMES" in job.words_of(0))
        time.sleep(2.0)
        os.kill(job.pid(0), signal.SIGTERM)
        assert job.exit_codes(20, [0]) == [REQUEUE], job.words()


def test_a_signal_that_comes_while_torch_is_imported(small, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "moss_train", "train", *small, f"output_dir={tmp_path / 'run'}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        maps, deadline = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
        while "libtorch" not in maps.read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        words = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == REQUEUE, words
    assert not (tmp_path / "run").exists()
