"""What the processes of a job tell each other about themselves, through the store that torch.distributed began with.

A few small JSON values: one a process, renewed every two seconds; a verdict, written once; the stacks of the process it
is about. Collectives cannot carry this, since a job that stands still stands in one.
"""

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from moss_train.parallel.agreement import gather_lists
from moss_train.parallel.groups import ParallelState

#: how long one question to the store may take
ANSWER_S = 5.0
KEYS_TOLD = 16
_boards = 0  #: made in this process; all ranks make as many, so that none reads what an earlier one wrote


@dataclass(frozen=True)
class Place:
    """Where a process runs, and its place in the layout."""

    rank: int
    pid: int
    host: str
    namespace: str  #: processes of one host and one namespace see each other's ids
    coordinates: str  #: for people: tp 0, dp 1

    @staticmethod
    def own(state: ParallelState) -> "Place":
        degrees = (
            ("tp", state.tensor_rank, state.tensor_ranks),
            ("cp", state.frame_rank, state.frame_ranks),
            ("dp", state.data_rank, state.data_ranks),
            ("pp", state.pipeline_rank, state.pipeline_ranks),
        )
        coordinates = ", ".join(f"{name} {rank}" for name, rank, ranks in degrees if ranks > 1)
        return Place(state.rank, os.getpid(), socket.gethostname(), _namespace(), coordinates)

    def __str__(self) -> str:
        return f"rank {self.rank}" + (f" ({self.coordinates})" if self.coordinates else "")

    def is_near(self, other: "Place") -> bool:
        return (self.host, self.namespace) == (other.host, other.namespace)


@dataclass(frozen=True)
class Beat:
    """One heartbeat: what a process does, and how it ended when it did."""

    number: int = 0
    rounds: int = 0  #: see `phases.Activity`
    step: int = 0
    phase: str = "start"
    beats: int = 0
    quiet_s: float = 0.0  #: since its last sign of life
    allowed_s: float = float("inf")  #: how long that may be
    waiting: str = ""  #: the communication that its main thread is in; empty: it is at work, or stuck
    keys: list[str] = field(default_factory=list)  #: of the samples in hand, the first `KEYS_TOLD`
    done: bool = False

    @property
    def overdue(self) -> bool:
        return self.quiet_s > self.allowed_s


@dataclass(frozen=True)
class Verdict:
    """Why the job ends, and by whose fault."""

    kind: str  #: stalled or lost
    rank: int
    why: str
    by: int  #: who found it; of a stall it writes the report


class Board:
    """The values of one run. Questions take at most `ANSWER_S`, or raise; only one thread may ask."""

    def __init__(self, state: ParallelState):
        """Every rank must call it at the same point."""
        global _boards
        _boards += 1
        self.own = Place.own(state)
        self.places = [Place(**lists[0]) for lists in gather_lists([asdict(self.own)])]
        # A connection of our own: a process that waits in the shared one would keep us waiting.
        store = dist.distributed_c10d._get_default_store().clone()
        store.set_timeout(timedelta(seconds=ANSWER_S))
        self._store = dist.PrefixStore(f"moss_train/watchdog/{_boards}", store)
        self._beat(self.own.rank, Beat())
        if self.own.rank == 0:
            self._store.set("verdict", "")
        dist.barrier()

    def tell(self, beat: Beat) -> None:
        """Publish this process's heartbeat."""
        self._beat(self.own.rank, beat)

    def hear(self, ranks: Sequence[int]) -> dict[int, Beat]:
        """The newest heartbeat of each of these ranks."""
        keys = [f"beat/{rank}" for rank in ranks]
        return {rank: Beat(**json.loads(text)) for rank, text in zip(ranks, self._store.multi_get(keys), strict=True)}

    def verdict(self, own: Verdict | None = None) -> Verdict | None:
        """The job's verdict: the one that was written first, `own` when it is the first."""
        if own is None:
            text = self._store.get("verdict")
        else:
            text = self._store.compare_set("verdict", "", json.dumps(asdict(own)))
        return Verdict(**json.loads(text)) if text else None

    def give(self, name: str, text: str = "-") -> None:
        """Leave a text for others."""
        self._store.set(name, text)

    def take(self, name: str, within_s: float) -> str | None:
        """A text that another process leaves within so many seconds."""
        try:
            self._store.wait([name], timedelta(seconds=within_s))
            return self._store.get(name).decode()
        except dist.DistError:
            return None

    def is_first(self, name: str) -> bool:
        """True for the first process that asks by this name."""
        return self._store.add(name, 1) == 1

    def _beat(self, rank: int, beat: Beat) -> None:
        # JSON has no infinity that others would read.
        finite = replace(beat, allowed_s=min(beat.allowed_s, 1e9))
        self._store.set(f"beat/{rank}", json.dumps(asdict(finite)))


def process_state(place: Place, own: Place) -> str:
    """Of a process that is near: `dead`, `stopped` or `alive`; of another: `unknown`."""
    if not place.is_near(own):
        return "unknown"
    try:
        os.kill(place.pid, 0)
    except ProcessLookupError:
        return "dead"
    except PermissionError:
        return "alive"
    try:
        letter = Path(f"/proc/{place.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "alive"
    return {"Z": "dead", "X": "dead", "T": "stopped", "t": "stopped"}.get(letter, "alive")


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
