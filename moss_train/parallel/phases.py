"""What this process is doing right now, for whoever watches over it: cheap to set, safe to read from another thread.

The phases of a step, in the order in which it passes through them: data, forward (the backward pass included), p2p
(waiting for a neighbouring pipeline stage), reduce (gradient sums and the optimizer), save, evaluate. Code that does
the work says so with `phase(name)`.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

PHASES = ("data", "forward", "p2p", "reduce", "save", "evaluate")


@dataclass
class Activity:
    """A process's place in its work. Written by its main thread alone."""

    step: int = 0  #: number of the step in progress, from 1; 0 before the first
    phase: str = "start"
    since: float = field(default_factory=time.monotonic)  #: when the last sign of life was given
    beats: int = 0  #: signs of life so far; equal work gives equal counts
    keys: Sequence[str] = ()  #: of the samples in hand


_activity = Activity()


def activity() -> Activity:
    """This process's activity, the one object."""
    return _activity


def begin_step(step: int) -> None:
    """Step number `step` begins; its samples are not known yet."""
    _activity.step, _activity.keys = step, ()
    beat()


def hold(keys: Sequence[str]) -> None:
    """These samples are being worked on."""
    _activity.keys = keys
    beat()


def beat() -> None:
    """A sign of life within a phase."""
    _activity.since = time.monotonic()
    _activity.beats += 1


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """This process is in phase `name` meanwhile, and back in the one before afterwards."""
    before = _activity.phase
    _activity.phase = name
    beat()
    try:
        yield
    finally:
        _activity.phase = before
        beat()
