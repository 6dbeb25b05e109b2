"""What the data lose is told: an event a sample, a figure a step, a line at the end of the stage."""

import json
import shutil

import pytest

from moss_train.data.shards.pack import pack
from moss_train.data.synthetic.render import RenderOptions, render
from moss_train.errors import DataError
from moss_train.report.metrics_file import FILE_NAME
from moss_train.train.compose import compose_run
from moss_train.train.pipeline import run_pipeline


@pytest.fixture(scope="module")
def damaged(packed, tmp_path_factory):
    """Packed data whose `realtime` holds a clip that does not decode, beside eleven that do."""
    folder = tmp_path_factory.mktemp("damaged")
    render(RenderOptions(out=str(folder / "clips"), align=0, temporal=0, sft=0, realtime=12, heldout=0, workers=1))
    clip = folder / "clips" / "train" / "realtime" / "realtime-train-000003.mp4"
    clip.write_bytes(clip.read_bytes()[:300])
    shutil.copytree(packed, folder / "data")
    pack(clip.parent, folder / "data" / "train" / "realtime", overwrite=True)
    return folder / "data" / "train"


def train(small, damaged, output, *more):
    overrides = [*small, f"data_root={damaged}", "~stages.align", "stages.realtime.init=scratch", *more]
    return run_pipeline(compose_run([*overrides, f"output_dir={output}"]))


def test_a_bad_clip_is_told_of_once(small, damaged, tmp_path, capsys):
    assert train(small, damaged, tmp_path) == 0
    records = [json.loads(line) for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    told = [record for record in records if record.get("event") == "quarantine"]
    assert [record["key"] for record in told] == ["realtime-train-000003"] and told[0]["reason"]
    assert sum(record["metrics"]["masked"] for record in records if "metrics" in record) == 2  # six steps, two epochs
    (data,) = (record for record in records if record.get("event") == "data")
    assert (data["streams"], data["masked"], data["quarantined"]) == (22, 2, 1)
    ledger = tmp_path / "realtime" / "quarantine.jsonl"
    assert len(ledger.read_text().splitlines()) == 1
    shown = capsys.readouterr().out
    assert f"realtime: 2 of 24 streams were left out: 0 over budget, 2 from 1 bad samples, see {ledger}" in shown


def test_a_budget_of_none_stops_the_run(small, damaged, tmp_path):
    with pytest.raises(DataError, match="1 of 12 samples are bad"):
        train(small, damaged, tmp_path, "stages.realtime.data.max_bad_fraction=0")
