"""A live session that is played to: what is said stands at the event after which it was said."""

import io
import math
import threading
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console
from scripted_model import shipped_tokenizer
from small_model import SIZE, small_model

from moss_train.evaluate.conversation import Said
from moss_train.evaluate.live import LivePrinter
from moss_train.evaluate.play_live import LiveEvent, play_live
from moss_train.evaluate.sampling import GenerationConfig
from moss_train.evaluate.schedule import Step
from moss_train.evaluate.stream import LiveConfig, LiveSession
from moss_train.parallel import groups
from moss_train.report.caption_track import captions_of
from moss_train.streams.config import CompilerConfig

TOKENIZER = shipped_tokenizer()
SPEED = 20.0


@pytest.fixture(scope="module")
def model():
    yield small_model(TOKENIZER, layers=3)
    groups.shutdown()


def session(model, **config) -> LiveSession:
    return LiveSession(
        model, TOKENIZER, CompilerConfig(tokens_per_second=6.0), config=LiveConfig(**config),
        generation=GenerationConfig(temperature=3.0, seed=4), speed=SPEED,
    )  # fmt: skip


def events(count: int = 8, seconds: float = 1.0) -> list[LiveEvent]:
    made = [LiveEvent(Step(0.0, seconds, "Watch."))]
    for number in range(count):
        shade = torch.full((3, SIZE, SIZE), (30 * number) % 256, dtype=torch.uint8)
        made.append(LiveEvent(Step(seconds * number, seconds * (number + 1), None), shade))
        if number == 4:
            made.append(LiveEvent(Step(seconds * (number + 0.5), math.inf, "What is it?")))
    return made


def test_outputs_stand_at_their_events(model):
    text = io.StringIO()
    printer = LivePrinter(Console(file=text, width=1000, highlight=False), TOKENIZER)
    played = play_live(session(model, slot_tokens=12), events(), printer, SPEED)
    assert [step.user for step in played.steps] == [event.step.user for event in events()]
    assert len(played.outputs) == 10
    assert sum(len(output.ids) for output in played.outputs) == played.figures.tokens > 0
    assert [len(times_s) for times_s in played.token_times_s] == [len(output.ids) for output in played.outputs]
    steps, outputs, heard_s = played.as_heard()
    spoken_s = [second for times_s in heard_s for second in times_s]
    assert spoken_s == sorted(spoken_s)
    assert [step.time_s for step in steps] == sorted(step.time_s for step in steps)
    assert sum(len(output.ids) for output in outputs) == played.figures.tokens
    assert played.figures.seen + played.figures.dropped == 8
    for output in played.outputs:
        assert (output.state == "silence") == (not output.ids)
        assert output.ends <= bool(output.ids)
    decided = [output for output in played.outputs if output.silence_probability is not None]
    assert len(decided) >= 2 and all(0 <= output.silence_probability <= 1 for output in decided)
    lines = text.getvalue()
    assert "user  What is it?" in lines and "model" in lines
    assert "8 frames" in played.summary() and "between tokens" in played.summary()


def test_words_come_at_the_rate_of_speech_at_any_speed(model):
    """Half a second of the clip from word to word; one that waited in seconds of its clock, not of the wall, would say
    one word where four are due, and then all of them at once."""
    live = LiveSession(
        model, TOKENIZER, CompilerConfig(tokens_per_second=2.0), config=LiveConfig(slot_tokens=7), speed=4.0,
        generation=GenerationConfig(temperature=8.0, seed=1),
    )  # fmt: skip
    live.frame(torch.zeros(3, SIZE, SIZE, dtype=torch.uint8), 0.0)
    live.finish()
    assert live.figures.tokens >= 6  # of 7; the model draws almost evenly from a thousand
    assert live.figures.between_tokens_s.percentile(0.5) == pytest.approx(0.5, abs=0.3)


