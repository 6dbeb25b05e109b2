"""`data check` names every fault of a source, and finds none in a sound one."""

import json
import os
from pathlib import Path

import pytest
from data_samples import (
    broken_from,
    caption_json,
    numbered_clip,
    packed_streams,
    split_pack,
    stage,
    stage_streams,
    still,
    stream_json,
)

from moss_train.data.shards.check import CheckOptions, check_command, check_source
from moss_train.data.shards.index import INDEX_NAME, load_index
from moss_train.errors import ConfigError, DataError
from moss_train.streams.config import CompilerConfig


def test_a_sound_source_has_no_problems(tmp_path: Path, capsys):
    folder = packed_streams(tmp_path, 3)
    for decode in ("none", "ends", "all"):
        assert check_command(CheckOptions(str(folder), decode=decode, workers=1)) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert (
        lines.count(["samples", "3"]) == 3 == lines.count(["problems", "0"]) and ["decoded", "by", "pyav", "3"] in lines
    )
    (folder / INDEX_NAME).unlink()
    problems = check_source(CheckOptions(str(folder), workers=1)).problems
    assert len(problems) == 1 and "index.arrow is missing" in problems[0].what


def test_every_fault_is_named_with_its_key_and_shard(tmp_path: Path, capsys):
    staging, out = tmp_path / "staging", tmp_path / "out"
    stage_streams(staging, 2)
    stage(staging, "json", b"{")
    stage(staging, "unknown", caption_json("unknown") | {"colour": 1}, png=still(1))
    stage(staging, "absent", stream_json("absent"))
    stage(staging, "noise", stream_json("noise"), mp4=numbered_clip(6, 4)[:64] + bytes(3000))
    stage(staging, "unlisted", caption_json("unlisted", None), png=still(1))
    stage(staging, "beyond", stream_json("beyond", frames=20), mp4=numbered_clip(12, 4))
    wrong = stream_json("wrong")
    wrong["media"][0]["duration_s"] = 9.0
    stage(staging, "wrong", wrong, mp4=numbered_clip(12, 4))
    still_as_video = caption_json("kind", "mp4")
    stage(staging, "kind", still_as_video, mp4=still(1))
    split_pack(staging, out, 4)
    assert check_command(CheckOptions(str(out), show=3, workers=1)) == 1
    assert "more (show=… lists more)" in capsys.readouterr().out
    problems = {problem.key: problem for problem in check_source(CheckOptions(str(out), workers=1)).problems}
    for key, what in {
        "json": "not JSON",
        "unknown": "colour",
        "absent": "absent.mp4",
        "noise": "cannot be read",
        "unlisted": "png is packed but not listed",
        "beyond": "beyond",
        "wrong": "listed with 9.0 s and has 3.0",
        "kind": "listed as video but is png",
    }.items():
        assert what in problems[key].what, problems[key]
        assert problems[key].shard.startswith("shard-0000")
    assert set(problems) == {"json", "unknown", "absent", "noise", "unlisted", "beyond", "wrong", "kind"}


def test_a_truncated_shard_is_a_problem_and_the_others_are_still_checked(tmp_path: Path):
    folder = packed_streams(tmp_path, 6, shard_samples=2)
    shard = folder / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    result = check_source(CheckOptions(str(folder), workers=1))
    assert {problem.shard for problem in result.problems} == {folder.name, "shard-000001.tar"}
    assert 4 <= result.totals["samples"] <= 5
    assert any("cut short" in problem.what or "no readable tar" in problem.what for problem in result.problems)


def test_changed_bytes_are_named_whatever_is_decoded(tmp_path: Path):
    folder = packed_streams(tmp_path, 3)
    shard, index = folder / "shard-000000.tar", load_index(folder)
    before, data = shard.stat(), bytearray(shard.read_bytes())
    for number, member in ((0, "mp4"), (2, "json")):
        place = index.sample(number).members[member]
        data[place.offset + place.size - 1] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(before.st_mtime_ns, before.st_mtime_ns))
    problems = check_source(CheckOptions(str(folder), decode="none", workers=1)).problems
    assert {(problem.key, problem.what) for problem in problems} == {
        ("s000", "the bytes of mp4 differ from those that were indexed"),
        ("s002", "the bytes of json differ from those that were indexed"),
        ("s002", "its bytes differ from those that were indexed; index the source again"),
    }


