"""The watchdog: ends a job that stands still, or has lost a process, and says which rank, where and why.

Two threads in each process. One talks to the others through the `Board`: it tells what this process does, learns what
they do, finds who holds the job up or is gone, and ends this process when that is agreed. The other watches alone: it
judges a process without others, and one whose first thread gets no answer any more; and it keeps a timer armed that
prints the stacks when not even Python's threads run.
"""

import contextlib
import faulthandler
import hashlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

from moss_train.errors import MossTrainError
from moss_train.exit_codes import PEER_LOST, STALLED
from moss_train.parallel import phases
from moss_train.parallel.groups import ParallelState
from moss_train.train.peers import ANSWER_S, KEYS_TOLD, Beat, Board, Place, Verdict, process_state
from moss_train.train.stall_report import WATCHING, communication, culprit, stacks, stall_report
from moss_train.train.watchdog_config import WatchdogConfig

_BEAT_S = 2.0  #: between two heartbeats, at most
_GRACE_S = 5.0  #: for the main thread to end by itself when another process is gone
_REPORT_S = 10.0  #: for the report to be written before the other processes end
_UNREACHABLE_S = 10.0  #: without an answer from the store
_KEEPER = -1  #: in a verdict, for whoever keeps the store
_BACKSTOP_S = 10.0  #: beyond the allowance, until the stacks are printed without Python's help
#: What torch says in a process whose connection to another one broke.
_BROKEN = re.compile(
    r"gloo/transport|Connection (closed|reset) by (remote )?peer|Broken pipe|Timed out waiting|NCCL|"
    r"(Connection|Socket|socket).*(refused|closed|reset|timed? ?out)|failed to recv|store.*timeout",
    re.DOTALL,
)


class PeerLost(Exception):
    """Another process of the job is gone; the message says which. Not `told`: another process prints it."""

    def __init__(self, message: str, told: bool):
        super().__init__(message)
        self.told = told


