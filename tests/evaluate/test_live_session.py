"""Frames in, prompts in, tokens out: the rules of the row, the threads, the queues."""

import gc
import queue
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scripted_model import ScriptedModel, compiled_stream, shipped_tokenizer, world_stream
from small_model import SIZE, small_model

from moss_train.errors import ConfigError
from moss_train.evaluate.sampling import GenerationConfig, Sampler
from moss_train.evaluate.schedule import read_stream
from moss_train.evaluate.stream import LiveConfig, LiveSession, as_frame
from moss_train.parallel import groups
from moss_train.streams.config import CompilerConfig, TokenizerConfig
from moss_train.streams.tokenizer import load_tokenizer

TOKENIZER = shipped_tokenizer()
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def model():
    yield small_model(TOKENIZER, layers=3)
    groups.shutdown()


def picture(number: int) -> torch.Tensor:
    return torch.full((3, 4, 4), number, dtype=torch.uint8)


def logical(model, compiler, config=None, **more) -> LiveSession:
    return LiveSession(model, TOKENIZER, compiler, config=config, image_size=0, threads=False, **more)


def fetched(session) -> list:
    said = []
    while not session.tokens.empty():
        said.append(session.tokens.get())
    return said


@pytest.mark.parametrize("rate", [2.0, 3.5, 38.0])
@pytest.mark.parametrize(
    ("window", "sinks", "perceive"), [(None, 0, "overlapped"), (3, 1, "overlapped"), (3, 1, "blocked")]
)
def test_the_row_is_the_compiled_row(rate, window, sinks, perceive):
    """A model that says what the reference says is fed the compiled stream, and insists on it (scripted_model)."""
    compiler = CompilerConfig(tokens_per_second=rate, window=window, sinks=sinks, perceive=perceive)
    done = 0
    for seed in range(12):
        try:
            sample, compiled = world_stream(TOKENIZER, compiler, seed)
        except Exception as error:  # a slow speaker cannot say everything in time: not this test's business
            assert "one reply at a time" in str(error)
            continue
        schedule, _ = read_stream(sample, compiled, compiler, TOKENIZER)
        scripted = ScriptedModel([compiled], TOKENIZER)
        session = logical(scripted, compiler, LiveConfig(reply_tokens=64), system=sample.system)
        said, shown = [], 0
        for step in schedule.steps:
            if step.user is None:
                session.frame(picture(shown), step.time_s)
                shown += 1
            else:
                session.ask(step.user)
            session.advance(step.time_s)
            said.append([item.token for item in fetched(session) if item.kind == "token"])
        session.finish()
        said.append([item.token for item in fetched(session) if item.kind == "token"])
        # what is said until an event is read belongs to the slot before it; blocked frames are read behind the reply
        assert perceive == "blocked" or [TOKENIZER.decode(ids) for ids in said[1:]] == [
            slot.text for slot in compiled.slots
        ]
        assert "".join(TOKENIZER.decode(ids) for ids in said) == "".join(slot.text for slot in compiled.slots)
        assert scripted.heard[0][: len(compiled.ids) - 2] == compiled.ids[:-2].tolist()
        done += 1
    assert done > 5


def test_a_frame_in_a_reply_is_seen_by_its_later_tokens():
    """Unpaced: the anchor stands between two tokens of the reply, with no silence before it."""
    compiler = CompilerConfig(tokens_per_second=4.0)
    _, compiled = world_stream(TOKENIZER, compiler, 1, "silent")
    scripted = ScriptedModel([compiled], TOKENIZER, off_script=True)  # babbles
    session = logical(scripted, compiler, LiveConfig(reply_tokens=6))
    session.ask("Go on.")
    session.advance(0.0)
    session.advance(0.6)
    session.frame(picture(0))
    session.advance(0.7)
    session.advance(5.0)
    special, babble = TOKENIZER.special, scripted.babble
    after_header = scripted.heard[0][-9:]
    # the token of 0.75 s is not due at 0.7 s; the one after the anchor is due at once, then the rate holds
    assert after_header[-7:] == [babble, babble, special.anchor, babble, babble, babble, babble]
    kinds = [said.kind for said in fetched(session)]
    assert kinds == ["turn", "token", "token", "frame", *["token"] * 4, "silence"], "closed after reply_tokens"


