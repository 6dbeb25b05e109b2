"""Asking a run to stop: SIGTERM and SIGUSR1 (schedulers, pre-emption) and SIGINT end it at a step boundary, saved.

Light to import: the handlers must stand before torch is loaded, which takes seconds in which a signal may come.
"""

import os
import signal
from types import FrameType
from typing import TYPE_CHECKING

from moss_train.exit_codes import DONE, INTERRUPTED, REQUEUE

if TYPE_CHECKING:
    import torch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers the first stop signal while it is entered; a second SIGINT interrupts at once, as usual."""

    def __init__(self) -> None:
        self._signal = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

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
            os.write(2, f"{name}: stopping, saved, after the step in progress{again}\n".encode())

    def agreed(self, device: "torch.device") -> int:
        """The number of the signal that any rank received, 0 for none. Every rank must call it at the same step.

        Signals reach ranks at different times; acting on one's own would leave the others waiting in a collective.
        """
        import torch
        import torch.distributed as dist

        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self._signal
        flag = torch.tensor(self._signal, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)


def exit_code(number: int) -> int:
    """The exit code of a run that signal `number` stopped; 0: none did."""
    if not number:
        return DONE
    return INTERRUPTED if number == signal.SIGINT else REQUEUE
