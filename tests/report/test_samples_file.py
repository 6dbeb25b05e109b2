"""The record of consumed samples is that of an uninterrupted run, whatever was killed."""

import json

import pytest

from moss_train.errors import DataError
from moss_train.report.samples_file import ConsumedStep, SamplesFile, read_samples

KEYS = {step: [("a", f"clip-{step}"), ("b", "täglich")] for step in range(1, 7)}


def write(path, after: int, last: int) -> None:
    with SamplesFile(path, after) as file:
        for step in range(after + 1, last + 1):
            file.write(step, KEYS[step])


def test_lines_come_back(tmp_path):
    path = tmp_path / "deep" / "samples.jsonl"
    write(path, 0, 3)
    assert read_samples(path) == [ConsumedStep(step, KEYS[step]) for step in (1, 2, 3)]
    assert json.loads(path.read_text().split("\n")[0]) == {"step": 1, "keys": [["a", "clip-1"], ["b", "täglich"]]}


@pytest.mark.parametrize("torso", [b"", b'{"step": 6, "ke', b'{"step": 6, "keys": []}', b"\x00\xff", b"{}\n"])
def test_going_on_cuts_back_to_the_checkpoint(tmp_path, torso):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    write(whole, 0, 6)
    write(cut, 0, 5)
    cut.write_bytes(cut.read_bytes() + torso)
    write(cut, 3, 4)
    write(cut, 4, 6)
    write(cut, 6, 6)
    assert cut.read_bytes() == whole.read_bytes()
    write(cut, 0, 6)  # trained anew
    assert cut.read_bytes() == whole.read_bytes()


def test_a_line_is_with_the_system_before_the_file_is_closed(tmp_path):
    file = SamplesFile(tmp_path / "samples.jsonl", 0)
    file.write(1, KEYS[1])
    assert [step.step for step in read_samples(tmp_path / "samples.jsonl")] == [1]
    file.sync()
    file.close()
    file.close()


def test_a_record_begun_later_begins_later(tmp_path):
    write(tmp_path / "samples.jsonl", 4, 6)
    assert [step.step for step in read_samples(tmp_path / "samples.jsonl")] == [5, 6]


@pytest.mark.parametrize("line", ["{", "[]", '{"step": 9, "keys": []}', '{"step": 4, "keys": [["a"]]}'])
def test_what_is_no_record_is_named(tmp_path, line):
    path = tmp_path / "samples.jsonl"
    write(path, 0, 3)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match="line 4"):
        read_samples(path)
    path.write_text(path.read_text()[: -len(line) - 1] + "x")  # the last line, cut short
    assert len(read_samples(path)) == 3
