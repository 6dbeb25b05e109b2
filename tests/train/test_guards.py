"""Steps that are skipped are counted and budgeted, losses that jump are noticed, and a run that goes on decides as one
that never stopped."""

import json
import math
import os
import signal

import pytest
import torch
from run_jobs import train as train_on_rank

from moss_train.bench.equivalence.ranks import Ranks
from moss_train.checkpoint.store import latest, load_checkpoint
from moss_train.engines.megatron import MegatronEngine
from moss_train.engines.protocol import StepOutput
from moss_train.errors import ConfigError, TrainingError
from moss_train.report.config import TrackingConfig
from moss_train.report.metrics_file import FILE_NAME
from moss_train.report.tracker import Tracker
from moss_train.train.compose import compose_run
from moss_train.train.config import GuardConfig
from moss_train.train.guards import Guards
from moss_train.train.pipeline import run_pipeline

SAMPLES = [("web", f"clip-{number}") for number in range(6)]


class Events:
    """A sink that remembers."""

    def __init__(self):
        self.events, self.rows = [], []

    def start(self, stage, total, step): ...

    def finish(self, completed): ...

    def write(self, row):
        self.rows.append(row)

    def event(self, stage, step, name, fields):
        self.events.append((step, name, fields))


class Watched:
    """Guards, and what they were told and said."""

    def __init__(self, tmp_path, **config):
        self.sink = Events()
        tracker = Tracker(TrackingConfig(wandb="disabled"), tmp_path, "run", sinks=[self.sink])
        tracker.start_stage("sft", 100)
        self.tracker, self.step = tracker, 0
        self.guards = Guards(GuardConfig(**config), "sft", lambda: tmp_path / "step_00000007")

    def take(self, *losses: float, grad_norm: float = 1.0, overflowed: bool = False) -> None:
        """Steps as an engine takes them."""
        for loss in losses:
            self.step += 1
            limit = self.guards.loss_limit()
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            skipped = overflowed or not finite or (limit is not None and loss > limit)
            output = StepOutput(
                loss,
                per_kind={},
                per_kind_share={},
                per_kind_count={},
                silence_share=None,
                decisions={},
                calibration={},
                decision_head={},
                margin={},
                per_source={},
                per_source_count={},
                grad_norm=grad_norm,
                lr={},
                skipped=skipped,
                overflowed=overflowed,
            )
            self.guards.heed(self.step, output, SAMPLES, self.tracker)
            self.tracker.commit(self.step)

    @property
    def events(self):
        return [(step, name) for step, name, _ in self.sink.events]


#: median 1.35, median deviation 0.2
WINDOW = (1.0, 1.4, 1.2, 1.6, 1.1, 1.5, 1.3, 1.7)
LIMIT = 1.35 + 6 * 1.4826 * 0.2


def test_a_spike_is_what_lies_above_median_and_spread(tmp_path):
    watched = Watched(tmp_path, spike_window=8, spike_floor=0.0)
    assert watched.guards.limit() is None
    watched.take(*WINDOW[:3])
    assert watched.guards.limit() is None  # less than half a window
    watched.take(50.0)  # the fourth: too early to tell
    assert watched.events == []
    watched.take(*WINDOW)
    assert watched.guards.limit().loss == pytest.approx(LIMIT)
    watched.take(LIMIT - 0.01)
    assert watched.events == []
    watched.take(9.0)
    (step, name, fields) = watched.sink.events[-1]
    assert (step, name) == (14, "spike") and fields["update"] == "taken"
    assert fields["samples"] == "web/clip-0, web/clip-1, web/clip-2, web/clip-3 and 2 more"
    assert watched.sink.rows[-1].metrics["spikes"] == 1 and watched.sink.rows[-2].metrics["spikes"] == 0


