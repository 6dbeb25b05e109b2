"""launch/quickstart.sh in front of commands that only leave their traces: what is made anew, and what is not."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = """#!/usr/bin/env bash
case "$1" in
-) exit 0 ;;  # the requirements are met
-c) echo 2; exit ;;  # processes
esac
echo "$*" >>"$FAKE_LOG"
out=outputs/smoke
case "$*" in *smoke_synth*) out=outputs/smoke_synth ;; esac
case "$*" in
*"data synth"*) mkdir -p $out/synth; echo "$FAKE_KEY" >$out/synth/synth.jsonl ;;
*"data render"*) mkdir -p $out/clips; echo "$FAKE_KEY" >$out/clips/render.json ;;
*"data pack"*) mkdir -p "${!##out=}" ;;
*dry_run*) ;;
*train*) mkdir -p $out/align/checkpoints/step_1
    [ -f $out/align/checkpoints/step_1/manifest.json ] || date +%N >$out/align/checkpoints/step_1/manifest.json
    exit "$FAKE_TRAINING" ;;
esac
"""


def run(folder: Path, *arguments: str, key: str = "a", training: int = 0) -> list[str]:
    """The commands that the quickstart called."""
    if not (folder / "launch").exists():
        shutil.copytree(ROOT / "launch", folder / "launch")
        for path, text in ((folder / "bin" / "python", PYTHON), (folder / "nvidia-smi", "#!/bin/sh\nexit 1\n")):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
    log = folder / "log"
    log.write_text("")
    environment = os.environ | {
        "MOSS_TRAIN_ENV": str(folder),
        "PATH": f"{folder}:{os.environ['PATH']}",
        "FAKE_LOG": str(log),
        "FAKE_KEY": key,
        "FAKE_TRAINING": str(training),
    }
    command = ["bash", str(folder / "launch" / "quickstart.sh"), "--smoke", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == training, done.stderr
    return log.read_text().splitlines()


def packs(calls: list[str]) -> int:
    return sum("data pack" in call for call in calls)


def test_a_finished_run_is_not_made_anew_and_its_seconds_stay(tmp_path):
    first = run(tmp_path)
    assert packs(first) == 6 and "--nproc-per-node 2" in first[-2] and "requirements=smoke" in first[-1]
    seconds = tmp_path / "outputs" / "smoke" / "seconds"
    assert 0 <= int(seconds.read_text()) < 60
    seconds.write_text("123\n")
    again = run(tmp_path)
    assert packs(again) == 0 and again[-1].endswith("spent_s=123") and seconds.read_text() == "123\n"


def test_other_clips_make_another_run(tmp_path):
    run(tmp_path)
    manifest = tmp_path / "outputs/smoke/align/checkpoints/step_1/manifest.json"
    before = manifest.read_text()
    assert packs(run(tmp_path, key="b")) == 6
    assert manifest.read_text() != before


def test_an_interrupted_training_goes_on_and_its_seconds_count(tmp_path):
    run(tmp_path, training=130)
    seconds = tmp_path / "outputs" / "smoke" / "seconds"
    seconds.write_text("100\n")
    (tmp_path / "outputs/smoke/align/checkpoints/step_1/manifest.json").unlink()  # it will save once more
    calls = run(tmp_path)
    assert packs(calls) == 0 and 100 <= int(calls[-1].rpartition("=")[2]) < 160


def test_overrides_are_checked_once_before_several_processes_start(tmp_path):
    calls = [call for call in run(tmp_path, "seed=2") if "seed=2" in call]
    assert len(calls) == 2 and calls[0].endswith("dry_run=true") and "torch.distributed.run" in calls[1]


def test_synthesised_dialogues_are_written_once_and_have_a_folder_of_their_own(tmp_path):
    run(tmp_path)
    calls = run(tmp_path, "data=synth")
    assert packs(calls) == 7
    (synth,) = (call for call in calls if "data synth" in call)
    assert "source=rendered path=outputs/smoke_synth/clips/train/realtime out=outputs/smoke_synth/synth" in synth
    (packed,) = (call for call in calls if "source=outputs/smoke_synth/synth" in call)
    assert "out=outputs/smoke_synth/data/train/realtime_synth" in packed
    assert "output_dir=outputs/smoke_synth data=synth" in calls[-2] and "run=outputs/smoke_synth" in calls[-1]
    manifest = tmp_path / "outputs/smoke_synth/align/checkpoints/step_1/manifest.json"
    before = manifest.read_text()
    assert packs(run(tmp_path, "data=synth")) == 0 and manifest.read_text() == before
    # other dialogues make another run, of the same clips
    (tmp_path / "outputs/smoke_synth/data/synth.jsonl").write_text("other")
    assert packs(run(tmp_path, "data=synth")) == 1 and manifest.read_text() != before
