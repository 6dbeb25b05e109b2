"""Asking a run to stop: SIGTERM and SIGUSR1 (schedulers, pre-emption) and SIGINT end it at a step boundary, saved.

Light to import: the handlers must stand before torch is loaded, which takes seconds in which a signal may come.
"""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING

from moss_train.exit_codes import DONE, INTERRUPTED, REQUEUE

if TYPE_CHECKING:
    import torch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_MEETING_S = 10.0  #: that a process asked to stop may take to meet the others for the first time


class StopRequest:
    """Remembers the first stop signal while it is entered; a second SIGINT interrupts at once, as usual.

    Until the processes have met, which is when they first ask `agreed`, there is nothing to save and maybe nobody to
    agree with: then a signal that has waited for `_MEETING_S` ends the process, wherever it is.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._previous: dict[int, object] = {}
        self._met = threading.Event()

    def __enter__(self) -> "StopRequest":
        # Python calls handlers when its main thread is back from compiled code. In there, waiting for processes that do
        # not come, only this pipe tells of a signal.
        self._reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        self._woken_before = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        threading.Thread(target=self._end_unmet, args=(self._reads,), name="stop-signal", daemon=True).start()
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._met.set()
        signal.set_wakeup_fd(self._woken_before)
        os.close(self._writes)  # which ends the thread

    def _end_unmet(self, reads: int) -> None:
        while told := os.read(reads, 64):
            numbers = [number for number in told if number in STOP_SIGNALS]
            if numbers and not self._met.wait(_MEETING_S):
                with contextlib.suppress(OSError):
                    os.write(2, f"{signal.Signals(numbers[0]).name}: stopped before training began\n".encode())
                os._exit(exit_code(numbers[0]))
        os.close(reads)

    def obeyed(self) -> None:
        """The process ends now: further signals are ignored for good. torchrun sends one to each process that has not
        ended when the first has, and would count it as killed."""
        self._previous = dict.fromkeys(self._previous, signal.SIG_IGN)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = self._signal or number
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            again = " (once more: at once, unsaved)" if number == signal.SIGINT else ""
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"{name}: will save and stop after the step in progress{again}\n".encode())

    def agreed(self, device: "torch.device") -> int:
        """The number of the signal that any rank received, 0 for none. Every rank must call it at the same step.

        Signals reach ranks at different times; acting on one's own would leave the others waiting in a collective.
        """
        import torch
        import torch.distributed as dist

        if not dist.is_initialized() or dist.get_world_size() == 1:
            self._met.set()
            return self._signal
        flag = torch.tensor(self._signal, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self._met.set()
        return int(flag)


def exit_code(number: int) -> int:
    """The exit code of a run that signal `number` stopped; 0: none did."""
    if not number:
        return DONE
    return INTERRUPTED if number == signal.SIGINT else REQUEUE