def test_one_spike_does_not_hide_the_next(tmp_path):
    """A mean and a standard deviation would be moved so far by the first that the second passed."""
    watched = Watched(tmp_path, spike_window=8, spike_floor=0.0)
    watched.take(*WINDOW, 100.0, 50.0)
    assert watched.events == [(9, "spike"), (10, "spike")]


def test_losses_that_hardly_scatter_have_a_floor(tmp_path):
    watched = Watched(tmp_path, spike_window=8, spike_factor=6.0, spike_floor=0.05)
    watched.take(*[2.0] * 8)
    assert watched.guards.limit().loss == pytest.approx(2.6)


def test_a_level_that_stays_is_warned_of_until_it_is_usual(tmp_path):
    watched = Watched(tmp_path, spike_window=8)
    watched.take(*WINDOW, *[9.0] * 12)
    assert 1 < len(watched.events) <= 5


def test_skip_takes_no_update_and_keeps_the_loss_out_of_the_window(tmp_path):
    watched = Watched(tmp_path, spike="skip", spike_window=8, max_skipped=2)
    assert watched.guards.loss_limit() is None
    watched.take(*WINDOW)
    limit = watched.guards.loss_limit()
    watched.take(9.0)
    assert watched.sink.events[-1][2]["update"] == "skipped"
    assert watched.guards.loss_limit() == limit
    watched.take(1.0, 9.0, 1.0)
    with pytest.raises(TrainingError, match="a spike, above 3.474") as error:
        watched.take(9.0)
    assert "the 3rd step of the stage; " in str(error.value)
    assert "stages.sft.guards.max_skipped=2" in str(error.value)


@pytest.mark.parametrize("spike", ["off", "warn", "stop"])
def test_no_other_policy_limits_the_loss(tmp_path, spike):
    watched = Watched(tmp_path, spike=spike, spike_window=8)
    watched.take(*WINDOW)
    assert watched.guards.loss_limit() is None


def test_off_looks_for_none(tmp_path):
    watched = Watched(tmp_path, spike="off", spike_window=8)
    watched.take(*WINDOW, 1000.0)
    assert watched.events == []


def test_stop_says_where_to_go_on_and_what_was_trained_on(tmp_path):
    watched = Watched(tmp_path, spike="stop", spike_window=8)
    with pytest.raises(TrainingError) as error:
        watched.take(*WINDOW, 9.0)
    text = str(error.value)
    for part in ("stages.sft", "step 9, 9,", "median 1.35 of the last 8 steps", "step_00000007", "spike=skip"):
        assert part in text
    assert text.split("\n  ")[1:] == [f"web/clip-{number}" for number in range(6)]
    assert watched.events == [(9, "spike")] and watched.sink.rows[-1].step == 9  # logged before


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, math.nan), (math.inf, math.nan), (1.0, math.inf)])
def test_a_row_of_skipped_steps_ends_the_run(tmp_path, loss, grad_norm):
    watched = Watched(tmp_path, max_skipped_in_a_row=2, max_skipped=None)
    for _ in range(5):
        watched.take(loss, loss, grad_norm=grad_norm)
        watched.take(1.0)  # ends the row
    watched.take(loss, loss, grad_norm=grad_norm)
    with pytest.raises(TrainingError) as error:
        watched.take(loss, grad_norm=grad_norm)
    text = str(error.value)
    for part in ("stages.sft: step 18", f"loss {loss:.4g}", f"norm {grad_norm:.4g}", "the 3rd step in a row"):
        assert part in text
    assert "guards.max_skipped_in_a_row=2" in text and "web/clip-5" in text and "optim.lr" in text
    assert [name for _, name in watched.events] == ["skipped"] * 13
    assert watched.sink.rows[-1].step == 18


def test_zero_allows_none_and_null_any_number(tmp_path):
    with pytest.raises(TrainingError, match="the 1st step in a row"):
        Watched(tmp_path, max_skipped_in_a_row=0).take(math.nan)
    with pytest.raises(TrainingError, match="the 1st step of the stage"):
        Watched(tmp_path, max_skipped=0, max_skipped_in_a_row=None).take(math.nan)
    Watched(tmp_path, max_skipped=None, max_skipped_in_a_row=None).take(*[math.nan] * 500)


