"""A clip plays, the model watches and says what it has to say, when it has to say it: `moss-train stream`.

Shape suffixes: F frames, C colour channels, H, W pixels.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.text import Text

from moss_train.errors import ConfigError
from moss_train.evaluate.config import DecodeConfig
from moss_train.evaluate.decoder import SlotOutput, StreamingDecoder, most_tokens
from moss_train.evaluate.schedule import Schedule, Step, schedule_of
from moss_train.streams.config import CompilerConfig
from moss_train.streams.growing_text import GrowingText
from moss_train.streams.media import stream_frame_times
from moss_train.streams.schema import StreamSample, parse_sample
from moss_train.streams.timeline import build_timeline
from moss_train.streams.tokenizer import StreamTokenizer


def live_schedule(
    name: str,
    questions: Sequence[tuple[float, str]],
    system: str | None,
    fps: float,
    duration_s: float,
    compiler: CompilerConfig,
    tokenizer: StreamTokenizer,
) -> tuple[Schedule, list[float]]:
    """The events of a clip with questions on the way, as training would have met them, and the frames' times."""
    late = [text for time_s, text in questions if time_s >= duration_s]
    if late:
        raise ConfigError(f"the clip ends after {duration_s:.1f} s, before this question is asked: {late[0]}")
    events = [
        {"id": f"q{number}", "t": time_s, "role": "user", "text": text}
        for number, (time_s, text) in enumerate(questions, 1)
    ]
    sample = parse_sample(
        {
            "schema": "moss_train/stream@1",
            "id": name,
            "media": [{"id": "v", "kind": "video", "member": "mp4"}],
            "sampling": {"fps": fps, "start_s": 0.0, "end_s": duration_s},
            "system": system,
            "events": events,
        },
        name,
    )
    assert isinstance(sample, StreamSample)
    times_s = stream_frame_times(fps, 0.0, duration_s)
    return schedule_of(sample, build_timeline(sample, times_s, compiler, tokenizer)), times_s


class Audience(Protocol):
    """Who watches a live stream."""

    def user(self, step: Step) -> None: ...

    def token(self, step: Step, token: int) -> None: ...

    def slot(self, step: Step, output: SlotOutput) -> None: ...

    def over(self) -> None: ...


@dataclass(frozen=True)
class LiveResult:
    """What was said, and how long it took. Seconds."""

    outputs: list[SlotOutput]
    latencies_s: list[float]  #: per frame: from when it is handed over until its slot is closed
    lags_s: list[float]  #: per frame: how late it was handed over, because the model was still busy
    clip_s: float
    first_tokens_s: list[float] = field(default_factory=list)  #: per reply: from its prompt or frame to its first token

    def summary(self) -> str:
        ordered = sorted(self.latencies_s)
        if not ordered:
            return "no frame was shown"
        worst = ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)]
        mean = math.fsum(ordered) / len(ordered)
        tokens = sum(len(output.ids) for output in self.outputs)
        busy = math.fsum(ordered) / self.clip_s if self.clip_s else 0.0
        text = (
            f"{len(ordered)} frames, {tokens} tokens said; per frame {1e3 * mean:.0f} ms on average, "
            f"{1e3 * worst:.0f} ms at the 95th percentile, {1e3 * ordered[-1]:.0f} ms at most; "
            f"busy {busy:.0%} of the clip's time"
        )
        if self.first_tokens_s:
            text += f"; first token after {1e3 * statistics.median(self.first_tokens_s):.0f} ms"
        lag = max(self.lags_s, default=0.0)
        return text + (f"; fell behind by up to {lag:.2f} s" if lag > 0.05 else "")


def play(
    model: Any,
    tokenizer: StreamTokenizer,
    compiler: CompilerConfig,
    schedule: Schedule,
    frames_FCHW: torch.Tensor,
    speed: float,
    decode: DecodeConfig,
    audience: Audience,
    now: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    choose: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> LiveResult:
    """Hand the events to the model when their time has come; `speed` 0 does not wait. `choose` as in the
    decoder.

    Raises ValueError when the number of frames is not that of the schedule.
    """
    if len(frames_FCHW) != schedule.frames:
        raise ValueError(f"{len(frames_FCHW)} frames for a schedule of {schedule.frames}")
    decoder = StreamingDecoder(
        model,
        tokenizer,
        compiler,
        [schedule.system],
        most_tokens(schedule, tokenizer, compiler, decode),
        max(1, schedule.frames),
        decode,
        choose,
    )
    outputs, latencies_s, lags_s, first_tokens_s = [], [], [], []
    frame = 0
    began = now()
    for step in schedule.steps:
        due = began + step.time_s / speed if speed else now()
        wait = due - now()
        if wait > 0:
            sleep(wait)
        started = now()
        if step.user is not None:
            audience.user(step)
            pictures = {}
        else:
            pictures = {0: frames_FCHW[frame]}
            frame += 1
        came_s: list[float] = []  # when the tokens of this slot came

        def said(_: int, token: int, step: Step = step, came_s: list[float] = came_s) -> None:
            came_s.append(now())
            audience.token(step, token)

        (output,) = decoder.step({0: step}, pictures, said).values()
        if output.state == "speak":
            first_tokens_s.append(came_s[0] - started)
        if step.user is None:
            latencies_s.append(now() - started)
            lags_s.append(max(0.0, started - due))
        audience.slot(step, output)
        outputs.append(output)
    audience.over()
    return LiveResult(outputs, latencies_s, lags_s, schedule.steps[-1].time_s, first_tokens_s)


class LivePrinter:
    """Prints a live stream: dots for silence, the user's words, the model's words as they come."""

    def __init__(self, console: Console, tokenizer: StreamTokenizer):
        self._console = console
        self._tokenizer = tokenizer
        self._line = ""  #: what the open line holds: "", "dots", "user" or "reply"
        self._said = GrowingText(tokenizer)  #: what the open line says

    def user(self, step: Step) -> None:
        if step.user:
            self._open("user", step, "user", "bold magenta")
            self._write(_printable(step.user), "magenta")
            self._close()

    def token(self, step: Step, token: int) -> None:
        if self._line != "reply":
            self._open("reply", step, "model", "bold green")
            self._said = GrowingText(self._tokenizer)
        if new := self._said.add(token):
            self._write(_printable(new), "green")

    def slot(self, step: Step, output: SlotOutput) -> None:
        if output.ends:
            self._close()
        elif output.state == "silence" and step.user is None:
            if self._line != "dots":
                self._open("dots", step, "", "")
            self._write("·", "dim")

    def over(self) -> None:
        self._close()

    def _open(self, line: str, step: Step, who: str, style: str) -> None:
        self._close()
        self._line = line
        self._write(f"{step.time_s:7.1f} s  ", "dim")
        self._write(f"{who:<6}" if who else "", style)

    def _close(self) -> None:
        if self._line:
            self._console.print()
        self._line = ""

    def _write(self, text: str, style: str) -> None:
        self._console.print(Text(text, style), end="", soft_wrap=True)


def _printable(text: str) -> str:
    """Without control characters, which a model may well produce and a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " if letter.isspace() else "▯" for letter in text)
