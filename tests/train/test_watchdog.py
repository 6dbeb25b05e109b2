"""A rank that stalls is found and named, and the job ended; in real processes, with seconds for minutes."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
from watched_jobs import endless, training

from moss_train.errors import ConfigError
from moss_train.exit_codes import STALLED
from moss_train.train.peers import Beat
from moss_train.train.stall_report import culprit
from moss_train.train.watchdog_config import WatchdogConfig

SECONDS = 60  #: for a job to begin, stall, be found out and end: a few, but the machine may be busy


def hang() -> None:
    time.sleep(3600)


def stall_in_data(rank: int) -> None:
    """On rank 1 the decoding of a clip never ends."""
    from moss_train.data import frame_store

    run_job, decoded = frame_store.run_job, 0

    def hanging(decode_job, store):
        nonlocal decoded
        decoded += 1
        if rank == 1 and decoded == 4:
            print(f"HANGS OVER {decode_job.key}", flush=True)
            hang()
        return run_job(decode_job, store)

    frame_store.run_job = hanging


def stall_in_forward(rank: int) -> None:
    """On rank 1 the third step's forward pass never ends."""
    from moss_train.engines.stages import ChunkCalls
    from moss_train.parallel.phases import activity

    forward = ChunkCalls.forward

    def hanging(step, *arguments):
        if rank == 1 and activity().step == 3:
            print(f"HANGS OVER {', '.join(activity().keys)}", flush=True)
            hang()
        return forward(step, *arguments)

    ChunkCalls.forward = hanging


def stall_holding_the_interpreter(rank: int) -> None:
    """On rank 1 a step enters compiled code that lets no other thread run."""
    import ctypes

    from moss_train.engines.megatron import MegatronEngine
    from moss_train.parallel.phases import activity

    take_step, began = MegatronEngine._take_step, time.monotonic()

    def hanging(engine, *arguments):
        nonlocal began
        if activity().step == 3:
            began = time.monotonic()
        # So late that its heartbeats have told of steps whose times are known.
        if rank == 1 and activity().step > 3 and time.monotonic() - began > 2.0:
            ctypes.PyDLL(None).sleep(3600)
        return take_step(engine, *arguments)

    MegatronEngine._take_step = hanging


FOUR_LAYERS = ["model.text.layers=4", "model.text.cross_layers=[1,3]"]


@pytest.mark.parametrize(
    ("mischief", "phase", "more"),
    [
        (stall_in_data, "data", ["stages.*.data.frame_cache_mb=0"]),
        (stall_in_forward, "forward", []),
        (stall_in_forward, "forward", ["layout.pp=2", *FOUR_LAYERS]),
        (stall_in_forward, "forward", ["layout.pp=2", *FOUR_LAYERS, "engine=deepspeed"]),
    ],
    ids=["data", "forward", "pipeline", "pipeline under deepspeed"],
)
def test_the_rank_at_fault_is_reported_once(small, tmp_path, mischief, phase, more):
    with endless(small, tmp_path, mischief=mischief, more=more) as job:
        assert job.exit_codes(SECONDS) == [STALLED, STALLED]
    words = job.words()
    assert words.count("STALLED: ") == 1
    place = "pp 1" if more and "pp" in more[0] else "dp 1"
    assert f"STALLED: rank 1 ({place}) has shown no sign of life in phase {phase} for " in words
    assert f"step {2 if phase == 'data' else 3}, phase {phase}; process {job.pid(1)}" in words
    assert words.partition("HANGS OVER ")[2].splitlines()[0] in words.partition("samples   ")[2].splitlines()[0]
    assert "in hang: time.sleep(3600)" in words.partition("MainThread:")[2]
    other = words.partition("The others:\n")[2].splitlines()[0]
    assert other.startswith("  rank 0 (") and "waiting for others in" in other


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process(small, tmp_path, rank):
    """Rank 0 keeps the store by which the processes know of each other."""
    with endless(small, tmp_path) as job:
        job.wait_until(training(job))
        os.kill(job.pid(rank), signal.SIGSTOP)
        assert job.exit_codes(SECONDS, [1 - rank]) == [STALLED]
        words = job.words()
        assert words.count("STALLED: ") == 1
        if rank == 1:
            assert "STALLED: rank 1 (dp 1) has given no heartbeat for " in words
            assert f"it is stopped (SIGSTOP, or a debugger; kill -CONT {job.pid(1)} lets it go on)" in words
        else:
            assert f"STALLED: rank 0 (dp 0) is stopped (SIGSTOP, or a debugger; kill -CONT {job.pid(0)} " in words
            assert "the store of the job" in words


