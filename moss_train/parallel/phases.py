"""What this process is doing right now, for whoever watches over it: cheap to set, safe to read from another thread.

The phases of a step, in the order in which it passes through them: data, forward (the backward pass included), p2p
(waiting for a neighbouring pipeline stage), reduce (gradient sums and the optimizer), save, evaluate. Code that does
the work says so with `phase(name)`. Before and after a stage's steps a process is in `start`, between the phases of a
step in `bookkeeping`.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

PHASES = ("data", "forward", "p2p", "reduce", "save", "evaluate")


@dataclass(frozen=True)
class Waiting:
    """What the loader waits for."""

    keys: tuple[str, ...] = ()
    since: float = 0.0
    patience_s: float = 0.0  #: after which the loader itself gives it up


@dataclass
class Activity:
    """A process's place in its work. Written by its main thread alone, but for `loading`."""

    step: int = 0  #: number of the step in progress, from 1; 0 before the first
    phase: str = "start"
    since: float = field(default_factory=time.monotonic)  #: when the last sign of life was given
    beats: int = 0  #: signs of life so far; equal work gives equal counts
    keys: Sequence[str] = ()  #: of the samples in hand
    rounds: int = 0  #: steps and stages begun so far, over all stages: who has fewer is behind
    longest: dict[str, float] = field(default_factory=dict)  #: phase → longest time between two signs of life in it
    loading: Waiting = Waiting()  #: written, whole, by the thread that makes steps ready
    first_step: bool = True  #: of the stage in this process: it compiles, and says nothing of the later ones' times
    #: `longest` of the first step, while the second is under way: that takes no longer, compiled or not
    at_first: dict[str, float] = field(default_factory=dict)


_activity = Activity()


def activity() -> Activity:
    """This process's activity, the one object."""
    return _activity


def begin_stage() -> None:
    """A stage begins, or has ended: nothing is known of the times of what follows."""
    beat()
    _activity.step, _activity.keys, _activity.first_step = 0, (), True
    _activity.rounds += 1
    _activity.longest, _activity.at_first = {}, {}


def begin_step(step: int) -> None:
    """Step number `step` begins; its samples are not known yet."""
    beat()
    if _activity.step:
        _activity.at_first = _activity.longest if _activity.first_step else {}
        if _activity.first_step:
            _activity.first_step, _activity.longest = False, dict.fromkeys(_activity.longest, 0.0)
    _activity.step, _activity.keys = step, ()
    _activity.rounds += 1


def hold(keys: Sequence[str]) -> None:
    """These samples are being worked on."""
    beat()
    _activity.keys = keys


def wait_for(keys: Sequence[str], patience_s: float = 0.0) -> None:
    """The loader waits for these samples' frames from now on; () when it has them. For the thread that prepares."""
    _activity.loading = Waiting(tuple(keys), time.monotonic(), patience_s)


def beat() -> None:
    """A sign of life within a phase."""
    now = time.monotonic()
    quiet, name = now - _activity.since, _activity.phase
    if quiet > _activity.longest.get(name, 0.0):
        _activity.longest[name] = quiet
    _activity.since = now
    _activity.beats += 1


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """This process is in phase `name` meanwhile, and back in the one before afterwards."""
    # The sign of life comes first: a reader between the two lines must not take the old phase's time for the new one's.
    before = _activity.phase
    beat()
    _activity.phase = name
    try:
        yield
    finally:
        beat()
        _activity.phase = before


@contextlib.contextmanager
def steps() -> Iterator[None]:
    """The steps of a stage are taken meanwhile."""
    begin_stage()
    with phase("bookkeeping"):
        yield
    begin_stage()