def test_overflows_that_the_loss_scale_answers_neither_count_nor_end_a_row(tmp_path):
    watched = Watched(tmp_path, max_skipped_in_a_row=1)
    watched.take(*[1.0] * 30, grad_norm=math.inf, overflowed=True)
    watched.take(math.nan)
    watched.take(1.0, grad_norm=math.inf, overflowed=True)
    assert watched.events == [(31, "skipped")] and watched.guards.skipped == 1
    with pytest.raises(TrainingError, match="the 2nd step in a row"):
        watched.take(math.nan)


def test_the_state_is_json_and_decides_the_same(tmp_path):
    config = {"spike": "skip", "spike_window": 8, "max_skipped": 3}
    whole, cut = Watched(tmp_path, **config), Watched(tmp_path, **config)
    losses = (*WINDOW, 1.3, 9.0, math.nan, 0.7, 1 / 3)
    whole.take(*losses)
    cut.take(*losses[:10])
    again = Watched(tmp_path, **config)
    again.guards.load_state_dict(json.loads(json.dumps(cut.guards.state_dict(), allow_nan=False)))
    again.step = cut.step
    again.take(*losses[10:])
    assert again.guards.state_dict() == whole.guards.state_dict()
    assert again.guards.limit() == whole.guards.limit()
    for watched in (again, whole):
        watched.take(math.nan)
        with pytest.raises(TrainingError, match="the 4th step of the stage"):
            watched.take(math.nan)
    old = Watched(tmp_path)
    old.guards.load_state_dict({})  # of a checkpoint from before there were guards
    old.take(1.0)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("spike=ignore", "stages.sft.guards.spike='ignore': legal values are off, warn, skip, stop"),
        ("spike_window=2", "stages.sft.guards.spike_window=2: must be at least 8"),
        ("spike_factor=0", "stages.sft.guards.spike_factor=0.0: must be above 0"),
        ("spike_factor=nan", "must be above 0"),
        ("spike_floor=-1", "stages.sft.guards.spike_floor=-1.0"),
        ("max_skipped=-1", "stages.sft.guards.max_skipped=-1: must be at least 0, or null"),
    ],
)
def test_what_cannot_be_is_refused(override, expected):
    with pytest.raises(ConfigError) as error:
        compose_run(["recipe=sft", f"stages.sft.guards.{override}"])
    assert expected in str(error.value)


WATCHING = [
    "~stages.realtime",
    "stages.align.steps=14",
    "stages.align.guards.spike_window=8",
    "stages.align.save_every=3",
]


def jumping(losses: dict[int, float]):
    """`MegatronEngine._run_schedule` whose loss in the given steps (from 0) is another; gradients are what they are."""
    run_schedule = MegatronEngine._run_schedule

    def run(engine, microbatches, forward_only):
        figures = run_schedule(engine, microbatches, forward_only)
        figures.loss = losses.get(engine.step, figures.loss) if not forward_only else figures.loss
        return figures

    return run


def events(output, *names: str):
    records = [json.loads(line) for line in (output / FILE_NAME).read_text().splitlines()]
    return {
        record["step"]: {name: value for name, value in record.items() if name != "time"}
        for record in records
        if record.get("event") in names
    }


@pytest.fixture
def spikes(monkeypatch):
    monkeypatch.setattr(MegatronEngine, "_run_schedule", jumping({5: 90.0, 8: math.nan, 9: 80.0, 12: 70.0}))


