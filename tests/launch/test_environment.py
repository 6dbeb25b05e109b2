"""launch/environment.sh in front of a pip that only writes down what it was asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/usr/bin/env bash
case "$1" in
-) exit 1 ;;  # the requirements are not met
-c) [ -n "$FAKE_TORCH" ] && exec "$REAL_PYTHON" -c "import importlib.metadata as m
m.version = lambda name: '$FAKE_TORCH'
$2" ;;
-m) echo "$*" >>"$FAKE_LOG"; case "$*" in *"+cpu"*) exit "$FAKE_NO_CPU_BUILD" ;; esac; exit 0 ;;
esac
exit 1
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="CPU builds of PyTorch with +cpu exist for Linux only")


def install(folder: Path, torch: str = "", cpu_build: bool = True, gpu: bool = False) -> tuple[list[str], str]:
    """What pip was called with, and what the user was told."""
    (folder / "bin").mkdir()
    for path, text in (
        (folder / "bin" / "python", PYTHON),
        (folder / "nvidia-smi", "#!/bin/sh\necho GPU 0\n" if gpu else "#!/bin/sh\nexit 1\n"),
    ):
        path.write_text(text)
        path.chmod(0o755)
    environment = os.environ | {
        "MOSS_TRAIN_ENV": str(folder),
        "PATH": f"{folder}:{os.environ['PATH']}",
        "FAKE_LOG": str(folder / "log"),
        "FAKE_TORCH": torch,
        "FAKE_NO_CPU_BUILD": str(int(not cpu_build)),
        "REAL_PYTHON": sys.executable,
    }
    command = ["bash", "-ec", "source launch/environment.sh"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    calls = [line.removeprefix("-m pip install ").replace("--quiet ", "") for line in open(folder / "log")]
    return [call.strip() for call in calls], done.stderr


PACKAGE = "-e .[video,wandb,dev]"


def test_the_cpu_build_is_taken_where_the_index_has_it(tmp_path):
    calls, said = install(tmp_path)
    assert calls == ["torch==2.13.0+cpu", "torch==2.13.0", f"-c constraints-cpu.txt {PACKAGE}"]
    assert "larger" not in said and "error" not in said


def test_else_the_plain_one_and_it_is_said(tmp_path):
    calls, said = install(tmp_path, cpu_build=False)
    assert calls == ["torch==2.13.0+cpu", "torch==2.13.0", f"-c constraints-cpu.txt {PACKAGE}"]
    assert sum("larger download" in line for line in said.splitlines()) == 1 and "error" not in said


def test_a_gpu_gets_the_plain_build(tmp_path):
    assert install(tmp_path, gpu=True)[0] == ["torch==2.13.0", f"torch==2.13.0 {PACKAGE}"]


def test_a_torch_that_will_do_is_never_replaced(tmp_path):
    assert install(tmp_path, torch="2.9.1+cu130")[0] == [f"torch==2.9.1+cu130 {PACKAGE}"]


def test_an_old_torch_is(tmp_path):
    assert "torch==2.13.0" in install(tmp_path, torch="2.5.1")[0]


def test_the_constraint_fits_both_builds_and_no_file_names_an_index():
    from packaging.requirements import Requirement

    (line,) = (line for line in (ROOT / "constraints-cpu.txt").read_text().splitlines() if line[:1] != "#")
    fits = Requirement(line).specifier.contains
    assert fits("2.13.0") and fits("2.13.0+cpu") and not fits("2.13.1")
    for path in (*(ROOT / "launch").iterdir(), ROOT / "constraints-cpu.txt", ROOT / "pyproject.toml"):
        assert "://" not in path.read_text() and "index-url" not in path.read_text().lower()