def test_frames_that_wait_for_the_end_of_a_reply_are_bounded():
    compiler = CompilerConfig(tokens_per_second=4.0, perceive="blocked")
    _, compiled = world_stream(TOKENIZER, compiler, 1, "silent")
    scripted = ScriptedModel([compiled], TOKENIZER, off_script=True)  # babbles
    session = logical(scripted, compiler, LiveConfig(reply_tokens=6, slot_tokens=6, held_frames=3))
    session.ask("Go on.")
    session.advance(0.0)
    for number in range(1, 9):
        session.frame(picture(number), number / 10)
        session.advance(number / 10)
    assert session.figures.seen == 0, "the reply still goes on"
    session.advance(1.5)
    shown = [said.time_s for said in fetched(session) if said.kind == "frame"]
    assert shown == [0.6, 0.7, 0.8], "the latest stay"
    figures = session.figures.to_json()
    assert (figures["frames"], figures["held_dropped"], figures["dropped"], figures["seen"]) == (8, 5, 0, 3)
    assert "5 frames were dropped that had waited for the end of a reply" in session.figures.summary()
    with pytest.raises(ConfigError, match="live.held_frames=0: must be at least 1"):
        LiveConfig(held_frames=0).validate()


def test_prompts_interrupt_and_caches_stay(model):
    compiler = CompilerConfig(tokens_per_second=4.0)
    _, compiled = world_stream(TOKENIZER, compiler, 1, "silent")
    scripted = ScriptedModel([compiled], TOKENIZER, off_script=True)
    session = logical(scripted, compiler, LiveConfig(silence_after_prompt=False))
    session.frame(picture(0))
    session.advance(0.0)
    session.ask("Stop. What is it?")
    session.advance(1.1)
    heard, special = scripted.heard[0], TOKENIZER.special
    cut = heard.index(special.end_of_turn, heard.index(special.anchor))
    assert heard[cut - 1] == scripted.babble and heard[cut + 1] == special.start_header
    assert TOKENIZER.decode(heard[cut:]).count("Stop. What is it?") == 1
    forced = ScriptedModel([compiled], TOKENIZER, off_script=True)
    session = logical(forced, compiler, LiveConfig(silence_after_prompt=True))
    session.ask("And now?")
    session.advance(0.0)
    session.advance(2.0)
    assert [said.kind for said in fetched(session)] == ["turn", "silence"]
    session.frame(picture(0))
    session.advance(2.0)
    assert forced.heard[0][-2:] == [special.silence, special.anchor]


events = st.lists(
    st.tuples(
        st.lists(st.sampled_from(["What?", "Where?", "Stop."]), max_size=3),
        st.lists(st.integers(0, 3), max_size=4),  # time stamps of frames, in tenths of a second before the tick
        st.randoms(use_true_random=False),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=25, deadline=None)
@given(events)
def test_the_order_of_arrival_within_a_tick_changes_nothing(ticks):
    """Prompts keep their order, frames are sorted by time stamp; how the two queues interleave does not matter, nor in
    which order frames of different time stamps come. Frames of one time stamp keep their order."""
    compiler = CompilerConfig(tokens_per_second=4.0)
    heard, said = [], []
    for shuffled in (False, True):
        scripted = ScriptedModel([world_stream(TOKENIZER, compiler, 1, "silent")[1]], TOKENIZER, off_script=True)
        pictures = []
        scripted.add_frames = lambda state, frames, rows, at, seen=pictures: seen.append(
            [(int(x.flatten()[0]), int(p)) for x, p in zip(frames, at, strict=True)]
        )
        session = logical(scripted, compiler)
        for number, (prompts, stamps, random) in enumerate(ticks):
            frames = sorted(range(len(stamps)), key=lambda f: (-stamps[f], f))  # by time stamp
            calls = [("ask", prompt) for prompt in prompts] + [("frame", f) for f in frames]
            if shuffled:
                order = list(frames)
                random.shuffle(order)
                order = [f for f in order if stamps.count(stamps[f]) == 1] + [
                    f for f in frames if stamps.count(stamps[f]) > 1
                ]
                calls, left = [], [[("ask", prompt) for prompt in prompts], [("frame", f) for f in order]]
                while left[0] or left[1]:
                    calls.append(left[random.randrange(2) if left[0] and left[1] else 0 if left[0] else 1].pop(0))
            for kind, what in calls:
                if kind == "ask":
                    session.ask(what)
                else:
                    session.frame(picture(what), number - stamps[what] / 10)
            session.advance(float(number))
        heard.append((scripted.heard[0], pictures))
        said.append(fetched(session))
    assert heard[0] == heard[1]
    assert said[0] == said[1]


def test_thoughts_are_fed_and_not_put_out():
    tokenizer = load_tokenizer(TokenizerConfig(think_tokens=True))
    compiler = CompilerConfig(tokens_per_second=9.0)
    answer = "A red block."
    events = [
        {"id": "u", "t": 0.0, "role": "user", "text": "Tell me."},
        {"id": "t1", "t": 1.0, "role": "assistant", "kind": "think", "text": "red block, left"},
        {"id": "t2", "t": 2.0, "role": "assistant", "kind": "think", "text": ""},
        {"id": "b", "t": 2.0, "role": "assistant", "kind": "speak", "text": answer, "reply_to": "u"},
    ]
    sample = {
        "schema": "moss_train/stream@1",
        "id": "thoughtful",
        "media": [{"id": "v", "kind": "video", "member": "mp4", "duration_s": 6.0}],
        "sampling": {"start_s": 0.0, "end_s": 6.0},
        "events": events,
    }
    parsed, compiled = compiled_stream(sample, tokenizer, compiler)
    scripted = ScriptedModel([compiled], tokenizer)
    session = LiveSession(scripted, tokenizer, compiler, parsed.system, image_size=0, threads=False)
    session.ask("Tell me.")
    session.advance(0.0)
    for second in range(6):
        session.frame(picture(second))
        session.advance(float(second))
    session.finish()
    assert "".join(said.text for said in fetched(session) if said.kind == "token") == answer
    assert tokenizer.special.think_start in scripted.heard[0]


def test_events_of_one_tick_are_read_in_one_step():
    compiler = CompilerConfig(tokens_per_second=4.0)
    scripted = ScriptedModel([world_stream(TOKENIZER, compiler, 1, "silent")[1]], TOKENIZER, off_script=True)
    scripted.babble = special_silence = TOKENIZER.special.silence
    session = logical(scripted, compiler)
    for number in range(3):
        session.frame(picture(number))
    session.ask("What?")
    session.advance(1.0)
    assert scripted.extend_calls == 1 and scripted.frames == [3]
    anchor = TOKENIZER.special.anchor
    assert scripted.heard[0][-6:] == [special_silence, anchor, special_silence, anchor, special_silence, anchor]
    session.advance(50.0)  # silence is a pause: nothing is fed until something comes
    assert scripted.extend_calls == 1


class SlowModel:
    """Every step of the real model waits until it may go on."""

    def __init__(self, model):
        self._model = model
        self.may_go, self.steps = threading.Event(), 0

    def __getattr__(self, name):
        return getattr(self._model, name)

    def extend(self, *arguments, **options):
        self.steps += 1
        assert self.may_go.wait(PATIENCE_S)
        return self._model.extend(*arguments, **options)


def until(condition) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)


