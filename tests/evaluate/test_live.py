"""A clip played live: events in time, words as they come, figures of speed."""

import io

import pytest
import torch
from rich.console import Console
from scripted_model import ScriptedModel, shipped_tokenizer, world_stream

from moss_train.errors import ConfigError
from moss_train.evaluate.config import DecodeConfig
from moss_train.evaluate.live import (
    LivePrinter,
    LiveResult,
    live_schedule,
    play,
)
from moss_train.evaluate.schedule import read_stream
from moss_train.streams.config import CompilerConfig

TOKENIZER = shipped_tokenizer()
COMPILER = CompilerConfig(tokens_per_second=4.0)


class Clock:
    """Time that passes only when somebody sleeps or works."""

    def __init__(self, work_s: float = 0.0):
        self.time, self.work_s, self.slept = 100.0, work_s, []

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds


class BusyModel(ScriptedModel):
    """Takes its time over every call."""

    def __init__(self, *arguments, clock: Clock, **more):
        super().__init__(*arguments, **more)
        self.clock = clock

    def extend(self, *arguments, **more):
        self.clock.time += self.clock.work_s
        return super().extend(*arguments, **more)


def show(seed: int, scenario: str, clock: Clock, speed: float = 1.0) -> tuple[str, LiveResult]:
    sample, compiled = world_stream(TOKENIZER, COMPILER, seed, scenario)
    questions = [(event.t, event.text) for event in sample.events if event.role == "user"]
    schedule, times_s = live_schedule("clip", questions, sample.system, 1.0, 12.0, COMPILER, TOKENIZER)
    assert schedule.steps == read_stream(sample, compiled, COMPILER, TOKENIZER)[0].steps, "live is as in training"
    assert times_s == [float(second) for second in range(12)]
    frames = torch.stack([torch.full((3, 4, 4), index, dtype=torch.uint8) for index in range(12)])
    text = io.StringIO()
    printer = LivePrinter(Console(file=text, width=100, highlight=False), TOKENIZER)
    model = BusyModel([compiled], TOKENIZER, clock=clock)
    result = play(model, TOKENIZER, COMPILER, schedule, frames, speed, DecodeConfig(), printer, clock.now, clock.sleep)
    return text.getvalue(), result


def test_what_is_said_and_asked_stands_in_time():
    text, result = show(2, "before", Clock())
    sample, compiled = world_stream(TOKENIZER, COMPILER, 2, "before")
    lines = [line.split(maxsplit=3) for line in text.splitlines()]
    asked = next(event for event in sample.events if event.role == "user")
    assert any(line[2] == "user" and line[3] == asked.text for line in lines)
    said = [line[3] for line in lines if len(line) == 4 and line[2] == "model"]
    spoken = [event.text for event in sample.events if event.role == "assistant" and event.kind != "confirm"]
    assert said == spoken
    starts = [f"{slot.time_s:.1f}" for slot in compiled.slots if slot.state == "speak"]
    assert [line[0] for line in lines if len(line) == 4 and line[2] == "model"] == starts
    assert text.count("·") == sum(slot.state == "silence" and slot.frame >= 0 for slot in compiled.slots)
    assert sum(len(output.ids) for output in result.outputs) == sum(len(TOKENIZER.encode(s)) for s in spoken)


def test_plays_in_real_time():
    clock = Clock(work_s=0.01)
    _, result = show(1, "silent", clock)
    assert clock.time - 100.0 == pytest.approx(11.01)
    assert result.latencies_s == pytest.approx([0.01] * 12)
    # the frame at second 0 waits for the opening turn
    assert result.lags_s == pytest.approx([0.01] + [0.0] * 11)
    half = Clock()
    show(1, "silent", half, speed=2.0)
    assert half.time - 100.0 == pytest.approx(5.5)
    fast = Clock()
    show(1, "silent", fast, speed=0.0)
    assert fast.slept == []


def test_a_slow_model_falls_behind_and_it_is_said():
    _, result = show(1, "silent", Clock(work_s=1.5))
    assert result.lags_s[-1] > result.lags_s[0]
    assert "fell behind by up to" in result.summary()
    assert "1500 ms on average" in result.summary()
    assert "fell behind" not in show(1, "silent", Clock())[1].summary()


def test_an_interrupted_reply_ends_its_line():
    text, _ = show(0, "interruption", Clock())
    lines = [line.strip() for line in text.splitlines()]
    cut = next(index for index, line in enumerate(lines) if "Stop." in line)
    assert "model" in lines[cut - 1] and "model" in lines[cut + 1]


def test_control_characters_do_not_reach_the_terminal():
    text = io.StringIO()
    printer = LivePrinter(Console(file=text, width=80, highlight=False), TOKENIZER)
    sample, compiled = world_stream(TOKENIZER, COMPILER, 1, "silent")
    step = read_stream(sample, compiled, COMPILER, TOKENIZER)[0].steps[1]
    for token in TOKENIZER.encode("a\x1b[31mé[b]"):
        printer.token(step, token)
    printer.over()
    assert "\x1b" not in text.getvalue()
    assert "a▯[31mé[b]" in text.getvalue()


def test_a_question_after_the_end_is_an_error():
    with pytest.raises(ConfigError, match="ends after 3.0 s.*Where"):
        live_schedule("clip", [(5.0, "Where?")], None, 1.0, 3.0, COMPILER, TOKENIZER)
