"""Real files go the whole way: converted, packed and trained on by every stage, with the commands of the guide."""

from pathlib import Path

import pytest
from shared_data import shared_folder

from moss_train.cli import main
from moss_train.report.metrics_file import FILE_NAME, read_metrics

EXAMPLES = Path(__file__).resolve().parents[2] / "data_specs" / "examples" / "real"


def test_ten_steps_of_every_stage_lower_the_loss_on_real_clips(tmp_path):
    staging, packed, output = (str(tmp_path / name) for name in ("staging", "packed", "run"))
    media = f"media_root={shared_folder() / 'real_data'}"
    assert main(["data", "convert", "source=examples", f"annotations={EXAMPLES}", media, f"out={staging}"]) == 0
    assert main(["data", "pack", f"source={staging}", f"out={packed}"]) == 0
    run = ["recipe=real_examples", f"data_root={packed}", f"output_dir={output}"]
    assert main(["train", *run, "tracking=disabled"]) == 0
    losses: dict[str, list[float]] = {}
    for row in read_metrics(Path(output) / FILE_NAME):
        losses.setdefault(row.stage, []).append(row.metrics["loss"])
        assert row.metrics["masked"] == 0
    assert list(losses) == ["align", "temporal", "sft", "realtime"]
    for stage, values in losses.items():
        assert len(values) == 10
        assert sum(values[-3:]) / 3 < values[0], stage


@pytest.mark.parametrize("named", ["", "empty"])
def test_a_shared_folder_that_was_named_but_is_empty_is_no_reason_to_skip(tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOSS_TRAIN_SHARED", named)
    with pytest.raises(pytest.fail.Exception, match="MOSS_TRAIN_SHARED"):
        shared_folder()
