"""Streams cut into parts that fit a row: what each part holds, and what all of them together do."""

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stream_cases import compiled, layout, parts_of, say, stream, tokenizer, user
from stream_strategies import CONFIGS, compiled_or_refused, streams

from moss_train.errors import SampleError
from moss_train.streams import split
from moss_train.streams.compiled import IGNORED_LABEL, Kind
from moss_train.streams.config import AugmentationConfig, CompilerConfig
from moss_train.streams.split import RowBudget
from moss_train.streams.stream_rows import write_stream

LONG_STREAMS = streams(ends_s=(4.0, 9.5, 30.0), most_events=12)
BUDGETS = st.builds(RowBudget, st.sampled_from([40, 70, 120, 5000]), st.sampled_from([1, 3, 8, 5000]))


def taught(rows) -> list[tuple[int, int, float]]:
    """(label, kind, weight) of every trained position, in order."""
    return [
        (int(row.labels[t]), int(row.kinds[t]), float(row.weights[t]))
        for row in rows
        for t in np.flatnonzero(row.labels != IGNORED_LABEL)
    ]


def equal(first, second) -> bool:
    """Whether two compiled streams are the same in every field."""
    return all(
        np.array_equal(getattr(first, field.name), getattr(second, field.name))
        if isinstance(getattr(first, field.name), np.ndarray)
        else getattr(first, field.name) == getattr(second, field.name)
        for field in dataclasses.fields(first)
    )


def parts_or_refused(data, budget, config, seed=0):
    """The parts, or nothing where one slot alone is more than the budget."""
    try:
        return parts_of(data, budget, config, np.random.default_rng(seed))
    except SampleError as error:
        assert f"a row of {budget.max_tokens} tokens" in error.reason
        assume(False)


@settings(max_examples=60, deadline=None)
@given(LONG_STREAMS, CONFIGS, BUDGETS)
def test_every_label_is_trained_once_and_every_part_fits(data, config, budget):
    whole = compiled_or_refused(data, config, seed=1)
    parts = parts_or_refused(data, budget, config, seed=1)
    if config.jitter_probability == 0.0:
        assert taught(parts) == taught([whole])
    else:  # the frame that opens a part cannot arrive before the part; the labels are the same, some in another order
        assert sorted(taught(parts)) == sorted(taught([whole]))
    assert [part.part for part in parts] == list(range(len(parts)))
    for part in parts:
        assert len(part.ids) <= budget.max_tokens and len(part.frames) <= budget.max_frames
    if len(whole.ids) <= budget.max_tokens and len(whole.frames) <= budget.max_frames:
        assert len(parts) == 1 and equal(parts[0], whole)


@settings(max_examples=60, deadline=None)
@given(LONG_STREAMS, CONFIGS, BUDGETS)
def test_a_part_sees_its_own_frames_and_none_before_it_arrives(data, config, budget):
    whole = compiled_or_refused(data, config)
    parts = parts_or_refused(data, budget, config)
    assert tuple(frame for part in parts for frame in part.frames) == whole.frames
    anchor = tokenizer().special.anchor
    for part in parts:
        is_anchor = part.ids == anchor
        assert part.visible_hi.tolist() == np.cumsum(is_anchor).tolist()
        assert part.visible_hi[-1] == len(part.frames) and (part.visible_lo <= part.visible_hi).all()
        assert part.frame_positions.tolist() == np.flatnonzero(is_anchor).tolist()
        assert part.positions.tolist() == list(range(len(part.ids)))
        if config.window:
            assert (part.visible_hi - part.visible_lo).max() <= config.window
        if part.part:  # a later part opens with the dialogue, which is not trained, and then a frame
            assert (part.labels[: part.frame_positions[0]] == IGNORED_LABEL).all()
            assert part.slots[0].frame == 0


@settings(max_examples=40, deadline=None)
@given(LONG_STREAMS, CONFIGS, BUDGETS)
def test_the_slots_of_the_parts_tile_those_of_the_whole(data, config, budget):
    config.jitter_probability = 0.0
    whole = compiled_or_refused(data, config)
    parts = parts_or_refused(data, budget, config)
    tiled, frames = [], 0
    for part in parts:
        for slot in part.slots:
            said = part.labels[slot.position]
            assert said == whole.labels[whole.slots[len(tiled)].position]
            frame = slot.frame + frames if slot.frame >= 0 else -1
            tiled.append(dataclasses.replace(slot, frame=frame, position=whole.slots[len(tiled)].position))
        frames += len(part.frames)
    assert tuple(tiled) == whole.slots


@settings(max_examples=60, deadline=None)
@given(LONG_STREAMS, CONFIGS, BUDGETS, st.integers(0, 5))
def test_lengths_do_not_depend_on_the_generator(data, config, budget, seed):
    compiled_or_refused(data, config)
    drawn, still = parts_or_refused(data, budget, config, seed), parts_of(data, budget, config)
    assert [(len(part.ids), part.frames) for part in drawn] == [(len(part.ids), part.frames) for part in still]
    again = parts_or_refused(data, budget, config, seed)
    assert all(equal(first, second) for first, second in zip(drawn, again, strict=True))