@pytest.mark.slow
def test_an_interpreter_that_is_held(small, tmp_path):
    with endless(small, tmp_path, mischief=stall_holding_the_interpreter) as job:
        assert job.exit_codes(SECONDS, [0]) == [STALLED]
        assert "STALLED: rank 1 (dp 1) has given no heartbeat for " in job.words()
        assert "stuck in compiled code" in job.words()
        # Its own stacks come from a timer that needs no interpreter.
        job.wait_until(lambda: "_take_step" in job.words_of(1) or "in hanging" in job.words_of(1), 30)


def test_one_process_alone(small, tmp_path):
    with endless(small, tmp_path, ranks=1, mischief=stall_alone) as job:
        assert job.exit_codes(SECONDS) == [STALLED]
        assert "STALLED: this process has shown no sign of life in phase forward" in job.words()
        assert "in hang: time.sleep(3600)" in job.words()


def stall_alone(rank: int) -> None:
    stall_in_forward(1)


def beat(rounds=5, phase="forward", quiet_s=60.0, allowed_s=50.0, **more):
    return Beat(rounds=rounds, phase=phase, quiet_s=quiet_s, allowed_s=allowed_s, **more)


def test_the_culprit_is_who_the_others_wait_for():
    waiting = beat(phase="reduce", waiting="all_reduce")
    assert culprit({0: waiting, 1: beat()}) == 1, "an earlier phase"
    assert culprit({0: beat(rounds=6, phase="data", waiting="all_gather"), 1: beat(phase="save")}) == 1, "a step behind"
    assert culprit({0: beat(phase="p2p"), 1: beat(), 2: beat(waiting="all_reduce")}) == 1, "at work"
    assert culprit({0: waiting, 1: beat(phase="data", quiet_s=3.0)}) is None, "it takes its time, and gets it"
    assert culprit({0: waiting, 1: beat(phase="evaluate", rounds=4, quiet_s=3.0)}) is None, "evaluates meanwhile"
    assert culprit({0: waiting, 1: beat(rounds=1, done=True)}) == 0, "who has finished holds up nobody"


@pytest.mark.parametrize(
    ("field", "value"), [("stall_s", 0.0), ("stall_s", -1.0), ("start_s", 10.0), ("slow_factor", 0.5)]
)
def test_settings_that_cannot_be(field, value):
    config = WatchdogConfig()
    setattr(config, field, value)
    with pytest.raises(ConfigError, match=f"watchdog.{field}={value}"):
        config.validate()
    WatchdogConfig(stall_s=None).validate()


def test_a_slow_decoder_is_told_of_once_before_it_is_given_up(monkeypatch):
    from moss_train.parallel import phases
    from moss_train.train import watchdog

    told = []
    monkeypatch.setattr(watchdog, "_say", told.append)
    monkeypatch.setattr(phases.activity(), "loading", phases.Waiting(("clip-7",), time.monotonic(), 240.0))
    watching = watchdog.Watchdog(WatchdogConfig())
    for step, quiet_s in ((3, 49.0), (3, 51.0), (3, 90.0), (4, 55.0)):
        watching._tell_of_waiting(Beat(step=step, phase="data", quiet_s=quiet_s, allowed_s=240.0, keys=["clip-7"]))
    watching._tell_of_waiting(Beat(step=5, phase="forward", quiet_s=55.0, allowed_s=240.0))
    assert len(told) == 2
    assert "waited 51 s in phase data of step 3 for the frames of clip-7" in told[0] and "test_watchdog.py" in told[0]


def test_a_healthy_job_whose_steps_are_slow_gets_through_its_second_one(monkeypatch):
    """On a GPU the first thread waits at the end of the step, for longer than `stall_s` where steps are long."""
    from moss_train.parallel import phases
    from moss_train.train import watchdog

    clock = 1000.0
    monkeypatch.setattr(phases, "time", SimpleNamespace(monotonic=lambda: clock))
    monkeypatch.setattr(phases, "_activity", phases.Activity())
    watching = watchdog.Watchdog(WatchdogConfig())

    def allowed(phase: str) -> float:
        return watching._allowed_s(phases.activity(), phase, phases.Waiting())

    phases.begin_stage()
    seen = []
    for step, seconds in ((1, 300.0), (2, 90.0), (3, 90.0)):
        phases.begin_step(step)
        with phases.phase("reduce"):
            seen.append(allowed("reduce"))
            clock += seconds
    assert seen == [1800.0, 300.0, 270.0]


def test_what_was_before_it_watched_does_not_count(monkeypatch):
    """Forked processes have a parent that imported everything long ago."""
    from moss_train.parallel import phases
    from moss_train.train import watchdog

    monkeypatch.setattr(phases, "_activity", phases.Activity(since=time.monotonic() - 3600.0))
    with watchdog.Watchdog(WatchdogConfig()) as watching:
        assert watching._own_beat().quiet_s < 60.0
