"""A run killed four times ends as if nothing had been; a fault planted in what is saved or resumed is found."""

import json
import re

import pytest
import torch

from moss_train.bench.recovering import killing
from moss_train.bench.recovering.comparing import _same_bits
from moss_train.bench.recovering.course import Course, Recovered
from moss_train.bench.recovering.folder import RunFolder
from moss_train.bench.recovering.killing import Kill, Timings, draw_kills, strike
from moss_train.bench.recovery import RecoveryOptions, summary
from moss_train.cli import main
from moss_train.errors import ConfigError
from moss_train.exit_codes import PEER_LOST


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recovery")


def test_four_kills(capsys, folder):
    code = main(["bench", "recovery", "kills=4", "seed=1", f"out={folder}"])
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert (code, result["name"], result["ok"], result["failures"]) == (0, "bench recovery", True, [])
    figures = result["figures"]
    assert (figures["kills"], figures["identical"]) == (4, True)
    assert (figures["samples_lost"], figures["samples_repeated"]) == (0, 0)
    assert figures["samples"] == 4 * figures["steps"] == 4 * (3 + 32)
    assert figures["kills_in_a_save"] >= 1 and figures["kills_of_one_rank"] == 2
    assert 0 < figures["slowest_end_s"] < killing.PROMPTLY_S
    assert figures["checkpoints"] == 4 and figures["tensors"] > 400
    assert len(re.findall(r"^kill \d/4 ", printed.err, re.MULTILINE)) == 4


@pytest.mark.parametrize("layout", ["layout.pp=2,layout.zero=1", pytest.param("layout.zero=3", marks=pytest.mark.slow)])
def test_two_kills_under_deepspeed(capsys, tmp_path, layout):
    options = ["kills=2", "seed=3", f"overrides=[engine=deepspeed,{layout}]", f"out={tmp_path}"]
    assert main(["bench", "recovery", *options]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["ok"], result["figures"]["kills"], result["figures"]["identical"]) == (True, 2, True)


@pytest.fixture(scope="module")
def course(folder):
    """A shorter run, and what it is without a kill. One process: a second one would double the work of every start,
    which is most of it, and find the planted faults no better; `test_four_kills` has two."""
    course = Course(folder, ranks=1, steps=10, seed=2)
    course.run_whole()
    return course


#: in the second stage, whose checkpoint of step 2 is complete by then
ONE_KILL = [Kill("step", None, 3 + 5, 0.5)]


def skip_a_batch(rank: int) -> None:
    """A loader that goes on one global batch too late."""
    from moss_train.data.loader import Loader

    exact = Loader.load_state_dict

    def late(loader, state):
        epoch, step = loader._blend.after(state["epoch"], state["step"])
        exact(loader, state | {"epoch": epoch, "step": step})

    Loader.load_state_dict = late


def forget_a_moment(rank: int) -> None:
    """An optimizer that goes on with the first moment of one parameter at zero."""
    from moss_train.engines.megatron import MegatronEngine

    exact = MegatronEngine.load

    class Forgetful:
        def __init__(self, source):
            self._source = source

        def __getattr__(self, name):
            return getattr(self._source, name)

        def read(self, name, offsets, shape):
            block = self._source.read(name, offsets, shape)
            return torch.zeros_like(block) if name == "optimizer/embedding.text.weight/exp_avg" else block

    MegatronEngine.load = lambda engine, source, metadata: exact(engine, Forgetful(source), metadata)


def resumed_with(course: Course, plant) -> Recovered:
    recovered = course.run_killed(ONE_KILL, plant=plant, name=plant.__name__)
    (killed,) = recovered.kills
    assert killed.hit == [0] and killed.newest.stage == "realtime"
    return recovered


def test_a_batch_that_is_skipped_is_found(course):
    recovered = resumed_with(course, skip_a_batch)
    result = summary(recovered, 1)
    assert not result["ok"] and result["figures"]["identical"] is False
    assert result["figures"]["samples_lost"] == result["figures"]["samples_repeated"] > 0
    told = "\n".join(recovered.failures)
    assert re.search(r"realtime 10: state\.json: loader\.step is \d, not \d", told), told
    assert "steps consumed other samples" in told