class Watchdog:
    """Watches while it is entered. `connect` when there are process groups; until then it watches this process alone.

    Left with an exception, it tells the other processes of it. When the exception is but a broken connection to a
    process that is gone, it raises `PeerLost` in its place.
    """

    def __init__(self, config: WatchdogConfig):
        self._config = config
        self._beat_s = min(_BEAT_S, (config.stall_s or _BEAT_S * 5) / 5)
        self._board: Board | None = None
        self._stop = threading.Event()
        self._left = threading.Event()  #: the main thread is on its way out by itself
        self._judged = threading.Event()
        self._verdict: Verdict | None = None
        self._threads: list[threading.Thread] = []
        self._number = 0
        self._awake_since = 0.0  #: whole process stopped and continued: what was before does not count
        self._heard: dict[int, tuple[int, float]] = {}  #: rank → number of its newest heartbeat, when it came
        self._beats: dict[int, Beat] = {}  #: what was heard last
        self._suspect: int | None = None
        self._told_of_step = 0
        self._answered = time.monotonic()  #: when the store last answered

    def __enter__(self) -> "Watchdog":
        phases.beat()  # a forked process may have been imported long ago
        if self._config.stall_s is not None:
            self._start(WATCHING, self._watch_alone)
        return self

    def connect(self, state: ParallelState) -> None:
        """Watch the other processes too. Every rank must call it at the same point."""
        if state.world_size > 1:
            board = Board(state)
            self._answered = time.monotonic()
            self._board = board
            self._start(f"{WATCHING}-peers", lambda: self._watch_peers(board))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        board = self._board
        if error is None and board is not None:
            try:
                # Whoever leaves first may keep the store that the others' watchdogs ask.
                dist.barrier()
            except Exception as broken:
                self._part(board, broken)
                raise
        elif error is not None and board is not None:
            self._part(board, error)
        self._end_threads()
        if error is None and board is not None:
            with contextlib.suppress(dist.DistError):
                board.tell(Beat(self._number + 1, done=True))

    def _part(self, board: Board, error: BaseException) -> None:
        """Tell the others why this process ends. Raises PeerLost when another one's end is the reason."""
        self._left.set()
        broken = is_broken_connection(error)
        if broken:
            self._judged.wait(_UNREACHABLE_S + ANSWER_S)
        self._end_threads()
        if isinstance(error, MossTrainError):
            digest = hashlib.sha256(str(error).encode()).hexdigest()[:16]
            error.told_elsewhere = not _is_first(board, f"error/{digest}")
        verdict = self._verdict
        if verdict is None:
            with contextlib.suppress(dist.DistError):
                verdict = board.verdict(Verdict("lost", board.own.rank, _in_a_line(error), board.own.rank))
        if not broken or verdict is None or verdict.rank == board.own.rank:
            return
        if verdict.kind == "stalled":
            board.take("reported", _REPORT_S)
            _leave(STALLED)
        raise PeerLost(self._lost_message(board, verdict), _is_first(board, "told")) from error

    def _start(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _end_threads(self) -> None:
        self._left.set()
        self._stop.set()
        for thread in self._threads:
            thread.join(ANSWER_S + self._beat_s)
        self._threads = []
        faulthandler.cancel_dump_traceback_later()

    # Alone

    def _watch_alone(self) -> None:
        stall_s = self._config.stall_s or 0.0
        # Who wants stalls found within seconds (a test) wants these found too.
        backstop, patience = min(_BACKSTOP_S, 2 * stall_s), min(_UNREACHABLE_S, 2 * stall_s)
        overdue, ticked = 0, time.monotonic()
        while not self._stop.wait(self._beat_s):
            now = time.monotonic()
            if now - ticked > 2 * self._beat_s + 1.0:
                self._awake_since = now
            ticked = now
            beat = self._own_beat()
            # Only a process without others is ended by the timer: elsewhere the others end, and their launcher ends it.
            left = beat.allowed_s - beat.quiet_s + backstop
            with contextlib.suppress(OSError, ValueError, AttributeError):  # no standard error to write to
                faulthandler.dump_traceback_later(max(left, backstop), exit=self._board is None, file=sys.__stderr__)
            self._tell_of_waiting(beat)
            # With a verdict the store is asked for other things, and the thread that does so ends the process.
            judged = self._judged.is_set()
            unanswered = self._board is None or (not judged and self._unanswered_s() > max(patience, stall_s))
            overdue = overdue + 1 if beat.overdue and unanswered else 0
            if overdue >= 2 and not self._left.is_set():
                self._end_alone(beat)

    def _tell_of_waiting(self, beat: Beat) -> None:
        """A decoder that takes long has a deadline of its own, after which the run goes on without its sample. Until
        then a line says what is waited for, once a step."""
        stall_s = self._config.stall_s or 0.0
        patient = beat.phase == "data" and stall_s < beat.quiet_s <= beat.allowed_s and phases.activity().loading.keys
        if patient and self._told_of_step != beat.step:
            self._told_of_step = beat.step
            own = str(self._board.own) if self._board is not None else "this process"
            _say(
                f"waiting: {own} has waited {beat.quiet_s:.0f} s in phase data of step {beat.step} for the frames of "
                f"{', '.join(beat.keys)}. A decoder has data.decode_timeout_s and one more try, then the sample is "
                f"quarantined; after {beat.allowed_s:.0f} s the job ends.\n{stacks()}"
            )

    def _end_alone(self, beat: Beat) -> NoReturn:
        board = self._board
        if board is None:
            own = f"rank {os.environ.get('RANK', 0)}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "this process"
            _say(stall_report(own, os.getpid(), beat, _quiet(beat), stacks()))
        else:
            self._report_without_store(board, beat)
        _leave(STALLED)

    def _report_without_store(self, board: Board, beat: Beat) -> None:
        """The others cannot be asked: what can be seen from here must do. One process of each host reports."""
        states = {place.rank: process_state(place, board.own) for place in board.places}
        if board.own.rank != min(rank for rank, state in states.items() if state == "alive"):
            return
        store = f"the store of the job (kept by rank 0, or by torchrun) gave no answer for {self._unanswered_s():.0f} s"
        stopped = [board.places[rank] for rank, state in states.items() if state == "stopped"]
        if stopped:
            place = stopped[0]
            last = self._beats.get(place.rank, Beat())
            why = f"{_stopped(place)}; {store}"
            _say(stall_report(str(place), place.pid, last, why, None, place.host, [(str(board.own), beat)]))
        else:
            why = f"{_quiet(beat)}, and {store}: whoever keeps it is stuck, or its host is gone"
            _say(stall_report(str(board.own), board.own.pid, beat, why, stacks(), board.own.host))

    def _unanswered_s(self) -> float:
        return time.monotonic() - self._answered

    def _own_beat(self) -> Beat:
        activity = phases.activity()
        phase, loading = activity.phase, activity.loading
        since = max(activity.since, self._awake_since, loading.since if phase == "data" else 0.0)
        self._number += 1
        keys = loading.keys if phase == "data" and loading.keys else activity.keys
        return Beat(
            number=self._number,
            rounds=activity.rounds,
            step=activity.step,
            phase=phase,
            beats=activity.beats,
            quiet_s=time.monotonic() - since,
            allowed_s=self._allowed_s(activity, phase, loading),
            waiting=communication(sys._current_frames().get(threading.main_thread().ident or 0)),
            keys=list(keys[:KEYS_TOLD]),
        )

    def _allowed_s(self, activity: phases.Activity, phase: str, loading: phases.Waiting) -> float:
        if self._config.stall_s is None:
            return float("inf")
        known = activity.longest.get(phase)
        if phase == "start" or activity.first_step or known is None:
            return self._config.start_s
        # A decoder that hangs is ended by its own deadline, and the run goes on without the sample.
        patience = loading.patience_s if phase == "data" and loading.keys else 0.0
        at_first = activity.at_first.get(phase, 0.0)
        return max(self._config.stall_s, self._config.slow_factor * known, at_first, patience)

    # Together

    def _watch_peers(self, board: Board) -> None:
        ticked = time.monotonic()
        while not self._stop.wait(self._beat_s):
            if time.monotonic() - ticked > self._beat_s + 2 * ANSWER_S:
                self._heard = {}
            ticked = time.monotonic()
            verdict = self._find(board)
            if verdict is not None:
                self._verdict = verdict
                self._judged.set()
                self._end_together(board, verdict)
                return

    def _find(self, board: Board) -> Verdict | None:
        """What has befallen the job, if anything has."""
        try:
            board.tell(self._own_beat())
            found = board.verdict()
            self._answered = time.monotonic()
            if found is None and (own := self._judge(board)) is not None:
                found = board.verdict(own)
            return found
        except dist.DistError as error:
            # The store is gone, or its keeper does not answer: what can be seen from here must do.
            for place in board.places:
                if place.rank != board.own.rank and process_state(place, board.own) == "dead":
                    return Verdict("lost", place.rank, "it died", board.own.rank)
            if self._unanswered_s() > _UNREACHABLE_S and "timeout" not in str(error).lower():
                return Verdict("lost", _KEEPER, "", board.own.rank)
            return None

    def _judge(self, board: Board) -> Verdict | None:
        for place in board.places:
            if place.rank != board.own.rank and process_state(place, board.own) == "dead":
                # Read now, what it told last was told before.
                if not board.hear([place.rank])[place.rank].done:
                    return Verdict("lost", place.rank, "it died", board.own.rank)
        stall_s = self._config.stall_s
        if stall_s is None:
            return None
        watchers = sorted({0, 1, len(board.places) - 1})
        ranks: range | list[int] = range(len(board.places)) if board.own.rank in watchers else watchers
        beats = self._hear(board, ranks)
        if board.own.rank not in watchers and all(self._silent_s(rank) > stall_s for rank in watchers):
            beats = self._hear(board, range(len(board.places)))
        elif board.own.rank not in watchers:
            return None
        silent = [
            r for r, b in beats.items() if not b.done and self._silent_s(r) > self._silence_allowed_s(board, r, b)
        ]
        suspect = max(silent, key=self._silent_s) if silent else culprit(beats)
        confirmed, self._suspect = suspect is not None and suspect == self._suspect, suspect
        if suspect is None or not confirmed:
            return None
        why = self._silence(board, suspect) if silent else _quiet(beats[suspect])
        return Verdict("stalled", suspect, why, board.own.rank)

    def _silence_allowed_s(self, board: Board, rank: int, beat: Beat) -> float:
        """Compiled code that lets no other thread run may silence a healthy process, and for as long as its phase may
        take (`start` takes long); nothing excuses one that is seen to be stopped."""
        stall_s = self._config.stall_s or 0.0
        if self._silent_s(rank) > stall_s and process_state(board.places[rank], board.own) == "stopped":
            return stall_s
        return max(stall_s, beat.allowed_s)

    def _hear(self, board: Board, ranks: range | list[int]) -> dict[int, Beat]:
        beats = board.hear(ranks)
        self._beats |= beats
        for rank, beat in beats.items():
            if rank not in self._heard or self._heard[rank][0] != beat.number:
                self._heard[rank] = (beat.number, time.monotonic())
        return beats

    def _silent_s(self, rank: int) -> float:
        return time.monotonic() - self._heard[rank][1] if rank in self._heard else 0.0

    def _silence(self, board: Board, rank: int) -> str:
        place = board.places[rank]
        reasons = {
            "stopped": f"it {_stopped(place)}",
            "alive": "the process lives, but Python's threads do not run: it is stuck in compiled code, or swapped out",
            "unknown": f"the process is stopped or stuck, or {place.host} is gone",
        }
        reason = reasons.get(process_state(place, board.own), "the process is gone")
        return f"has given no heartbeat for {self._silent_s(rank):.0f} s: {reason}"

    def _end_together(self, board: Board, verdict: Verdict) -> None:
        if verdict.kind == "lost":
            if self._left.wait(_GRACE_S):
                return  # the main thread has met it
            if _is_first(board, "told"):
                _say(f"error: {self._lost_message(board, verdict)}")
            _leave(PEER_LOST)
        if self._left.is_set():
            return
        with contextlib.suppress(dist.DistError):
            if verdict.rank == board.own.rank:
                board.give(f"stacks/{verdict.rank}", stacks())
            if verdict.by == board.own.rank:
                self._report(board, verdict)
            elif board.take("reported", _REPORT_S) is None and board.is_first("reporters"):
                self._report(board, verdict)
        _leave(STALLED)

    def _report(self, board: Board, verdict: Verdict) -> None:
        place = board.places[verdict.rank]
        beats = board.hear(range(len(board.places)))
        silent = "no heartbeat" in verdict.why
        stack = None if silent else board.take(f"stacks/{verdict.rank}", max(ANSWER_S, 3 * self._beat_s))
        others = [(str(board.places[rank]), beat) for rank, beat in sorted(beats.items()) if rank != verdict.rank]
        _say(stall_report(str(place), place.pid, beats[verdict.rank], verdict.why, stack, place.host, others))
        board.give("reported")

    def _lost_message(self, board: Board, verdict: Verdict) -> str:
        if verdict.rank == _KEEPER:
            keeper = "torchrun has" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0 has"
            return f"{keeper} ended, with the store by which the processes know of each other; {board.own} ends too"
        place = board.places[verdict.rank]
        return (
            f"{place}, process {place.pid} on {place.host}, is gone: {verdict.why}. "
            f"The others end with {PEER_LOST}; the same command goes on from the newest checkpoint"
        )


def is_broken_connection(error: BaseException) -> bool:
    """Whether an exception only says that another process does not answer."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_BROKEN.search(str(error))))


def end_without(lost: PeerLost) -> NoReturn:
    """End this process at once: what would be cleaned up needs the process that is gone."""
    if lost.told:
        _say(f"error: {lost}")
    _leave(PEER_LOST)


def _quiet(beat: Beat) -> str:
    return f"has shown no sign of life in phase {beat.phase} for {beat.quiet_s:.0f} s (allowed: {beat.allowed_s:.0f} s)"


def _stopped(place: Place) -> str:
    return f"is stopped (SIGSTOP, or a debugger; kill -CONT {place.pid} lets it go on)"


def _in_a_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _is_first(board: Board, name: str) -> bool:
    try:
        return board.is_first(name)
    except dist.DistError:
        return True  # who knows; better twice than never


def _say(text: str) -> None:
    """Print on standard error, in one piece, past a lock that the stuck main thread may hold."""

    def write() -> None:
        left = f"{text}\n".encode()
        while left:
            left = left[os.write(2, left) :]

    _within(write)


def _leave(code: int) -> NoReturn:
    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()

    _within(flush)
    os._exit(code)


def _within(work: Callable[[], None], seconds: float = 5.0) -> None:
    """Do it, but do not wait for ever: nobody may be reading the other end of a pipe."""
    thread = threading.Thread(target=work, name=f"{WATCHING}-says", daemon=True)
    thread.start()
    thread.join(seconds)