def test_a_run_stopped_amid_spikes_takes_the_same_decisions(small, tmp_path, monkeypatch, spikes):
    skipping = [*small, *WATCHING, "stages.align.guards.spike=skip", "stages.align.guards.max_skipped=4"]
    assert run_pipeline(compose_run([*skipping, f"output_dir={tmp_path / 'whole'}"])) == 0
    step = MegatronEngine.train_step

    def stopping(engine, *arguments):
        if engine.step in (9, 11):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(engine, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(MegatronEngine, "train_step", stopping)
        for _ in range(2):
            assert run_pipeline(compose_run([*skipping, f"output_dir={tmp_path / 'cut'}"])) != 0
    assert run_pipeline(compose_run([*skipping, f"output_dir={tmp_path / 'cut'}"])) == 0

    whole, cut = (load_checkpoint(latest(tmp_path / name / "align" / "checkpoints")) for name in ("whole", "cut"))
    assert whole.state["guards"] == cut.state["guards"]
    assert whole.state["guards"]["skipped"] == 4 and whole.state["guards"]["spikes"] == 3
    assert all(torch.equal(whole.tensors[name], cut.tensors[name]) for name in whole.tensors)
    told = events(tmp_path / "whole", "spike", "skipped")
    assert sorted(told) == [6, 9, 10, 13] and told == events(tmp_path / "cut", "spike", "skipped")


def test_warning_changes_no_number(small, tmp_path, spikes):
    ends = {}
    for policy in ("off", "warn"):
        output = tmp_path / policy
        overrides = [*small, *WATCHING, f"stages.align.guards.spike={policy}", f"output_dir={output}"]
        assert run_pipeline(compose_run(overrides)) == 0
        ends[policy] = load_checkpoint(latest(output / "align" / "checkpoints")).tensors
        assert bool(events(output, "spike")) == (policy == "warn")
    assert all(torch.equal(ends["off"][name], ends["warn"][name]) for name in ends["off"])


def test_stop_saves_nothing_new_and_skip_goes_on(small, tmp_path, spikes):
    overrides = [*small, *WATCHING, f"output_dir={tmp_path}"]
    with pytest.raises(TrainingError, match=r"step 6, 90, is a spike: .*step_00000003") as error:
        run_pipeline(compose_run([*overrides, "stages.align.guards.spike=stop"]))
    assert "\n  align/align-train-" in str(error.value)
    assert latest(tmp_path / "align" / "checkpoints").name == "step_00000003"
    assert run_pipeline(compose_run([*overrides, "stages.align.guards.spike=skip"])) == 0


def jump_on_rank(rank: int, ranks: int, overrides: list[str]) -> tuple[int, list[int]]:
    """A job: a run in which losses jump alike on all ranks, as they are sums over them, but for one that only rank 1
    sees above the limit, as the last bit of a sum may have it. Gives the exit code and the steps skipped."""
    schedule, step = MegatronEngine._run_schedule, MegatronEngine.train_step
    jumps: dict[int, float] = {5: 90.0, 8: math.nan}
    MegatronEngine._run_schedule = jumping(jumps | ({7: 80.0} if rank == 1 else {}))
    skipped = []

    def noting(engine, *arguments):
        output = step(engine, *arguments)
        skipped.extend([engine.step] if output.skipped else [])
        return output

    MegatronEngine.train_step = noting
    try:
        return train_on_rank(rank, ranks, overrides), skipped
    finally:
        MegatronEngine._run_schedule, MegatronEngine.train_step = schedule, step


def test_ranks_agree(small, tmp_path, spikes):
    overrides = [*small, *WATCHING, "stages.align.steps=10", "stages.align.guards.spike=skip", f"output_dir={tmp_path}"]
    with Ranks(2) as ranks:
        assert ranks.run(2, jump_on_rank, overrides) == [(0, [6, 8, 9])] * 2
    state = load_checkpoint(latest(tmp_path / "align" / "checkpoints")).state
    assert state["guards"]["skipped"] == state["engine"]["skipped_steps"] == 3
    assert sorted(events(tmp_path, "spike", "skipped")) == [6, 8, 9]
