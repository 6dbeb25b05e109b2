"""What the data lose is told: an event a sample, a figure a step, a line at the end of the stage."""

import io
import json
import shutil
from pathlib import Path

import av
import pytest

from moss_train.data.shards.pack import pack
from moss_train.data.synthetic.render import RenderOptions, render
from moss_train.errors import DataError
from moss_train.report.metrics_file import FILE_NAME
from moss_train.train.compose import compose_run
from moss_train.train.pipeline import run_pipeline


def break_off(clip: Path) -> None:
    """Overwrite the second half of a clip's packets: its first picture decodes, so the index finds nothing wrong."""
    data = bytearray(clip.read_bytes())
    with av.open(io.BytesIO(bytes(data))) as opened:
        places = [(packet.pos, packet.size) for packet in opened.demux(video=0) if packet.size]
    for start, size in places[len(places) // 2 :]:
        data[start : start + size] = bytes(size)
    clip.write_bytes(data)


@pytest.fixture(scope="module")
def damaged(packed, tmp_path_factory):
    """Packed data whose `realtime` holds a clip that cannot be opened and one that breaks off, beside ten good ones."""
    folder = tmp_path_factory.mktemp("damaged")
    render(RenderOptions(out=str(folder / "clips"), align=0, temporal=0, sft=0, realtime=12, heldout=0, workers=1))
    clips = folder / "clips" / "train" / "realtime"
    unreadable = clips / "realtime-train-000003.mp4"
    unreadable.write_bytes(unreadable.read_bytes()[:300])
    break_off(clips / "realtime-train-000005.mp4")
    shutil.copytree(packed, folder / "data")
    pack(clips, folder / "data" / "train" / "realtime", overwrite=True)
    return folder / "data" / "train"


def train(small, damaged, output, *more):
    overrides = [*small, f"data_root={damaged}", "~stages.align", "stages.realtime.init=scratch", *more]
    return run_pipeline(compose_run([*overrides, f"output_dir={output}"]))


def test_a_bad_clip_is_told_of_once(small, damaged, tmp_path, capsys):
    assert train(small, damaged, tmp_path, "stages.realtime.data.max_bad_fraction=0.2") == 0
    records = [json.loads(line) for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    told = [record for record in records if record.get("event") == "quarantine"]
    assert sorted(record["key"] for record in told) == ["realtime-train-000003", "realtime-train-000005"]
    assert all(record["reason"] for record in told)
    masked = sum(record["metrics"]["masked"] for record in records if "metrics" in record)
    assert masked >= 2  # six steps of four streams: two epochs of eleven samples, and their wrapped ends
    (data,) = (record for record in records if record.get("event") == "data")
    assert (data["streams"], data["masked"], data["quarantined"]) == (24 - masked, masked, 2)
    ledger = tmp_path / "realtime" / "quarantine.jsonl"
    assert len(ledger.read_text().splitlines()) == 2
    shown = capsys.readouterr().out
    assert "realtime: 12 stream" in shown and "11 an epoch" in shown and "1 do not compile, left out" in shown
    assert f"realtime: {masked:.0f} of 24 streams were masked; samples in quarantine: 2, see {ledger}" in shown


def test_a_budget_of_none_stops_the_run(small, damaged, tmp_path):
    with pytest.raises(DataError, match="2 of the 12 samples of source 'realtime' are bad"):
        train(small, damaged, tmp_path, "stages.realtime.data.max_bad_fraction=0")