def test_dropped_frames_stay_silent(model):
    """All frames come at once while only two may wait."""
    at_once = [LiveEvent(Step(0.001 * n, math.inf, None), event.picture) for n, event in enumerate(events()) if n > 1]
    at_once = [event for event in at_once if event.picture is not None]
    played = play_live(session(model, waiting_frames=2), at_once, LivePrinter(Console(file=io.StringIO()), TOKENIZER))
    assert played.figures.dropped + played.figures.seen == len(at_once) == len(played.outputs)
    assert played.figures.dropped >= 1
    assert played.outputs[0].state == "silence"


class Scripted:
    """A session that puts out what it is told to."""

    figures = None

    def __init__(self, said: list[Said]):
        self._said, self._over = said, threading.Event()

    def now_s(self) -> float:
        return math.inf

    def frame(self, picture: object, time_s: float) -> None: ...

    def ask(self, text: str) -> None: ...

    def finish(self) -> None:
        self._over.set()

    def said(self) -> Iterator[Said]:
        """Once all was handed over."""
        assert self._over.wait(10.0)
        yield from self._said


def test_what_was_heard_is_in_the_order_of_reading():
    """A prompt is read late, after one more token of the reply it cuts and before a frame that was shown earlier; a
    frame comes between two tokens."""
    words = [TOKENIZER.encode(text)[0] for text in (" red", " blue", " two", " one")]

    def token(time_s: float, word: int, starts: bool = False) -> Said:
        return Said("token", time_s, 1, words[word], starts=starts)

    script = [
        Said("frame", 0.0, 1, read_s=0.1), token(0.1, 0, True), token(1.2, 1),
        Said("turn", 1.3, 1, text="How many?", read_s=1.3), token(1.3, 2, True),
        Said("frame", 1.0, 2, read_s=1.4), Said("frame", 2.0, 3, read_s=2.05), token(2.1, 3),
        Said("frame", 3.0, 4, read_s=3.05), Said("silence", 3.05, 4, ends=True),
    ]  # fmt: skip
    steps = [Step(0.0, 1.0, None), Step(1.0, 1.1, None), Step(1.1, 2.0, "How many?"), Step(2.0, 3.0, None)]
    steps.append(Step(3.0, 4.0, None))
    text = io.StringIO()
    printer = LivePrinter(Console(file=text, width=1000, highlight=False), TOKENIZER)
    handed_over = [LiveEvent(step, None if step.user else torch.zeros(0)) for step in steps]
    played = play_live(Scripted(script), handed_over, printer)
    assert [line.split() for line in text.getvalue().splitlines()] == [
        "0.0 s model red blue".split(),
        "1.1 s user How many?".split(),
        "1.1 s model two one".split(),
        "3.0 s ·".split(),
    ]
    heard, outputs, times_s = played.as_heard()
    assert [step.time_s for step in heard] == [0.1, 1.3, 2.05, 3.05]
    events = captions_of(heard, outputs, TOKENIZER, 8.0, times_s)
    assert [(event.time_s, event.kind, event.text) for event in events] == [
        (0.1, "text", " red"), (1.2, "text", " blue"), (1.3, "user", "How many?"), (1.3, "text", " two"),
        (2.1, "text", " one"), (3.05, "silence", ""),
    ]  # fmt: skip


class Rude(LivePrinter):
    def token(self, step, token):
        raise BrokenPipeError("nobody reads")


def test_errors_and_the_end_key_end_it(model):
    with pytest.raises(BrokenPipeError, match="nobody reads"):
        play_live(session(model), events(40, 0.5), Rude(Console(file=io.StringIO()), TOKENIZER), SPEED)
    wrong = [*events(2), LiveEvent(Step(1.5, 2.0, None), torch.zeros(4, 4))]
    with pytest.raises(RuntimeError, match="the live session broke: a tensor must be uint8"):
        play_live(session(model), wrong, LivePrinter(Console(file=io.StringIO()), TOKENIZER), SPEED)

    def pressed():
        yield from events(3)
        raise KeyboardInterrupt

    played = play_live(session(model), pressed(), LivePrinter(Console(file=io.StringIO()), TOKENIZER), SPEED)
    assert len(played.steps) == 4
