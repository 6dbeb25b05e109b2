"""A live session that is played to: what is said stands at the event after which it was said."""

import io
import math
import time

import pytest
import torch
from rich.console import Console
from scripted_model import shipped_tokenizer
from tiny_live_model import SIZE, live_model

from moss_train.evaluate.live import LivePrinter
from moss_train.evaluate.play_live import LiveEvent, play_live
from moss_train.evaluate.sampling import GenerationConfig
from moss_train.evaluate.schedule import Step
from moss_train.evaluate.stream import LiveConfig, LiveSession
from moss_train.parallel import groups
from moss_train.streams.config import CompilerConfig

TOKENIZER = shipped_tokenizer()
SPEED = 20.0


@pytest.fixture(scope="module")
def model():
    yield live_model(TOKENIZER)
    groups.shutdown()


def session(model, **config) -> LiveSession:
    return LiveSession(
        model, TOKENIZER, CompilerConfig(tokens_per_second=6.0), config=LiveConfig(**config),
        generation=GenerationConfig(temperature=3.0, seed=4), clock=lambda: SPEED * time.monotonic(),
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
    spoken_s = [second for times_s in played.token_times_s for second in times_s]
    assert spoken_s == sorted(spoken_s)
    assert played.figures.seen + played.figures.dropped == 8
    for output in played.outputs:
        assert (output.state == "silence") == (not output.ids)
        assert output.ends <= bool(output.ids)
    decided = [output for output in played.outputs if output.silence_probability is not None]
    assert len(decided) >= 2 and all(0 <= output.silence_probability <= 1 for output in decided)
    lines = text.getvalue()
    assert "user  What is it?" in lines and "model" in lines
    assert "8 frames" in played.summary() and "between tokens" in played.summary()


def test_dropped_frames_stay_silent(model):
    """All frames come at once while only two may wait."""
    at_once = [LiveEvent(Step(0.001 * n, math.inf, None), event.picture) for n, event in enumerate(events()) if n > 1]
    at_once = [event for event in at_once if event.picture is not None]
    played = play_live(session(model, waiting_frames=2), at_once, LivePrinter(Console(file=io.StringIO()), TOKENIZER))
    assert played.figures.dropped + played.figures.seen == len(at_once) == len(played.outputs)
    assert played.figures.dropped >= 1
    assert played.outputs[0].state == "silence"


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
