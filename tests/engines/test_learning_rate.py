import pytest

from moss_train.engines.config import OptimConfig
from moss_train.engines.learning_rate import LearningRate
from moss_train.errors import ConfigError


def factors(total_steps: int, **options) -> list[float]:
    schedule = LearningRate(OptimConfig(**{"lr": 2.0, **options}), total_steps)
    return [schedule.factor(step) for step in range(total_steps)]


def test_linear_warmup_then_linear_decay():
    expected = [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert factors(10, warmup_fraction=0.2) == pytest.approx(expected)


def test_the_fraction_is_rounded_up_and_steps_win_over_it():
    assert LearningRate(OptimConfig(warmup_fraction=0.1), 11).warmup_steps == 2
    assert LearningRate(OptimConfig(warmup_fraction=0.1, warmup_steps=5), 11).warmup_steps == 5
    assert LearningRate(OptimConfig(warmup_steps=50), 11).warmup_steps == 11


def test_decay_ends_at_the_floor_which_is_proportional_for_every_group():
    rates = {"head": 8.0, "projector": 0.0}
    schedule = LearningRate(OptimConfig(lr=2.0, min_lr=0.5, warmup_steps=0, group_lr=rates), 4)
    assert [schedule.rate("self_layers", step) for step in range(5)] == pytest.approx([2.0, 1.625, 1.25, 0.875, 0.5])
    assert [schedule.rate("head", step) for step in (0, 4, 9)] == pytest.approx([8.0, 2.0, 2.0])
    assert schedule.rate("projector", 2) == 0.0


def test_cosine():
    assert factors(4, schedule="cosine", warmup_steps=0) == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_constant():
    assert factors(4, schedule="constant", warmup_steps=2) == [0.5, 1.0, 1.0, 1.0]


def test_logarithmic_warmup_is_deepspeeds_curve_without_its_first_step():
    # DeepSpeed 0.19.8, WarmupLR(warmup_num_steps=5): log(i + 1) / log(5) at i = 0 … 4.
    expected = [0.430677, 0.682606, 0.861353, 1.0]
    assert factors(4, warmup="logarithmic", warmup_steps=4) == pytest.approx(expected, abs=1e-6)


def test_one_step_runs_at_the_peak():
    assert factors(1) == [1.0]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"lr": -1.0}, "optim.lr"),
        ({"lr": float("nan")}, "optim.lr"),
        ({"group_lr": {"head": -1e-3}}, "optim.group_lr.head"),
        ({"lr": 1e-5, "min_lr": 1e-4}, "optim.min_lr"),
        ({"warmup_fraction": 1.5}, "optim.warmup_fraction"),
        ({"warmup_steps": -1}, "optim.warmup_steps"),
        ({"warmup": "log"}, "optim.warmup"),
        ({"schedule": "linaer"}, "optim.schedule"),
        ({"betas": [0.9]}, "optim.betas"),
        ({"betas": [0.9, 1.0]}, "optim.betas"),
        ({"eps": 0.0}, "optim.eps"),
        ({"clip": -1.0}, "optim.clip"),
    ],
)
def test_illegal_values_are_refused_by_name(options, field):
    with pytest.raises(ConfigError, match=field.replace(".", r"\.") + "[=:]"):
        OptimConfig(**options).validate()