def test_the_rows_of_the_index_are_held_against_its_digests(tmp_path: Path):
    folder = packed_streams(tmp_path, 4, shard_samples=2)
    path, index = folder / INDEX_NAME, load_index(folder)
    whole = path.read_bytes()
    digest = index.sample(3).members["mp4"].digest
    path.write_bytes(whole.replace(digest, bytes(16)))
    problems = check_source(CheckOptions(str(folder), decode="none", workers=1)).problems
    assert {(problem.shard, problem.key, problem.what) for problem in problems} == {
        ("shard-000001.tar", "", "its rows in the index do not fit their digest"),
        ("shard-000001.tar", "s003", "the bytes of mp4 differ from those that were indexed"),
    }
    assert whole.count(b"h264") == 4
    path.write_bytes(whole.replace(b"h264", b"h265", 1))
    problems = check_source(CheckOptions(str(folder), decode="none", workers=1)).problems
    assert [(problem.key, "facts of its media" in problem.what) for problem in problems] == [("", True)]


def test_what_is_quarantined_is_tested_again(tmp_path: Path, capsys):
    staging, out, ledger = tmp_path / "staging", tmp_path / "out", tmp_path / "quarantine.jsonl"
    stage_streams(staging, 3)
    stage(staging, "broken", stream_json("broken"), mp4=broken_from(numbered_clip(12, 4), 1))
    stage(staging, "json", b"{")
    split_pack(staging, out, 2)
    listed = {"s001": "decoding took longer than 60 s", "broken": "video does not decode", "elsewhere": "of another"}
    prints = {key: load_index(out).fingerprint if key != "elsewhere" else "another" for key in listed}
    entries = [{"key": k, "source": "x", "fingerprint": prints[k], "reason": r} for k, r in listed.items()]
    ledger.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    # Every picture is looked at unless asked otherwise: this clip breaks off after its first ones.
    assert check_command(CheckOptions(str(out), str(ledger), workers=1)) == 1
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert ["samples", "2"] in lines and ["listed", "of", "other", "data", "1"] in lines and ["problems", "1"] in lines
    assert "  fine now: s001 (was: decoding took longer than 60 s)" in printed.splitlines()
    assert "broken" in printed and "elsewhere" not in printed and "not JSON" not in printed
    ledger.write_text("not a ledger\n")
    with pytest.raises(DataError, match="quarantine.jsonl cannot be read"):
        check_source(CheckOptions(str(out), str(ledger), workers=1))


def test_long_streams_are_no_problem_where_they_are_split(tmp_path: Path):
    stage(tmp_path / "in", "long", stream_json("long", 12, text="red " * 20), mp4=numbered_clip(12))
    split_pack(tmp_path / "in", tmp_path / "out", 2)
    settings = {"path": str(tmp_path / "out"), "workers": 1, "compiler": CompilerConfig(max_frames=8)}
    (problem,) = check_source(CheckOptions(**settings)).problems
    assert problem.key == "long" and "12 frames" in problem.what and "max_frames=8" in problem.what
    split = check_source(CheckOptions(**settings, decode="all", pack_text_tokens=120, pack_frames=8))
    assert split.problems == [] and split.totals["frames"] == 12 and split.totals["text tokens"] > 60
    with pytest.raises(ConfigError, match="one budget"):
        CheckOptions(str(tmp_path), pack_frames=8).validate()


def test_the_command_line_reaches_it(tmp_path: Path, capsys):
    from moss_train.cli import main

    stage_streams(tmp_path / "staging", 2)
    assert main(["data", "pack", f"source={tmp_path / 'staging'}", f"out={tmp_path / 'out'}"]) == 0
    assert main(["data", "index", f"path={tmp_path / 'out'}", "workers=1"]) == 0
    assert main(["data", "check", f"path={tmp_path / 'out'}", "compiler.fps=2", "workers=1"]) == 0
    assert main(["data", "check", f"path={tmp_path / 'nowhere'}"]) == 2
    assert main(["data", "check", f"path={tmp_path / 'out'}", "decode=some"]) == 2
    assert main(["data", "pack", f"source={tmp_path / 'staging'}", f"out={tmp_path / 'out'}"]) == 2
    assert main(["data", "pack", f"source={tmp_path / 'staging'}"]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 4 and all(line.startswith("error: ") for line in errors)
    assert load_index(tmp_path / "out").keys([0, 1]) == ["s000", "s001"]