@pytest.mark.parametrize("variation", [None, 3])
def test_every_row_is_written_once(variation, monkeypatch):
    turns = [event for t in range(0, 40, 4) for event in (user(t + 0.5, f"Q{t}?"), say(t + 1.0, f"A{t}."))]
    written = []

    def counted(plan, *arguments):
        written.append(arguments)
        return write_stream(plan, *arguments)

    monkeypatch.setattr(split, "write_stream", counted)
    config = CompilerConfig(augment=AugmentationConfig(corruption=1.0, variants=1))
    parts = parts_of(stream(*turns, end_s=40.0), RowBudget(120, 12), config, np.random.default_rng(0), variation)
    assert len(parts) > 2 and len(written) == len(parts)


def test_a_part_goes_on_with_the_dialogue_so_far():
    data = stream(say(1.0, "Red."), user(3.5, "And now?"), say(4.0, "Blue."), end_s=8.0)
    first, second, third = parts_of(data, RowBudget(200, 3))
    assert layout(first) == "U: A _ #_ #Red._ #_"
    # what was said is repeated, idle silences and frames are not
    assert layout(second) == "U: A Red._ #_ | U:And now? A _ #Blue._ #_"
    assert layout(third) == "U: A Red._ | U:And now? A Blue._ #_ #_ |"
    assert [request.time_s for request in third.frames] == [6.0, 7.0]
    assert taught([third]) == [(tokenizer().special.silence, int(Kind.IDLE_SILENCE), 1.0)] * 2


def test_a_cut_waits_for_no_reply_where_it_can():
    words = say(2.0, "abcdefg", chunks=[[2.0 + index, letter] for index, letter in enumerate("abcdefg")])
    data = stream(words, end_s=12.0)
    # frames 0-3 fit, but "a" starts at frame 2 and runs on: the cut stands before it
    first, second, third = parts_of(data, RowBudget(200, 4))[:3]
    assert layout(first) == "U: A _ #_ #_"
    # no cut is free inside the reply: the part is as long as it can be, and the next goes on in mid reply
    assert layout(second) == "U: A  #a #b #c #d"
    assert layout(third) == "U: A abcd #e #f #g_ #_"
    assert third.slots[0].state == "continue" and second.slots[0].state == "speak"


def test_old_dialogue_is_dropped_whole():
    turns = [event for t in range(0, 60, 2) for event in (user(t + 0.5, f"Q{t}?"), say(t + 1.0, f"A{t}."))]
    data = stream(*turns, end_s=60.0, system="Look.")
    parts = parts_of(data, RowBudget(160, 100))
    last = layout(parts[-1]).replace("<|start_header_id|>system<|end_header_id|>\n\nLook. | ", "")
    dialogue = last.partition("#")[0]
    assert len(parts) > 3 and dialogue.startswith("U:") and len(dialogue) > 10
    turns_heard = dialogue.removeprefix("U:").split("| U:")
    for turn in turns_heard[:-1]:
        question, _, answer = turn.partition(" A ")
        assert answer.strip().removesuffix("_") == question.replace("Q", "A").replace("?", ".")
    begins = int(np.flatnonzero(parts[-1].ids == tokenizer().special.anchor)[0])
    system = len(tokenizer().encode("\n\nLook.")) + 5
    assert begins <= system + 160 // 4


def test_running_commentary_in_one_turn_keeps_its_latest_words():
    events = [say(float(t), f"Sentence number {t}.") for t in range(0, 300, 3)]
    parts = parts_of(stream(*events, end_s=300.0), RowBudget(200, 64))
    assert len(parts) > 5
    for part in parts[1:]:
        opening = layout(part).partition("#")[0]
        assert opening.startswith("U: A Sentence number")
        latest = float(opening.rsplit("number ", 1)[1].split(".")[0])
        assert latest + 3 >= part.frames[0].time_s > latest


def test_longer_than_the_compiler_allows_is_split_and_not_refused():
    data = stream(say(400.0, "Late."), end_s=600.0)
    config = CompilerConfig(max_frames=256)
    with pytest.raises(SampleError, match="data.over_budget=split"):
        parts_of(data, None, config)
    parts = parts_of(data, RowBudget(100_000, 100_000), config)
    assert [len(part.frames) for part in parts] == [256, 256, 88]


def test_what_cannot_fit_is_refused():
    data = stream(say(2.0, "word " * 60), end_s=8.0)
    with pytest.raises(SampleError, match=r"the frame at 2.0 s .* a row of 30 tokens and 10 frames") as caught:
        parts_of(data, RowBudget(30, 10), CompilerConfig(tokens_per_second=1000.0))
    assert "data.pack_text_tokens" in caught.value.reason
    with pytest.raises(SampleError, match="the limit of 262144"):
        parts_of(stream(end_s=80_000.0, sampling={"fps": 900.0, "end_s": 80_000.0}), RowBudget(100, 10))


def test_other_kinds_come_whole():
    caption = {
        "schema": "moss_train/caption@1",
        "id": "c",
        "media": [{"id": "v0", "kind": "video", "member": "mp4"}],
        "text": "A long text. " * 20,
    }
    (row,) = parts_of(caption, RowBudget(10, 2))
    assert equal(row, compiled(caption, duration_s=86_400.0)) and len(row.ids) > 10
