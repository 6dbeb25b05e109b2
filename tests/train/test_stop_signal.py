"""A scheduler's SIGTERM as a process meets it: the step in progress ends, is saved, and the exit code says why."""

import os
import signal
import subprocess
import sys
import time

from moss_train.checkpoint.store import latest
from moss_train.report.metrics_file import FILE_NAME


def test_sigterm_saves_and_exits_with_143(small, tmp_path):
    arguments = ["train", *small, f"output_dir={tmp_path}", "stages.align.steps=100000", "stages.align.save_every=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "moss_train", *arguments], env=environment)
    try:
        deadline = time.monotonic() + 90
        metrics = tmp_path / FILE_NAME
        while not (metrics.is_file() and '"metrics"' in metrics.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    saved = latest(tmp_path / "align" / "checkpoints")
    assert saved is not None and 0 < int(saved.name.removeprefix("step_")) < 100000
