"""`bench checkpoint`: every figure, of a small model; what they are is for a run by hand."""

import json

import pytest

from moss_train.bench import checkpoint
from moss_train.bench.checkpoint import CheckpointOptions, Round, checkpoint_command, checkpoint_figures
from moss_train.errors import ConfigError

FIGURES = {"pause_ratio", "save_vs_copy", "load_vs_copy", "extra_memory_mb"}


def test_a_quick_run_tells_every_figure(tmp_path, capsys):
    checkpoint_command(CheckpointOptions(rounds=1, model="tiny", folder=str(tmp_path)))
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["name"] == "bench checkpoint" and set(result["figures"]) > FIGURES
    assert all(result["figures"][name] > 0 for name in FIGURES - {"extra_memory_mb"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "failing"),
    [({}, None), ({"pause": 0.2}, "pause_ratio"), ({"save": 2.1}, "save_vs_copy"), ({"load": 2.1}, "load_vs_copy")],
)
def test_the_verdict(monkeypatch, changed, failing):
    seconds = dict.fromkeys(Round.__dataclass_fields__, 1.0) | {"pause": 0.1} | changed
    monkeypatch.setattr(checkpoint, "measure_round", lambda *arguments: Round(**seconds))
    result = checkpoint_figures(CheckpointOptions(rounds=1, model="tiny"))
    assert result["ok"] == (failing is None)
    assert [failure.split()[0] for failure in result["failures"]] == ([failing] if failing else [])


def test_no_rounds_are_refused():
    with pytest.raises(ConfigError, match="rounds=0"):
        CheckpointOptions(rounds=0).validate()