def test_perception_goes_on_while_speech_is_busy_and_the_oldest_frames_are_dropped(model):
    slow = SlowModel(model)
    compiler = CompilerConfig(tokens_per_second=50.0)
    rng = np.random.default_rng(0)
    with LiveSession(slow, TOKENIZER, compiler, config=LiveConfig(waiting_frames=3)) as session:
        session.ask("What do you see?")
        until(lambda: slow.steps == 1)  # speech hangs in its first step
        for number in range(9):
            session.frame(Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)), float(number))
            until(lambda done=number + 1: session.figures.encode_s.count == done)
        assert session.figures.dropped == 6
        slow.may_go.set()
        session.finish(PATIENCE_S)
        assert session.figures.seen == 3 and session.figures.frames == 9
        kinds = [said.kind for said in session.said(1.0)]
    assert kinds[0] == "turn" and kinds[-1] == "silence"
    figures = session.figures.to_json()
    assert figures["lag_s.max"] > 0 and figures["prompts"] == 1
    assert "6 frames were dropped" in session.figures.summary()
    with pytest.raises(RuntimeError, match="the session is over"):
        session.ask("Still there?")


def test_stop_breaks_off_and_a_listener_hears_the_end(model):
    compiler = CompilerConfig(tokens_per_second=1000.0)
    talker = SlowModel(model)
    talker.may_go.set()
    chatty = CompilerConfig(tokens_per_second=1000.0)
    session = LiveSession(
        talker, TOKENIZER, chatty, config=LiveConfig(paced=False), generation=GenerationConfig(temperature=5.0, seed=1)
    )
    heard = []
    listener = threading.Thread(target=lambda: heard.extend(session.said()))
    listener.start()
    session.ask("Talk.")
    until(lambda: len(heard) > 3)
    session.stop()
    listener.join(PATIENCE_S)
    assert not listener.is_alive() and heard[0].text == "Talk."
    session.stop()  # a second time does nothing
    assert list(session.said()) == []  # who asks again hears at once that it is over
    brief = LiveSession(talker, TOKENIZER, chatty, config=LiveConfig(slot_tokens=3), threads=False)
    brief.ask("Talk.")
    brief.advance(0.0)
    brief.finish()
    assert sum(said.kind == "token" for said in fetched(brief)) <= 3
    unread = LiveSession(talker, TOKENIZER, chatty, config=LiveConfig(slot_tokens=3), threads=False)
    unread.ask("Talk.")
    unread.finish()  # reads what waits
    assert fetched(unread)[0].text == "Talk."
    full = LiveSession(talker, TOKENIZER, compiler, config=LiveConfig(waiting_prompts=1), threads=False)
    full.ask("One.")
    with pytest.raises(queue.Full, match="1 prompts wait"):
        full.ask("Two.")
    with pytest.raises(ValueError, match="paced"):
        LiveSession(talker, TOKENIZER, compiler, config=LiveConfig(paced=False), threads=False).advance(1.0)
    with pytest.raises(ConfigError, match=r"live\.waiting_frames=0"):
        LiveConfig(waiting_frames=0).validate()


