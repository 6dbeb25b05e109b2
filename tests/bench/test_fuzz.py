"""Two hundred hostile inputs come through; and what is planted on their way is found, input by input."""

import json
import os
import signal

import pytest

from moss_train.bench import fuzz
from moss_train.bench.fuzzing import walk
from moss_train.bench.fuzzing.cases import draw_case
from moss_train.cli_options import parse_options
from moss_train.errors import ConfigError, DataError


def run(capsys, tmp_path, *arguments: str) -> tuple[int, dict]:
    options = parse_options(fuzz.FuzzOptions, [f"out={tmp_path / 'failures'}", *arguments])
    code = fuzz.fuzz_command(options)
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_two_hundred_inputs(capsys, tmp_path):
    code, result = run(capsys, tmp_path, "inputs=200", "seed=7")
    figures = result["figures"]
    assert (code, result["failures"]) == (0, [])
    assert (figures["inputs"], figures["crashes"], figures["hangs"], figures["unrecorded"]) == (200, 0, 0, 0)
    assert 100 < figures["peak_memory_mb"] < 4000
    assert all(figures[fate] > 5 for fate in ("refused", "quarantined", "delivered"))
    assert not (tmp_path / "failures").exists()


def test_inputs_are_a_function_of_seed_and_number():
    assert [draw_case(3, number) for number in range(30)] == [draw_case(3, number) for number in range(30)]
    assert draw_case(3, 0) != draw_case(4, 0)
    assert {draw_case(3, number).kind for number in range(60)} == {"medium", "json", "tar"}


def _on_delivery(monkeypatch, number: int, act) -> None:
    """`act(report)` at the end of the loader's epoch of any group that holds input `number`."""
    whole = walk._one_epoch

    def planted(sources, report, bounds):
        whole(sources, report, bounds)
        key = f"c{number:06d}"
        known = [*report.delivered.get(walk.BATCH, []), *report.bad.get(walk.BATCH, {})]
        if key in known:
            act(report, key)

    monkeypatch.setattr(walk, "_one_epoch", planted)


def _forget(report, key):
    report.bad.get(walk.BATCH, {}).pop(key, None)
    report.delivered[walk.BATCH] = [other for other in report.delivered[walk.BATCH] if other != key]


def _raise(error: Exception):
    def act(report, key):
        raise error

    return act


@pytest.mark.parametrize(
    ("figure", "act"),
    [
        ("crashes", _raise(RuntimeError("planted"))),
        ("crashes", _raise(DataError("one sample stops all"))),
        ("crashes", lambda report, key: os.kill(os.getpid(), signal.SIGKILL)),
        ("hangs", lambda report, key: signal.pause()),
        ("unrecorded", _forget),
    ],
    ids=["traceback", "stops the run", "dies", "hangs", "forgets"],
)
def test_what_is_planted_is_found(monkeypatch, capsys, tmp_path, figure, act):
    number = next(n for n in range(30) if draw_case(5, n).kind == "medium")
    _on_delivery(monkeypatch, number, act)
    code, result = run(capsys, tmp_path, f"inputs={number + 1}", "seed=5", "batch=1", "deadline_s=12")
    found = {name: result["figures"][name] for name in ("crashes", "hangs", "unrecorded")}
    assert code == 1 and found == {"crashes": 0, "hangs": 0, "unrecorded": 0, figure: 1}
    assert f"case=5:{number} " in result["failures"][0]
    assert "case=5" in (tmp_path / "failures" / f"5-{number}" / "failure.txt").read_text()


def test_a_group_that_breaks_is_tried_apart(monkeypatch, capsys, tmp_path):
    numbers = [n for n in range(6) if draw_case(6, n).kind != "tar"]
    _on_delivery(monkeypatch, numbers[-1], _raise(RuntimeError("planted")))
    code, result = run(capsys, tmp_path, "inputs=6", "seed=6")
    assert code == 1 and len(result["failures"]) == 1 and f"case=6:{numbers[-1]} " in result["failures"][0]


def test_one_input_alone(capsys, tmp_path):
    _, result = run(capsys, tmp_path, "case=7:3")
    assert result["figures"]["inputs"] == 1


def test_too_much_memory_fails(capsys, tmp_path):
    code, result = run(capsys, tmp_path, "inputs=1", "memory_mb=50")
    assert code == 1 and "peak_memory_mb" in result["failures"][0]


@pytest.mark.parametrize("wrong", ["inputs=0", "case=7", "case=a:b", "real=/nowhere", "deadline_s=0"])
def test_options_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
        parse_options(fuzz.FuzzOptions, [wrong])