def test_a_moment_that_is_forgotten_is_found(course):
    recovered = resumed_with(course, forget_a_moment)
    result = summary(recovered, 1)
    assert not result["ok"] and result["figures"]["identical"] is False
    assert (result["figures"]["samples_lost"], result["figures"]["samples_repeated"]) == (0, 0)
    told = "\n".join(recovered.failures)
    assert re.search(r"realtime 10: \d+ tensors of model differ", told), told
    assert re.search(r"realtime 10: \d+ tensors of optimizer differ", told), told
    assert re.search(r"metrics: loss differs in \d steps", told), told
    assert "align" not in told and "random" not in told


def test_a_run_that_ends_before_the_kill_is_no_kill(course):
    result = summary(course.run_killed([Kill("step", None, 100, 0.5)]), 1)
    assert not result["ok"] and result["figures"]["kills"] == 0
    assert result["failures"] == ["kill 1 of 1 did not come before the run's end: give it more steps"]


class ScriptedJob:
    """Processes that end as they are told when rank 0 is killed."""

    def __init__(self, other: int | None):
        self.processes = [None, None]
        self.began = self.began_wall = 0.0
        self._other, self._codes = other, [None, None]

    def alive(self):
        return [rank for rank, code in enumerate(self._codes) if code is None]

    def exit_codes(self):
        return list(self._codes)

    def kill(self, ranks):
        hit = [rank for rank in ranks if self._codes[rank] is None]
        for rank in hit:
            self._codes[rank] = -9
        if hit == [0]:
            self._codes[1] = self._other
        return hit

    def wait(self, ranks, seconds):
        return all(self._codes[rank] is not None for rank in ranks)

    def words(self):
        return "its last words"


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        (PEER_LOST, None),
        (1, f"rank 1 ended with exit code 1, not {PEER_LOST}, after rank 0 was killed\nits last words"),
        (None, "rank 1 was still there 15 s after rank 0 was killed"),
    ],
)
def test_a_process_that_outlives_the_killed_one_is_a_failure(tmp_path, other, fault):
    job, folder = ScriptedJob(other), RunFolder(tmp_path, ("align",))
    killed = strike(job, folder, 0, Kill("start", 0, 1, 0.0), Timings(1.0, 0.1, 0.1), 1.0)
    assert killed.faults == ([fault] if fault else [])
    assert (killed.hit, killed.reached, killed.newest, job.alive()) == ([0], None, None, [])


def test_kills_are_drawn_from_the_seed():
    assert draw_kills(40, 2, 2, 7) == draw_kills(40, 2, 2, 7) != draw_kills(40, 2, 2, 8)
    kills = draw_kills(60, 2, 2, 7)
    assert {name: sum(kill.instant == name for kill in kills) for name in ("save", "start", "step")} == {
        "save": 20, "start": 10, "step": 30,
    }  # fmt: skip
    alone = [kill for kill in kills if kill.rank is not None]
    assert len(alone) == 25 and {kill.rank for kill in alone} == {0, 1}
    assert all(kill.instant != "start" for kill in alone)
    assert all(kill.rank is None for kill in draw_kills(20, 1, 2, 7))


def test_four_kills_are_of_every_kind():
    assert {(kill.instant, kill.rank is None) for kill in draw_kills(4, 2, 2, 0)} == {
        ("save", True), ("save", False), ("step", True), ("step", False),
    }  # fmt: skip


def test_bits_are_compared_not_numbers():
    nan = torch.tensor([float("nan"), 1.0])
    assert _same_bits(nan, nan.clone()) and not torch.equal(nan, nan.clone())
    assert not _same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not _same_bits(torch.zeros(2), torch.zeros(2, 1))
    assert not _same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
    assert _same_bits(torch.tensor(1.5), torch.tensor(1.5)) and _same_bits(torch.zeros(0, 3), torch.zeros(0, 3))


def test_a_run_that_fails_is_told(course):
    result = summary(Recovered(failures=["after 0 kills: the run ended by itself"]), 2)
    assert (result["ok"], result["figures"]["identical"]) == (False, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kills": 0}, "kills=0"),
        ({"ranks": 0}, "ranks=0"),
        ({"seed": -1}, "seed=-1"),
        ({"steps": 0}, "steps=0"),
        ({"launcher": "slurm"}, "launcher=slurm: legal values are forked, processes"),
        ({"deadline_s": 0.0}, "deadline_s=0.0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        RecoveryOptions(**options).validate()