def test_an_error_of_a_thread_reaches_the_caller(model):
    for break_it, message in (
        (lambda session: session.frame(np.zeros((4, 4), np.uint8)), r"uint8 \[H, W, 3\]"),
        (lambda session: session.ask(None), "NoneType|encode|str"),
    ):
        session = LiveSession(model, TOKENIZER, CompilerConfig())
        break_it(session)
        with pytest.raises(RuntimeError, match="the live session broke"):
            list(session.said(PATIENCE_S))
        with pytest.raises(RuntimeError, match=message):
            session.frame(picture(0))
        with pytest.raises(RuntimeError):
            session.stop()


def test_a_thread_that_does_not_end_is_told(model):
    slow = SlowModel(model)
    session = LiveSession(slow, TOKENIZER, CompilerConfig())
    session.ask("What do you see?")
    until(lambda: slow.steps == 1)
    with pytest.raises(TimeoutError, match="_speak is still at work"):
        session.stop(0.01)
    slow.may_go.set()
    session.stop(PATIENCE_S)


def live_bytes() -> int:
    """Bytes of all tensors there are."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def test_a_long_stream_takes_constant_memory(model):
    """600 frames and a question now and then, with windows of frames and text: not a byte more after frame 200."""
    compiler = CompilerConfig(tokens_per_second=3.0, window=8, sinks=2, text_window=64, text_sinks=16)
    session = LiveSession(
        model, TOKENIZER, compiler, config=LiveConfig(reply_tokens=8, waiting_tokens=0), threads=False
    )
    rng = np.random.default_rng(0)
    tensors, objects = [], []
    for second in range(600):
        session.frame(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
        if second % 50 == 0:
            session.ask("What is it now?")
        session.advance(float(second))
        fetched(session)
        if second % 200 == 199:
            tensors.append(live_bytes())
            objects.append(len(gc.get_objects()))
    assert len(set(tensors)) == 1
    assert objects[2] - objects[1] < 50  # a list or a dict for every frame would be 200
    assert session.figures.seen == 600 and session.figures.tokens > 20


def test_same_seed_same_tokens_and_pictures_as_in_training(model):
    compiler = CompilerConfig(tokens_per_second=8.0)
    said = {}
    for name, generation in {
        "a": GenerationConfig(temperature=3.0, top_k=40, top_p=0.95, seed=1),
        "b": GenerationConfig(temperature=3.0, top_k=40, top_p=0.95, seed=1),
        "c": GenerationConfig(temperature=3.0, top_k=40, top_p=0.95, seed=2),
    }.items():
        session = LiveSession(model, TOKENIZER, compiler, generation=generation, threads=False)
        for second in range(4):
            session.frame(np.full((SIZE, SIZE, 3), 60 * second, np.uint8))
            session.advance(float(second))
        session.finish()
        said[name] = [item.token for item in fetched(session)]
    assert said["a"] == said["b"] != said["c"]
    wide = np.zeros((10, 20, 3), np.uint8)
    assert as_frame(wide, 28).shape == (3, 28, 28) and as_frame(wide, 0).shape == (3, 10, 20)
    with pytest.raises(ValueError, match=r"uint8 \[3, H, W\]"):
        as_frame(torch.zeros(3, 4, 4), 28)


def test_sampling_keeps_what_it_should():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.15, 0.25, 0.5]]))
    assert Sampler(GenerationConfig())(logits).tolist() == [0, 3]
    for config, expected in (
        (GenerationConfig(temperature=1.0, top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (GenerationConfig(temperature=1.0, top_p=0.74), [2 / 3, 1 / 3, 0, 0]),
        (GenerationConfig(temperature=1.0, top_p=0.01), [1.0, 0, 0, 0]),
        (GenerationConfig(temperature=0.5), [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
    ):
        got = Sampler(config).probabilities(logits)
        torch.testing.assert_close(got[0], torch.tensor(expected))
        torch.testing.assert_close(got[1], torch.tensor(expected).flip(0))
    sampler = Sampler(GenerationConfig(temperature=1.0, seed=3))
    drawn = torch.stack([sampler(logits) for _ in range(2000)])
    assert (drawn[:, 0] == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    for wrong in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            GenerationConfig(**wrong).validate()
