"""The decoder's row is the compiler's row when the model says what the reference says."""

import numpy as np
import pytest
import torch
from scripted_model import ScriptedModel, compiled_stream, shipped_tokenizer, world_stream

from moss_train.evaluate.config import DecodeConfig
from moss_train.evaluate.decoder import StreamingDecoder, most_tokens
from moss_train.evaluate.schedule import read_stream
from moss_train.streams.config import CompilerConfig, TokenizerConfig
from moss_train.streams.tokenizer import load_tokenizer

TOKENIZER = shipped_tokenizer()


def decode(model, read, config, decode_config=None, on_token=None, tokenizer=TOKENIZER):
    """Runs all streams to their end; returns the outputs of each row in order."""
    schedules = [schedule for schedule, _ in read]
    decode_config = decode_config or DecodeConfig()
    decoder = StreamingDecoder(
        model,
        tokenizer,
        config,
        [schedule.system for schedule in schedules],
        max(most_tokens(schedule, tokenizer, config, decode_config) for schedule in schedules),
        max(schedule.frames for schedule in schedules),
        decode_config,
    )
    outputs = [[] for _ in schedules]
    shown = [0] * len(schedules)
    for index in range(max(len(schedule.steps) for schedule in schedules)):
        steps = {row: s.steps[index] for row, s in enumerate(schedules) if index < len(s.steps)}
        pictures = {}
        for row, step in steps.items():
            if step.user is None:
                pictures[row] = torch.full((3, 4, 4), shown[row], dtype=torch.uint8)
                shown[row] += 1
        for row, output in decoder.step(steps, pictures, on_token).items():
            outputs[row].append(output)
    return outputs


def check_against_reference(streams, config, outputs, model):
    for (_, compiled), said in zip(streams, outputs, strict=True):
        for slot, output in zip(compiled.slots, said, strict=True):
            assert output.state == ("silence" if slot.note == "blocked" else slot.state)
            assert (output.silence_probability is None) == (slot.note == "blocked")
            assert TOKENIZER.decode(output.ids) == slot.text
            assert output.ends == slot.ends
    for row, (_, compiled) in enumerate(streams):
        # all but what follows the last prediction was fed: the last silence and the end of the turn
        assert model.fed[row] >= len(compiled.ids) - 2


@pytest.mark.parametrize("tokens_per_second", [2.0, 3.5, 38.0])
@pytest.mark.parametrize(
    ("window", "sinks", "perceive"), [(None, 0, "overlapped"), (3, 1, "overlapped"), (3, 1, "blocked")]
)
def test_row_equals_the_compiled_row(tokens_per_second, window, sinks, perceive):
    config = CompilerConfig(tokens_per_second=tokens_per_second, window=window, sinks=sinks, perceive=perceive)
    streams = []
    for seed in range(14):
        try:
            streams.append(world_stream(TOKENIZER, config, seed))
        except Exception as error:  # a slow speaker cannot say everything in time: not this test's business
            assert "one reply at a time" in str(error)
    assert len(streams) > 7
    model = ScriptedModel([compiled for _, compiled in streams], TOKENIZER)
    read = [read_stream(sample, compiled, config, TOKENIZER) for sample, compiled in streams]
    check_against_reference(streams, config, decode(model, read, config), model)


def test_reply_over_several_slots_is_cut_by_the_user():
    config = CompilerConfig(tokens_per_second=3.0)
    streams = [world_stream(TOKENIZER, config, seed, "interruption") for seed in range(3)]
    for _, compiled in streams:
        assert any(slot.state == "continue" for slot in compiled.slots) or any(
            slot.state == "speak" and not slot.ends for slot in compiled.slots
        )
    model = ScriptedModel([compiled for _, compiled in streams], TOKENIZER)
    read = [read_stream(sample, compiled, config, TOKENIZER) for sample, compiled in streams]
    check_against_reference(streams, config, decode(model, read, config), model)


def test_a_cut_reply_leaves_its_frames_undecided_where_they_are_blocked():
    config = CompilerConfig(tokens_per_second=3.0, perceive="blocked")
    streams = [world_stream(TOKENIZER, config, seed, "interruption") for seed in range(8)]
    assert any(
        slot.note == "blocked" and slot.time_s < compiled.slots[i + 1].time_s
        for _, compiled in streams
        for i, slot in enumerate(compiled.slots[:-1])
    )
    for _, compiled in streams:
        assert not any(slot.state == "continue" for slot in compiled.slots)
    model = ScriptedModel([compiled for _, compiled in streams], TOKENIZER)
    read = [read_stream(sample, compiled, config, TOKENIZER) for sample, compiled in streams]
    check_against_reference(streams, config, decode(model, read, config), model)


