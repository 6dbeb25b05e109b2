"""The fit finds the coefficients it should; the verb times a real model and prints what can be pasted."""

import json

import numpy as np
import pytest

from moss_train.bench import cost
from moss_train.cli_options import parse_options
from moss_train.data.config import CostConfig, DataConfig, SourceConfig
from moss_train.errors import ConfigError

ROWS = cost.rows_of([256, 512, 1024, 2048], [0, 2, 8])


def seconds(rows, step=0.02, token=1e-4, token_squared=3e-8, token_frame=2e-6, frame=5e-3):
    return [step + token * t + token_squared * t * t + token_frame * t * f + frame * f for t, f in rows]


def test_exact_times_give_the_coefficients():
    fit = cost.fit_costs(ROWS, seconds(ROWS))
    assert fit.overrides == pytest.approx(
        {"token": 1, "token_squared": 3e-4, "token_frame": 0.02, "frame": 50}, rel=1e-3
    )
    assert max(fit.errors) < 1e-6


def test_noise_never_gives_a_negative_coefficient():
    rng = np.random.default_rng(0)
    for _ in range(20):
        noisy = np.array(seconds(ROWS, token_squared=0, token_frame=0)) * rng.normal(1, 0.1, len(ROWS))
        fit = cost.fit_costs(ROWS, noisy)
        assert all(value >= 0 for value in fit.seconds.values())
        assert np.median(fit.errors) < 0.15


def test_a_bad_fit_is_told():
    options = cost.CostOptions()
    rng = np.random.default_rng(1)
    fit = cost.fit_costs(ROWS, rng.uniform(0.01, 1.0, len(ROWS)))
    result = cost.summary(options, fit)
    assert not result["ok"] and result["failures"][0].startswith("fit_error")


def test_rows_fit_their_frames():
    assert cost.rows_of([10, 3], [0, 4, 3]) == [(3, 0), (3, 3), (10, 0), (9, 3), (8, 4)]


def test_the_verb_prints_overrides_that_are_legal(capsys):
    options = parse_options(
        cost.CostOptions, ["model=tiny", "tokens=[32,64,128]", "frames=[0,1,2]", "repeats=1", "max_error=10"]
    )
    assert cost.cost_command(options) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["name"] == "bench cost" and result["figures"]["fit_error"] >= 0
    names = {
        line.partition("=")[0].removeprefix("stages.*.data.cost."): float(line.partition("=")[2]) for line in lines
    }
    DataConfig(sources={"a": SourceConfig(path="a")}, cost=CostConfig(**names)).validate()
    assert set(names) == {"token", "token_squared", "token_frame", "frame"}


@pytest.mark.parametrize("wrong", ["repeats=0", "tokens=[1,2]", "frames=[0,0,1]", "tokens=[0,1,2]", "tokens=[1,2,3]"])
def test_options_that_cannot_be(wrong):
    with pytest.raises(ConfigError):
        parse_options(cost.CostOptions, [wrong, *(["frames=[4,5,6]"] if wrong == "tokens=[1,2,3]" else [])])
