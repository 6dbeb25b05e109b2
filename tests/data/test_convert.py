"""`data convert`: foreign annotations and loose media become a staging folder; what does not fit is listed."""

import json
from pathlib import Path

import pytest
from shared_data import shared_folder

from moss_train.data.convert import ConvertOptions, convert, convert_command
from moss_train.errors import ConfigError, DataError
from moss_train.streams.schema import parse_sample

REPOSITORY = Path(__file__).resolve().parents[2]


def options(tmp_path, annotations, **more) -> ConvertOptions:
    media = tmp_path / "media"
    media.mkdir(exist_ok=True)
    return ConvertOptions(
        **({"annotations": str(annotations), "media_root": str(media), "out": str(tmp_path / "out")} | more)
    )


def write_rows(tmp_path, rows) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def caption_row(name: str) -> dict:
    return {
        "messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "<|image|>A cat."}],
        "images": [f"/elsewhere/of/another/machine/{name}"],
    }


def ledger(out: Path) -> dict[str, str]:
    entries = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    return {entry["key"]: entry["reason"] for entry in entries}


def test_media_are_found_by_base_name_and_the_rest_is_listed(tmp_path, capsys):
    deep = tmp_path / "media" / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "cat.jpg").write_bytes(b"cat")
    rows = [caption_row("cat.jpg"), caption_row("dog.jpg"), {"messages": "none"}, 5]
    assert convert_command(options(tmp_path, write_rows(tmp_path, rows))) == 0
    printed = capsys.readouterr().out
    assert "1 samples written (1 caption)" in printed and "3 rows left out" in printed
    out = tmp_path / "out"
    assert (out / "rows-000000.jpg").read_bytes() == b"cat"
    assert parse_sample((out / "rows-000000.json").read_bytes(), "rows-000000").text == "<|image|>A cat."
    reasons = ledger(out)
    assert sorted(reasons) == ["rows-000001", "rows-000002", "rows-000003"]
    assert "dog.jpg" in reasons["rows-000001"]
    assert {path.name.partition(".")[0] for path in out.iterdir()} == {"rows-000000", "quarantine", "convert"}


def test_one_name_for_two_different_files_is_no_answer(tmp_path):
    for folder, data in [("a", b"cat"), ("b", b"dog")]:
        (tmp_path / "media" / folder).mkdir(parents=True)
        (tmp_path / "media" / folder / "cat.jpg").write_bytes(data)
        (tmp_path / "media" / folder / "same.jpg").write_bytes(b"same")
    summary = convert(options(tmp_path, write_rows(tmp_path, [caption_row("cat.jpg"), caption_row("same.jpg")])))
    assert [error.key for error in summary.quarantined] == ["rows-000000"]
    assert "different files" in summary.quarantined[0].reason and summary.written == {"caption": 1}


def test_nothing_written_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="gave no sample"):
        convert(options(tmp_path, write_rows(tmp_path, [caption_row("dog.jpg")])))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))


def test_conversations_and_json_lines(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "v.mp4").write_bytes(b"v")
    row = {
        "video": "x/v.mp4",
        "conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A."}],
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    summary = convert(options(tmp_path, path, source="conversations", copy=False))
    assert summary.written == {"conversation": 2} and not summary.quarantined


def test_json_lines_are_read_up_to_a_broken_one(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "cat.jpg").write_bytes(b"cat")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(caption_row("cat.jpg")) + "\n{broken\n" + json.dumps(caption_row("cat.jpg")) + "\n")
    summary = convert(options(tmp_path, path))
    assert summary.written == {"caption": 1}
    assert [error.key for error in summary.quarantined] == ["rows"]
    assert "rows.jsonl is not JSON after 1 rows" in summary.quarantined[0].reason


def test_a_broken_file_does_not_stop_the_others(tmp_path):
    folder = tmp_path / "annotations"
    folder.mkdir()
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "cat.jpg").write_bytes(b"cat")
    (folder / "a.json").write_text("{not json")
    (folder / "b.json").write_text(json.dumps([caption_row("cat.jpg")]))
    (folder / "c.json").write_bytes(b"\xff\xfe\x00")
    (folder / "d.json").write_text("[" * 100_000)
    summary = convert(options(tmp_path, folder))
    assert summary.written == {"caption": 1}
    assert [error.key for error in summary.quarantined] == ["a", "c", "d"]


def test_folders_that_are_not_ours_are_kept(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "cat.jpg").write_bytes(b"cat")
    rows = write_rows(tmp_path, [caption_row("cat.jpg")])
    convert(options(tmp_path, rows))
    with pytest.raises(DataError, match="overwrite=true"):
        convert(options(tmp_path, rows))
    convert(options(tmp_path, rows, overwrite=True))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="did not write"):
        convert(options(tmp_path, rows, out=str(tmp_path / "mine"), overwrite=True))


@pytest.mark.parametrize("field", ["annotations", "media_root"])
def test_absent_folders_are_named(tmp_path, field):
    rows = write_rows(tmp_path, [caption_row("cat.jpg")])
    given = options(tmp_path, rows)
    setattr(given, field, str(tmp_path / "absent"))
    with pytest.raises(DataError, match=field):
        convert(given)


def test_unknown_source_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="use one of examples, moss, conversations, llava_video, activitynet"):
        options(tmp_path, tmp_path, source="mosss").validate()


def test_hand_written_examples_are_valid():
    examples = REPOSITORY / "data_specs" / "examples"
    for name in ("caption", "conversation", "stream"):
        sample = parse_sample((examples / f"{name}.json").read_bytes(), name)
        assert sample.schema_name == f"moss_train/{name}@1"


def test_reference_annotations_of_the_real_data(tmp_path):
    real = shared_folder() / "real_data"
    summary = convert(options(tmp_path, real / "annotations", media_root=str(real)))
    assert summary.written == {"caption": 3, "conversation": 3}
    reasons = ledger(tmp_path / "out")
    assert sorted(reasons) == [f"mllm_realtime_sft_demo-{n:06d}" for n in range(3)]
    assert all("is not below media_root" in reason for reason in reasons.values())


def test_our_annotations_of_the_real_data_fit_their_files(tmp_path):
    import av

    real = shared_folder() / "real_data"
    annotations = REPOSITORY / "data_specs" / "examples" / "real"
    summary = convert(options(tmp_path, annotations, source="examples", media_root=str(real)))
    assert not summary.quarantined and summary.written == {"caption": 5, "conversation": 3, "stream": 6}
    seen = set()
    for path in sorted((tmp_path / "out").glob("*.json")):
        sample = parse_sample(path.read_bytes(), path.stem)
        seen |= set(sample.source_metadata["files"].values())
        for medium in sample.media:
            if medium.kind != "video":
                continue
            with av.open(tmp_path / "out" / f"{path.stem}.{medium.member}") as container:
                stream = container.streams.video[0]
                assert medium.duration_s == pytest.approx(float(stream.duration * stream.time_base), abs=0.002)
            if path.stem.startswith("stream"):
                assert sample.sampling.end_s <= medium.duration_s
    assert seen == {"1.mp4", "2.avi", "3.mp4", "v-5sRwJNR8U.mp4", "1.jpg", "2.jpg", "3.jpg"}
    kinds = {event.kind for path in (tmp_path / "out").glob("stream*.json") for event in
             parse_sample(path.read_bytes(), path.stem).events}  # fmt: skip
    assert kinds == {"ask", "interrupt", "speak", "revise", "silence"}
