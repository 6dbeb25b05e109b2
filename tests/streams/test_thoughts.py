"""Think units in a row, and where a revision departs from what it replaces."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_cases import MediaInfo, compile_sample, compiled, parse_sample, revise, say, stream, think, tokenizer, user

from moss_train.errors import ConfigError
from moss_train.streams.compiled import Kind
from moss_train.streams.config import CompilerConfig, TokenizerConfig
from moss_train.streams.split import RowBudget, compile_parts
from moss_train.streams.tokenizer import load_tokenizer

THINKING = load_tokenizer(TokenizerConfig(think_tokens=True))
MEDIA = {"v0": MediaInfo(600.0, 25.0)}
DATA = stream(
    user(0.0),
    think(1.0, "red, left"),
    think(2.0, "", train=False),
    say(2.0, "It is red and blue now."),
    think(3.0, "blue too"),
    end_s=7.0,
)


def written(data: dict, tokenizer=THINKING, config: CompilerConfig | None = None, rng=None):
    return compile_sample(parse_sample(data, "k"), MEDIA, tokenizer, config or CompilerConfig(), rng)


def test_where_thoughts_stand():
    row = written(DATA, config=CompilerConfig(tokens_per_second=2.0))
    text = THINKING.decode(row.ids[row.slots[0].position + 1 :]).replace("<|silence|>", "_").replace("<|image|>", "#")
    assert text == (
        "_#_#<think>red, left</think>_#<think><skip></think>It is#<think>blue too</think> red and# blue now#._#_"
        "<|eot_id|>"
    )
    special = THINKING.special
    thought = [position for position, kind in enumerate(row.kinds) if kind == Kind.THINK]
    said = THINKING.decode(row.labels[thought])
    assert said == "<think>red, left</think><think>blue too</think>"  # the untrained one is not among them
    # the decision to speak is made behind the thought; what is said is said without it
    for slot in row.slots[2:5]:
        assert row.ids[slot.position] == special.think_end
    assert [slot.text for slot in row.slots] == ["", "", "", "It is", " red and", " blue now", ".", ""]
    assert [slot.state for slot in row.slots[2:5]] == ["silence", "speak", "continue"]
    decided = [Kind(row.kinds[slot.position]) for slot in row.slots[2:5]]
    assert decided == [Kind.IDLE_SILENCE, Kind.ONSET, Kind.TEXT]


def test_thoughts_can_be_dropped_and_need_their_tokens():
    without = DATA | {"events": [event for event in DATA["events"] if event.get("kind") != "think"]}
    dropped = written(DATA, tokenizer(), CompilerConfig(think="drop"))
    assert dropped.ids.tolist() == compiled(without).ids.tolist()
    with pytest.raises(ConfigError, match="no token of the tokenizer plays the role think_start and think_end: set"):
        written(DATA, tokenizer())
    named = load_tokenizer(TokenizerConfig(special={"think_start": "<note>"}, think_tokens=True))
    assert named.token(named.special.think_start) == "<note>" and named.token(named.special.think_end) == "</think>"
    assert THINKING.fingerprint != tokenizer().fingerprint and tokenizer().special.think_start is None
    assert THINKING.encode("It is red.") == tokenizer().encode("It is red.")
    assert THINKING.encode("<think>") == tokenizer().encode("<think>")  # no text can forge a mark


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.integers(0, 1), st.sampled_from([2.0, 3.0]), st.integers(28, 60))
def test_thoughts_with_jitter_and_in_parts(seed, probability, rate, tokens):
    config = CompilerConfig(tokens_per_second=rate, jitter_probability=float(probability))
    row = written(DATA, config=config, rng=np.random.default_rng(seed))
    still = written(DATA, config=CompilerConfig(tokens_per_second=rate))
    anchor = THINKING.special.anchor
    assert row.ids[row.ids != anchor].tolist() == still.ids[still.ids != anchor].tolist()
    for moved, slot in zip(row.slots, still.slots, strict=True):
        # a frame that is thought about comes in its time, and no frame before the decision behind a thought
        if slot.frame in (1, 2, 3):
            assert moved.position == slot.position and row.visible_hi[slot.position] == slot.frame + 1
    sample = parse_sample(DATA, "k")
    parts = compile_parts(sample, MEDIA, THINKING, config, RowBudget(tokens, 3), np.random.default_rng(seed))
    kinds = np.concatenate([part.kinds[part.kinds > 0] for part in parts])
    assert kinds.tolist() == still.kinds[still.kinds > 0].tolist()


def contrast_of(*events: dict, **config) -> tuple[str, str]:
    """The label at which the revision departs, and what stands there in the reply that it replaces."""
    row = compiled(stream(user(0.0), *events, end_s=9.0), CompilerConfig(**config))
    (place,) = np.flatnonzero(row.contrasts >= 0)
    assert row.kinds[place] in (Kind.REVISION, Kind.STOP_SILENCE)
    text = tokenizer().decode
    return text([row.labels[place]]), text([row.contrasts[place]])


@pytest.mark.parametrize("config", [{}, {"tokens_per_second": 1.0}, {"tokens_per_second": 1.0, "perceive": "blocked"}])
def test_where_a_revision_departs(config):
    assert contrast_of(say(1.0, "It is red."), revise(5.0, "It is blue.", "e1"), **config) == (" blue", " red")
    assert contrast_of(say(1.0, "It"), revise(5.0, "It is", "e1"), **config) == (" is", "<|silence|>")
    assert contrast_of(say(1.0, "It is"), revise(5.0, "It", "e1"), **config) == ("<|silence|>", " is")
    # across the pieces of exact times: the pause is no end
    chunks = [[5.0, "It"], [7.0, " is blue"]]
    assert contrast_of(say(1.0, "It is red"), revise(5.0, "It is blue", "e1", chunks=chunks), **config) == (
        " blue",
        " red",
    )


def test_where_there_is_no_contrast():
    for events in (
        [say(1.0, "Red."), revise(3.0, "Red.", "e1")],
        [say(1.0, "Red."), revise(3.0, "Blue.", "e1", train=False)],
        [say(1.0, "Red."), revise(3.0, "Blue.", "e1", stale=True)],
        [say(1.0, "Red."), say(3.0, "Blue.")],
    ):
        assert (compiled(stream(user(0.0), *events)).contrasts == -1).all()
