"""Events are handed to a live session when their time has come; who watches is told what becomes of them.

Frames are encoded and seen while a reply goes on. What was said is put back into slots, one for each event, so that a
live stream can be shown and scored like an evaluated one.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from moss_train.evaluate.conversation import Said
from moss_train.evaluate.decoder import SlotOutput
from moss_train.evaluate.live import Audience
from moss_train.evaluate.live_figures import LiveFigures
from moss_train.evaluate.schedule import Step
from moss_train.evaluate.stream import LiveSession, Picture


@dataclass(frozen=True)
class LiveEvent:
    """A frame arrives (`picture`), or the user speaks (`step.user`)."""

    step: Step
    picture: Picture | None = None


@dataclass(frozen=True)
class PlayedLive:
    """What came of a live stream."""

    steps: list[Step]  #: in the order in which they were handed over
    outputs: list[SlotOutput]  #: what was said after each; silence after a frame that was dropped
    token_times_s: list[list[float]]  #: when each token of each output was said, on the session's clock
    #: the numbers of the steps in the order in which they were read, those left out that only came between two tokens
    read: list[tuple[int, float]]  #: of a reply, each with the time at which that was
    figures: LiveFigures

    def as_heard(self) -> tuple[list[Step], list[SlotOutput], list[list[float]]]:
        """Steps, outputs and times of tokens as the model met them: in the order and at the times at which they were
        read. A prompt is read a little after it was handed over, and before a frame that is still being encoded."""
        return (
            [replace(self.steps[number], time_s=read_s) for number, read_s in self.read],
            [self.outputs[number] for number, _ in self.read],
            [self.token_times_s[number] for number, _ in self.read],
        )

    def summary(self) -> str:
        return self.figures.summary()


def play_live(
    session: LiveSession,
    events: Iterable[LiveEvent],
    audience: Audience,
    speed: float = 1.0,
    sleep: Callable[[float], None] = time.sleep,
) -> PlayedLive:
    """Hand over the events, in order, and wait until the last reply is over. The session's clock runs `speed` seconds
    a second; an event whose time has passed is handed over at once."""
    slots = _Slots(audience)
    listener = threading.Thread(target=slots.listen, args=(session,), name="listen", daemon=True)
    listener.start()
    try:
        for event in events:
            left_s = (event.step.time_s - session.now_s()) / speed
            if left_s > 0:
                sleep(left_s)
            slots.check()
            slots.handed_over(event.step)
            if event.picture is None:
                session.ask(event.step.user or "")
            else:
                session.frame(event.picture, event.step.time_s)
        session.finish()
    except KeyboardInterrupt:  # how a stream without end is ended
        session.stop()
    except BaseException:
        with contextlib.suppress(Exception):  # the first error goes on
            session.stop()
        raise
    finally:
        listener.join()
    slots.check()
    audience.over()
    return PlayedLive(slots.steps, slots.outputs(), slots.token_times_s(), slots.read, session.figures)


class _Slots:
    """Puts what is said to the event after which it is said. `listen` runs in a thread of its own."""

    def __init__(self, audience: Audience):
        self._audience = audience
        self.steps: list[Step] = []
        self.read: list[tuple[int, float]] = []  #: see `PlayedLive`
        self._outputs: dict[int, SlotOutput] = {}
        self._times_s: dict[int, list[float]] = {}
        self._users: deque[int] = deque()  #: numbers of prompts that were not read yet
        self._frames: dict[float, deque[int]] = {}  #: time stamp → numbers of frames that were not read yet
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def handed_over(self, step: Step) -> None:
        with self._lock:
            number = len(self.steps)
            self.steps.append(step)
            waiting = self._users if step.user is not None else self._frames.setdefault(step.time_s, deque())
            waiting.append(number)

    def outputs(self) -> list[SlotOutput]:
        return [self._outputs.get(number, _silent()) for number in range(len(self.steps))]

    def token_times_s(self) -> list[list[float]]:
        return [self._times_s.get(number, []) for number in range(len(self.steps))]

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def listen(self, session: LiveSession) -> None:
        """Until the session is over."""
        try:
            self._listen(session)
        except RuntimeError as error:  # of the session; raised where the stream was started
            self._error = self._error or error

    def _listen(self, session: LiveSession) -> None:
        step, output, times_s, is_open = None, _silent(), [], False
        speaking = False  # a reply goes on
        for said in session.said():
            if said.kind in ("turn", "frame"):
                if is_open and speaking and not output.ids and step.user is None:
                    self.read.pop()  # the next event came before a token of the reply was due: nothing was decided
                elif is_open:
                    self._tell(self._audience.slot, step, output)
                (step, output, times_s), is_open = self._open(said), True
                if said.kind == "turn":
                    speaking = False
                    self._tell(self._audience.user, step)
                continue
            speaking = said.kind == "token"
            if said.silence_probability is not None:
                output.silence_probability = said.silence_probability
            if said.kind == "token":
                if not output.ids:
                    output.state = "speak" if said.starts else "continue"
                output.ids.append(said.token)
                times_s.append(said.time_s)
                self._tell(self._audience.token, step, said.token)
            elif is_open:
                output.ends, is_open = bool(output.ids), False
                self._tell(self._audience.slot, step, output)
        if is_open:
            self._tell(self._audience.slot, step, output)

    def _tell(self, audience: Callable, *what: object) -> None:
        """An error of who watches must not keep speech waiting for room; it is raised where the stream was started."""
        if self._error is None:
            try:
                audience(*what)
            except Exception as error:
                self._error = error

    def _open(self, said: Said) -> tuple[Step, SlotOutput, list[float]]:
        with self._lock:
            if said.kind == "turn":
                number = self._users.popleft()
            else:
                waiting = self._frames[said.time_s]
                number = waiting.popleft()
                if not waiting:
                    del self._frames[said.time_s]
            self.read.append((number, said.time_s if said.read_s is None else said.read_s))
            times_s = self._times_s.setdefault(number, [])
            return self.steps[number], self._outputs.setdefault(number, _silent()), times_s


def _silent() -> SlotOutput:
    return SlotOutput("silence", [], False, None)
