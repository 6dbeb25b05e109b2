"""Corrupted and interrupted streams: always samples like any other, the same from the same seed, learned as meant."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stream_cases import MediaInfo, compiled, confirm, layout, parse_sample, revise, say, stream, tokenizer, user
from stream_strategies import TEXTS, streams

from moss_train.errors import SampleError
from moss_train.streams import augment as augment_module
from moss_train.streams.augment import augment_stream
from moss_train.streams.compiled import IGNORED_LABEL, Kind
from moss_train.streams.compiler import compile_sample
from moss_train.streams.config import AugmentationConfig, CompilerConfig
from moss_train.streams.schema import StreamSample, dump_sample
from moss_train.streams.split import RowBudget, compile_parts

MEDIA = {"v0": MediaInfo(86_400.0, 25.0)}
ANSWERS = stream(
    user(0.0),
    say(1.0, "It is red."),
    revise(5.0, "It is blue.", "e1", evidence=[5.0, 5.0]),
    confirm(8.0, "e2"),
    end_s=11.0,
)


def config_of(**augment) -> CompilerConfig:
    rate = augment.pop("tokens_per_second", 38.0)
    return CompilerConfig(tokens_per_second=rate, augment=AugmentationConfig(**augment))


def varied(data: dict, config: CompilerConfig, seed: int) -> augment_module.Augmented:
    sample = parse_sample(data, "key")
    assert isinstance(sample, StreamSample)
    frames = [slot.time_s for slot in compiled(data, config).slots if slot.frame >= 0]
    return augment_stream(sample, frames, config, tokenizer(), np.random.Generator(np.random.PCG64(seed)))


def row_of(data: dict, config: CompilerConfig, seed: int | None):
    return compile_sample(parse_sample(data, "key"), MEDIA, tokenizer(), config, variation=seed)


def kinds_said(row, name: str) -> set[Kind]:
    """What the tokens of one reply teach, without the silence that ends it."""
    slots = [slot for slot in row.slots if slot.event_id == name]
    kinds = set()
    for slot in slots:
        position = slot.position
        while row.ids[position + 1] not in (tokenizer().special.silence, tokenizer().special.anchor):
            kinds.add(Kind(row.kinds[position]))
            position += 1
    return kinds


def seeds_by(data: dict, config: CompilerConfig, count: int = 40) -> dict[str, int]:
    """Layout → the first seed that gives it."""
    found: dict[str, int] = {}
    for seed in range(count):
        text = layout(row_of(data, config, seed))
        found.setdefault(text[text.index(" A ") + 3 :], seed)
    return found


def test_a_wrong_answer_and_its_correction():
    config = config_of(corruption=1.0, corruption_emptied=0.0, correction=1.0, correction_prefix="No, ")
    found = seeds_by(ANSWERS, config)
    first = "_ #_ #It is blue._ #No, It is red._ #_ #_ #It is blue._ #_ #_ #_ #_ #_ |"
    second = "_ #_ #It is red._ #_ #_ #_ #It is red._ #No, It is blue._ #_ #_ #_ #_ |"
    assert set(found) == {first, second}
    row = row_of(ANSWERS, config, found[first])
    assert kinds_said(row, "e1~wrong") == {Kind.STALE}
    assert kinds_said(row, "e1") == kinds_said(row, "e2") == {Kind.REVISION}
    assert [slot.note for slot in row.slots if slot.note] == ["confirm"]
    # corrected: it departs from the wrong answer; revised later: from the right one
    (one, two) = np.flatnonzero(row.contrasts >= 0)
    text = tokenizer().decode
    assert (text([row.labels[two]]), text([row.contrasts[two]])) == (" blue", "No") or two > one
    assert text([row.contrasts[one]]) == "It"
    # the revision that is wrong leaves the answer before it stale for as long as it did
    late = row_of(ANSWERS, config, found[second])
    assert kinds_said(late, "e2~wrong") == {Kind.STALE} and kinds_said(late, "e1") == {Kind.ONSET, Kind.TEXT}


def test_a_wrong_answer_that_stands():
    config = config_of(corruption=1.0, corruption_emptied=0.0, correction=0.0)
    found = seeds_by(ANSWERS, config)
    first = "_ #_ #It is blue._ #_ #_ #_ #It is blue._ #_ #_ #_ #_ #_ |"
    second = "_ #_ #It is red._ #_ #_ #_ #It is red._ #_ #_ #_ #_ #_ |"
    assert set(found) == {first, second}
    row = row_of(ANSWERS, config, found[first])
    assert kinds_said(row, "e1") == {Kind.STALE} and kinds_said(row, "e2") == {Kind.REVISION}
    assert [slot.time_s for slot in row.slots if slot.note == "stale"] == [2.0, 3.0, 4.0]
    last = row_of(ANSWERS, config, found[second])
    assert [slot.time_s for slot in last.slots if slot.note == "stale"] == [6.0, 7.0, 8.0, 9.0, 10.0]
    assert not [slot for slot in last.slots if slot.note == "confirm"]  # what is wrong cannot be confirmed
    for slot in last.slots:
        if slot.note == "stale":
            assert last.kinds[slot.position] == Kind.STALE and slot.state == "unknown"


def test_an_answer_that_does_not_come():
    late = config_of(corruption=1.0, corruption_emptied=1.0, correction=1.0)
    found = seeds_by(ANSWERS, late)
    first = "_ #_ #_ #It is red._ #_ #_ #It is blue._ #_ #_ #_ #_ #_ |"
    second = "_ #_ #It is red._ #_ #_ #_ #_ #It is blue._ #_ #_ #_ #_ |"
    assert set(found) == {first, second}
    row = row_of(ANSWERS, late, found[first])
    assert [slot.time_s for slot in row.slots if slot.note == "stale"] == [1.0]
    assert kinds_said(row, "e1") == {Kind.ONSET, Kind.TEXT}
    never = config_of(corruption=1.0, corruption_emptied=1.0, correction=0.0)
    # what another answer replaces must have been said, so the first answer comes late
    assert set(seeds_by(ANSWERS, never)) == {first, "_ #_ #It is red._ #_ #_ #_ #_ #_ #_ #_ #_ #_ |"}


def test_given_alternatives_and_streams_that_offer_none():
    lonely = stream(user(0.0), say(1.0, "Red."), end_s=4.0)
    config = config_of(corruption=1.0, corruption_emptied=0.0, correction=0.0)
    assert set(seeds_by(lonely, config)) == {"_ #_ #_ #_ #_ |"}  # nothing else to say: it is left out
    given = config_of(corruption=1.0, corruption_emptied=0.0, correction=0.0, corruption_texts=["Green.", " red. "])
    assert set(seeds_by(lonely, given)) == {"_ #_ #Green._ #_ #_ |"}
    nothing = stream(user(0.0), end_s=4.0)
    assert set(seeds_by(nothing, given)) == {"_ #_ #_ #_ #_ |"}


def test_an_interruption():
    data = stream(user(0.0), say(1.0, "It is red and blue now."), say(6.0, "Gone."), end_s=8.0)
    config = config_of(interruption=1.0, interruption_texts=["Stop.", "Wait."], tokens_per_second=2.0)
    found = seeds_by(data, config)
    texts = {text.split("|")[0] for text in found}  # the user speaks half-way between two frames
    assert texts == {"_ #_ #It ", "_ #_ #It is # red ", "_ #_ #It is # red and # blue "}
    assert all(" U:Stop. A _ #" in text or " U:Wait. A _ #" in text for text in found)
    assert all(" #Gone" in text for text in found)
    for seed in found.values():
        row = row_of(data, config, seed)
        cut = [slot for slot in row.slots if slot.event_id == "e1"]
        assert not cut[-1].ends and cut[-1].note == ""
        header = row.slots[row.slots.index(cut[-1]) + 1]
        assert header.frame == -1 and header.state == "silence"
        assert header.time_s == cut[-1].time_s + 0.5
    quick = config_of(interruption=1.0)
    assert layout(row_of(data, quick, 3)) == layout(compiled(data))  # no reply runs over several frames


def test_how_often_which_of_both():
    data = stream(user(0.0), say(1.0, "It is red and blue now."), say(8.0, "Gone."), end_s=12.0)
    both = config_of(corruption=0.5, corruption_emptied=1.0, correction=0.0, interruption=0.25, tokens_per_second=2.0)
    assert both.augment.varies == pytest.approx(0.625)
    rng = np.random.default_rng(0)
    drawn = [augment_module._draw_kind(both.augment, rng) for _ in range(4000)]
    # P(corrupted | varied) = 0.5 / 0.625, P(interrupted | varied) = 0.25 / 0.625
    assert np.mean([one for one, _ in drawn]) == pytest.approx(0.8, abs=0.03)
    assert np.mean([two for _, two in drawn]) == pytest.approx(0.4, abs=0.03)
    assert all(one or two for one, two in drawn)
    texts = seeds_by(data, both, 60)
    assert any("U:Stop." in text for text in texts) and any("U:Stop." not in text for text in texts)


AUGMENTATIONS = st.builds(
    AugmentationConfig,
    corruption=st.sampled_from([0.5, 1.0]),
    corruption_emptied=st.sampled_from([0.0, 0.5, 1.0]),
    corruption_texts=st.lists(TEXTS.filter(lambda text: bool(text.strip())), max_size=2),
    correction=st.sampled_from([0.0, 0.5, 1.0]),
    correction_prefix=st.sampled_from(["", "Sorry. "]),
    interruption=st.sampled_from([0.0, 0.5, 1.0]),
)


@settings(max_examples=50, deadline=None)
@given(
    streams(ends_s=(4.0, 9.5)),
    AUGMENTATIONS,
    st.sampled_from([2.0, 3.5, 38.0]),
    st.sampled_from(["overlapped", "blocked"]),
    st.integers(0, 9),
)
def test_augmented_streams_are_samples_like_any_other(data, augment, rate, perceive, seed):
    config = CompilerConfig(tokens_per_second=rate, perceive=perceive, augment=augment)
    try:
        plain = row_of(data, config, None)
    except SampleError:
        with pytest.raises(SampleError):
            row_of(data, config, seed)
        assume(False)
    row, again = row_of(data, config, seed), row_of(data, config, seed)
    for name in ("ids", "labels", "kinds", "weights", "contrasts", "visible_hi"):
        assert getattr(row, name).tolist() == getattr(again, name).tolist()
    made = varied(data, config, seed)
    assert parse_sample(dump_sample(made.sample), "key") == made.sample  # all rules hold
    assert len(row.frames) == len(plain.frames)
    # every reply of the sample is still there under its name unless it was left out; others know it by that name
    before = {event.id for event in parse_sample(data, "key").events}
    after = {event.id for event in made.sample.events}
    assert len(before - after) <= 1 + sum(name in before for name in confirms_of(data))
    wrong = {event.id for event in made.sample.events if getattr(event, "stale", False)}
    for slot in row.slots:
        if slot.event_id in wrong:
            assert not kinds_said(row, slot.event_id) - {Kind.STALE, Kind.IGNORED}
    assert ((row.kinds == Kind.IGNORED) == (row.labels == IGNORED_LABEL)).all()


def confirms_of(data: dict) -> list[str]:
    return [event["id"] for event in data["events"] if event.get("kind") == "confirm"]


@settings(max_examples=25, deadline=None)
@given(streams(ends_s=(9.5,)), AUGMENTATIONS, st.integers(0, 9), st.integers(20, 60), st.integers(2, 8))
def test_split_variants_have_as_many_parts_as_the_sample(data, augment, seed, tokens, frames):
    config, budget = CompilerConfig(tokens_per_second=3.5, augment=augment), RowBudget(tokens, frames)
    try:
        sample = parse_sample(data, "key")
        plain = compile_parts(sample, MEDIA, tokenizer(), config, budget)
    except SampleError:
        assume(False)
    parts = compile_parts(sample, MEDIA, tokenizer(), config, budget, np.random.default_rng(1), seed)
    assert len(parts) == len(plain) and all(len(p.ids) <= tokens and len(p.frames) <= frames for p in parts)
    again = compile_parts(sample, MEDIA, tokenizer(), config, budget, None, seed)
    assert [part.ids.tolist() for part in again] == [part.ids.tolist() for part in parts]
