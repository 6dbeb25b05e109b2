"""Who holds a job up, and the report about it: for somebody woken at night."""

import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from types import FrameType

from moss_train.exit_codes import STALLED
from moss_train.train.peers import KEYS_TOLD, Beat

#: Phases in the order in which a step passes through them.
_ORDER = {"start": 0, "data": 1, "forward": 2, "p2p": 2, "reduce": 3, "bookkeeping": 4, "evaluate": 4, "save": 5}
#: Where a thread that waits for other processes is.
_COMMUNICATION = ("/torch/distributed/", "/megatron/core/distributed/", "/pipeline_parallel/p2p_communication.py")
_MAIN_FRAMES, _OTHER_FRAMES = 30, 6  #: innermost calls shown of the main thread, and of each other one
_LINES_OF_OTHERS = 32
#: Names of the threads that watch; their stacks are of no interest.
WATCHING = "moss-watchdog"


def culprit(beats: Mapping[int, Beat]) -> int | None:
    """The rank that the others wait for, if it is overdue; None while it may take its time.

    It is the one furthest behind. Of several at the same place it is not one that is in a communication: that one has
    come to where the others are expected.
    """
    running = {rank: beat for rank, beat in beats.items() if not beat.done}
    if not running:
        return None
    rank = min(running, key=lambda rank: (*_place(running[rank]), rank))
    return rank if running[rank].overdue else None


def _place(beat: Beat) -> tuple[int, int, bool, int]:
    waits = bool(beat.waiting) or beat.phase == "p2p"
    return beat.rounds, _ORDER.get(beat.phase, 0), waits, beat.beats


def communication(frame: FrameType | None) -> str:
    """The name of the communication that a thread is in; empty when it is in none."""
    if frame is None or not any(part in frame.f_code.co_filename for part in _COMMUNICATION):
        return ""
    while frame.f_back is not None and frame.f_code.co_name in ("wrapper", "wait", "_communicate"):
        frame = frame.f_back
    return frame.f_code.co_name


def stacks() -> str:
    """The Python stacks of this process, main thread first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sys._current_frames()
    parts = []
    for number in sorted(frames, key=lambda number: (number != main, str(names.get(number)))):
        name = names.get(number, "a thread that is not Python's")
        if name.startswith(WATCHING):
            continue
        calls = traceback.extract_stack(frames[number])
        shown = calls[-(_MAIN_FRAMES if number == main else _OTHER_FRAMES) :]
        cut = f"    … {len(calls) - len(shown)} outer calls\n" if len(shown) < len(calls) else ""
        text = "".join(
            f"    {call.filename}:{call.lineno} in {call.name}" + (f": {call.line}\n" if call.line else "\n")
            for call in shown
        )
        parts.append(f"  {name}:\n{cut}{text}")
    return "".join(parts)


def stall_report(
    who: str,
    pid: int,
    beat: Beat,
    why: str,
    stack: str | None,
    host: str = "",
    others: Sequence[tuple[str, Beat]] = (),
) -> str:
    """The report that `who` holds up the job. `why`: what was seen of it; `stack`: None where it gave none."""
    rule = "=" * 100
    at = f" on {host}" if host else ""
    last = ", at its last heartbeat" if stack is None else ""
    lines = [
        rule,
        f"STALLED: {who} {why}.",
        f"  where     step {beat.step}, phase {beat.phase}{_waits(beat)}{last}; process {pid}{at}",
        f"  samples   {_listed(beat.keys) if beat.keys else 'none told'}",
    ]
    if stack is not None:
        lines += ["  threads, innermost call last:", stack.rstrip("\n")]
    else:
        lines.append(f"  No stacks, since it does not answer. While it is there{at}: py-spy dump --pid {pid}")
    if others:
        lines.append("The others:")
        lines += [f"  {name}: {_doing(other)}" for name, other in others[:_LINES_OF_OTHERS]]
        if len(others) > _LINES_OF_OTHERS:
            lines.append(f"  … and {len(others) - _LINES_OF_OTHERS} more")
    lines += [
        f"The job ends with exit code {STALLED}. The same command goes on from the newest checkpoint.",
        "Slow rather than stuck? watchdog.stall_s=<seconds> allows more (watchdog.start_s: at the start), null all.",
        rule,
    ]
    return "\n".join(lines)


def _doing(beat: Beat) -> str:
    if beat.done:
        return "finished"
    return f"step {beat.step}, phase {beat.phase}{_waits(beat)}, for {beat.quiet_s:.0f} s"


def _waits(beat: Beat) -> str:
    return f", waiting for others in {beat.waiting}" if beat.waiting else ""


def _listed(keys: list[str]) -> str:
    return ", ".join(keys) + (", …" if len(keys) == KEYS_TOLD else "")
