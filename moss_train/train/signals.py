"""Asking a run to stop: SIGTERM (schedulers, preemption) and SIGINT end it after the step in progress, saved."""

import signal
from types import FrameType

import torch
import torch.distributed as dist


class StopRequest:
    """Remembers the first stop signal while it is entered; a second SIGINT interrupts at once, as usual."""

    def __init__(self) -> None:
        self._signal = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def agreed(self, device: torch.device) -> int:
        """The number of the signal that any rank received, 0 for none. Every rank must call it at the same step.

        Signals reach ranks at different times; acting on one's own would leave the others waiting in a collective.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self._signal
        flag = torch.tensor(self._signal, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)


def exit_code(number: int) -> int:
    """The exit code shells give a process that signal `number` ended."""
    return 128 + number
