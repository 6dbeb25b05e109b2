"""`data check` names every fault of a source, and finds none in a sound one."""

from pathlib import Path

from data_samples import (
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


def test_a_sound_source_has_no_problems(tmp_path: Path, capsys):
    folder = packed_streams(tmp_path, 3)
    for decode in ("none", "ends", "all"):
        assert check_command(CheckOptions(str(folder), decode=decode)) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert (
        lines.count(["samples", "3"]) == 3 == lines.count(["problems", "0"]) and ["decoded", "by", "pyav", "3"] in lines
    )
    (folder / INDEX_NAME).unlink()
    problems = check_source(CheckOptions(str(folder))).problems
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
    assert check_command(CheckOptions(str(out), show=3)) == 1
    assert "more (show=… lists more)" in capsys.readouterr().out
    problems = {problem.key: problem for problem in check_source(CheckOptions(str(out))).problems}
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
    result = check_source(CheckOptions(str(folder)))
    assert {problem.shard for problem in result.problems} == {folder.name, "shard-000001.tar"}
    assert 4 <= result.totals["samples"] <= 5
    assert any("cut short" in problem.what or "no readable tar" in problem.what for problem in result.problems)


def test_the_command_line_reaches_it(tmp_path: Path, capsys):
    from moss_train.cli import main

    stage_streams(tmp_path / "staging", 2)
    assert main(["data", "pack", f"source={tmp_path / 'staging'}", f"out={tmp_path / 'out'}"]) == 0
    assert main(["data", "index", f"path={tmp_path / 'out'}"]) == 0
    assert main(["data", "check", f"path={tmp_path / 'out'}", "compiler.fps=2"]) == 0
    assert main(["data", "check", f"path={tmp_path / 'nowhere'}"]) == 2
    assert main(["data", "check", f"path={tmp_path / 'out'}", "decode=some"]) == 2
    assert main(["data", "pack", f"source={tmp_path / 'staging'}", f"out={tmp_path / 'out'}"]) == 2
    assert main(["data", "pack", f"source={tmp_path / 'staging'}"]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 4 and all(line.startswith("error: ") for line in errors)
    assert load_index(tmp_path / "out").keys([0, 1]) == ["s000", "s001"]