def test_thoughts_are_fed_and_not_said():
    tokenizer = load_tokenizer(TokenizerConfig(think_tokens=True))
    config = CompilerConfig(tokens_per_second=4.0)
    events = [
        {"id": "u1", "t": 0.0, "role": "user", "text": "Tell me."},
        {"id": "t1", "t": 1.0, "role": "assistant", "kind": "think", "text": "red block, left"},
        {"id": "t2", "t": 2.0, "role": "assistant", "kind": "think", "text": ""},
        {
            "id": "b1",
            "t": 2.0,
            "role": "assistant",
            "kind": "speak",
            "text": "A red block is on the left.",
            "reply_to": "u1",
        },
        {"id": "t3", "t": 3.0, "role": "assistant", "kind": "think", "text": "still red"},
    ]
    sample = {
        "schema": "moss_train/stream@1",
        "id": "thoughtful",
        "media": [{"id": "v", "kind": "video", "member": "mp4", "duration_s": 7.0}],
        "sampling": {"start_s": 0.0, "end_s": 7.0},
        "events": events,
    }
    streams = [compiled_stream(sample, tokenizer, config)]
    read = [read_stream(parsed, compiled, config, tokenizer) for parsed, compiled in streams]
    for threshold in (None, 0.1):
        model = ScriptedModel([compiled for _, compiled in streams], tokenizer)
        (said,) = outputs = decode(model, read, config, DecodeConfig(speak_threshold=threshold), tokenizer=tokenizer)
        check_against_reference(streams, config, outputs, model)
        assert "".join(tokenizer.decode(output.ids) for output in said) == "A red block is on the left."
    # a model that never ends its thought is held to a length
    babbling = ScriptedModel([compiled for _, compiled in streams], tokenizer, off_script=True)
    babbling.babble = tokenizer.special.think_start
    decode(babbling, read, config, DecodeConfig(think_tokens=3), tokenizer=tokenizer)
    assert babbling.fed[0] <= babbling.max_tokens


def test_turns_at_odd_moments():
    """Two turns before the first frame, a turn at the very time of a frame, one after the last frame."""
    config = CompilerConfig(tokens_per_second=4.0)
    events = [
        {"id": "u1", "t": 0.0, "role": "user", "text": "Hello."},
        {"id": "u2", "t": 0.0, "role": "user", "text": "Are you there?"},
        {"id": "b1", "t": 0.0, "role": "assistant", "kind": "speak", "evidence": [], "text": "Yes.", "reply_to": "u2"},
        {"id": "u3", "t": 2.0, "role": "user", "text": "What now?"},
        {"id": "b2", "t": 3.0, "role": "assistant", "kind": "speak", "text": "Nothing.", "reply_to": "u3"},
        {"id": "u4", "t": 4.5, "role": "user", "kind": "interrupt", "text": "And now?"},
        {
            "id": "b3",
            "t": 4.5,
            "role": "assistant",
            "kind": "speak",
            "text": "The clip is over and I talk on for as long as I like.",
            "reply_to": "u4",
        },
    ]
    sample = {
        "schema": "moss_train/stream@1",
        "id": "odd",
        "media": [{"id": "v", "kind": "video", "member": "mp4", "duration_s": 5.0}],
        "sampling": {"start_s": 0.0, "end_s": 5.0},
        "events": events,
    }
    streams = [compiled_stream(sample, TOKENIZER, config)]
    model = ScriptedModel([compiled for _, compiled in streams], TOKENIZER)
    read = [read_stream(parsed, compiled, config, TOKENIZER) for parsed, compiled in streams]
    check_against_reference(streams, config, decode(model, read, config), model)


def test_a_model_that_never_stops_is_held_to_its_rate_of_speech():
    config = CompilerConfig(tokens_per_second=3.0)
    streams = [world_stream(TOKENIZER, config, seed, "silent") for seed in range(2)]
    read = [read_stream(sample, compiled, config, TOKENIZER) for sample, compiled in streams]
    model = ScriptedModel([compiled for _, compiled in streams], TOKENIZER, off_script=True)
    heard = []
    outputs = decode(model, read, config, DecodeConfig(last_slot_tokens=5), lambda row, token: heard.append(token))
    for said in outputs:
        assert [len(output.ids) for output in said] == [1, 2] + [3] * 10 + [5]  # the opening slot lasts no time
        assert [output.state for output in said] == ["speak"] + ["continue"] * 12
        assert not any(output.ends for output in said)
    assert set(heard) == {model.babble}
    assert len(heard) == sum(len(output.ids) for said in outputs for output in said)


def test_special_tokens_are_never_said_and_silence_is_measured():
    config = CompilerConfig(tokens_per_second=8.0)
    sample, compiled = world_stream(TOKENIZER, config, 1, "before")
    model = ScriptedModel([compiled], TOKENIZER)  # its favourite token is always the end of the turn
    (said,) = decode(model, [read_stream(sample, compiled, config, TOKENIZER)], config)
    special = TOKENIZER.special
    assert not {special.end_of_turn, special.anchor, special.silence} & {t for output in said for t in output.ids}
    legal = TOKENIZER.vocabulary_size - 7  # every special role but silence, less the anchor and those without a row
    expected = np.exp(5) / (np.exp(5) + legal)
    for output in said:
        if output.state == "silence":
            assert output.silence_probability == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("threshold", "speaks"), [(None, False), (0.05, False), (0.99, True)])
def test_threshold_on_silence(threshold, speaks):
    config = CompilerConfig(tokens_per_second=8.0)
    sample, compiled = world_stream(TOKENIZER, config, 1, "silent")
    read = [read_stream(sample, compiled, config, TOKENIZER)]
    model = ScriptedModel([compiled], TOKENIZER, off_script=True)
    model.babble = TOKENIZER.special.silence  # always silence, with P about 0.12 to 0.2
    (said,) = decode(model, read, config, DecodeConfig(speak_threshold=threshold))
    assert all((output.state != "silence") == speaks for output in said)


def test_silent_slots_cost_one_call_each():
    config = CompilerConfig(tokens_per_second=8.0)
    sample, compiled = world_stream(TOKENIZER, config, 1, "silent")
    model = ScriptedModel([compiled], TOKENIZER)
    decode(model, [read_stream(sample, compiled, config, TOKENIZER)], config)
    assert model.extend_calls == len(compiled.slots)
