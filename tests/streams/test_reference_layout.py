"""The compiler against the oracle: the reference's real-time rows, token by token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import reference_row
from stream_cases import rows, tokenizer

from moss_train.streams.compiled import IGNORED_LABEL, Kind
from moss_train.streams.compiler import compile_sample
from moss_train.streams.config import CompilerConfig
from moss_train.streams.importers.moss import export_moss_row, import_moss_row
from moss_train.streams.media import MediaInfo

REALTIME = rows("mllm_realtime_sft_demo")


def compile_row(row: dict, **options):
    sample, _ = import_moss_row(row, "row")
    info = MediaInfo(sample.sampling.end_s, 30.0, None)
    return compile_sample(sample, {"v0": info}, tokenizer(), options.pop("config", CompilerConfig()), **options)


def assert_equal_to_reference(row: dict, jitter: list[bool] | None) -> None:
    expected, actual = reference_row(row, tokenizer(), jitter), compile_row(row, jitter=jitter)
    assert actual.ids.tolist() == expected.ids
    assert actual.labels.tolist() == expected.labels
    assert actual.visible_hi.tolist() == expected.boundary
    assert actual.positions.tolist() == expected.positions
    assert actual.frame_positions.tolist() == expected.frame_positions


@pytest.mark.parametrize("index", range(3))
def test_real_rows_as_the_reference_lays_them_out(index):
    assert_equal_to_reference(REALTIME[index], None)


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_real_rows_with_jitter(index, seed):
    count = len(REALTIME[index]["videos"])
    coins = [True] * count if seed is None else (np.random.default_rng(seed).random(count) < 0.5).tolist()
    assert_equal_to_reference(REALTIME[index], coins)
    if seed is None:  # the test would be empty if no frame could move
        assert reference_row(REALTIME[index], tokenizer(), coins).ids != reference_row(REALTIME[index], tokenizer()).ids


def test_structure_of_the_real_rows():
    """What is known of the three rows by reading them, independent of compiler and oracle."""
    compiled = [compile_row(row) for row in REALTIME]
    assert [len(row.frames) for row in compiled] == [155, 98, 30]
    assert [[request.time_s for request in row.frames] for row in compiled] == [
        [float(second) for second in range(count)] for count in (155, 98, 30)
    ]
    counted = {"silence": 0, "bare": 0, "ended": 0}
    for row in compiled:
        for slot in row.slots:
            counted["silence" if slot.state == "silence" else "ended" if slot.ends else "bare"] += 1
    assert counted == {"silence": 276, "bare": 8, "ended": 6}  # model_facts C.1

    tractor, rocket, dustbin = compiled
    assert [slot.frame for slot in tractor.slots if slot.frame < 0 or slot.text] == [-1, -1, 136, 137, 138, 153, 154]
    interrupted = next(slot for slot in rocket.slots if slot.text.endswith("sleek, digita"))
    assert (interrupted.frame, interrupted.state, interrupted.ends) == (8, "speak", False)
    after = rocket.slots[rocket.slots.index(interrupted) + 1]
    assert (after.frame, after.time_s, after.state) == (-1, 8.5, "speak")  # text straight after the interruption
    assert after.text.startswith("At the moment") and rocket.labels[after.position] != tokenizer().special.silence
    assert [slot.state for slot in dustbin.slots if slot.text] == ["speak", "continue", "speak", "continue"]


def test_the_decision_for_a_frame_is_the_prediction_at_its_anchor():
    row, special = compile_row(REALTIME[2]), tokenizer().special
    for slot in row.slots:
        if slot.frame >= 0:
            assert row.ids[slot.position] == special.anchor
            assert row.visible_hi[slot.position] == slot.frame + 1  # it sees its own frame already
            assert row.frame_positions[slot.frame] == slot.position
    assert (row.labels[row.ids == special.end_of_turn] == IGNORED_LABEL).all()
    assert special.end_of_turn not in row.labels and special.anchor not in row.labels


def test_silence_named_in_the_system_prompt_is_the_token_itself():
    row, special = compile_row(REALTIME[0]), tokenizer().special
    prompt = row.ids[: row.ids.tolist().index(special.end_of_turn)]
    assert (prompt == special.silence).sum() == 1


def test_drawn_jitter_depends_on_the_generator_alone():
    config = CompilerConfig(jitter_probability=0.5)
    first, again = (compile_row(REALTIME[0], config=config, rng=np.random.default_rng(3)) for _ in range(2))
    assert first.ids.tolist() == again.ids.tolist()
    drawn = {tuple(compile_row(REALTIME[0], config=config, rng=np.random.default_rng(seed)).ids) for seed in range(8)}
    assert len(drawn) > 2
    assert compile_row(REALTIME[0], config=config).ids.tolist() == compile_row(REALTIME[0]).ids.tolist()


# --- random rows of the same grammar -----------------------------------------------------------------------

WORDS = st.sampled_from(["red", " block", " is", "It", ".", " digita", "née", "\n", " 42", "🙂", "a"])
TEXT = st.lists(WORDS, min_size=1, max_size=4).map("".join).filter(lambda text: text.strip())


@st.composite
def realtime_rows(draw) -> dict:
    """Any row the slot grammar allows, with interruptions, replies before the first frame and turns without frames."""
    messages = [{"role": "system", "content": "Watch."}] if draw(st.booleans()) else []
    frames, turns = 0, draw(st.integers(1, 4))
    for turn in range(turns):
        last = turn == turns - 1
        count = draw(st.integers(1 if last and not frames else 0, 4))
        slots, open_reply = [], False
        for index in range(count + 1):
            form = draw(st.sampled_from(["silence", "bare", "ended"]))
            if open_reply and form == "silence":
                form = "ended"
            if form == "bare" and index < count:
                open_reply = True
            slots.append(
                "<|silence|>" if form == "silence" else draw(TEXT) + ("<|silence|>" if form == "ended" else "")
            )
            open_reply = form == "bare"
        frames += count
        question = draw(st.sampled_from(["", "Where?"])) if turn == 0 else draw(st.sampled_from(["Stop.", " Now?", ""]))
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": "<|video|>".join(slots)}]
    times = ", ".join(f'"{second // 60:02d}:{second % 60:02d}"' for second in range(frames))
    info = f'[RealTime QA][INFO]{{"video_path": "a/b.mp4", "time_info": [{times}]}}'
    videos = [info] + ["[RealTime QA][PLACEHOLDER]"] * (frames - 1)
    return {"messages": messages, "images": [], "videos": videos}


@settings(max_examples=150, deadline=None)
@given(realtime_rows(), st.data())
def test_any_row_of_the_grammar(row, data):
    count = len(row["videos"])
    jitter = data.draw(st.lists(st.booleans(), min_size=count, max_size=count) | st.none())
    assert_equal_to_reference(row, jitter)
    sample, members = import_moss_row(row, "row")
    assert export_moss_row(sample) == row and members == {"mp4": "a/b.mp4"}


@settings(max_examples=50, deadline=None)
@given(realtime_rows())
def test_kinds_of_any_row(row):
    compiled, special = compile_row(row), tokenizer().special
    spoken = sum(slot.state == "speak" for slot in compiled.slots)
    assert (compiled.kinds == Kind.ONSET).sum() == spoken
    assert (compiled.kinds == Kind.STOP_SILENCE).sum() == sum(slot.ends for slot in compiled.slots)
    assert (compiled.kinds == Kind.IDLE_SILENCE).sum() == sum(slot.state == "silence" for slot in compiled.slots)
    silences = np.isin(compiled.kinds, [Kind.STOP_SILENCE, Kind.IDLE_SILENCE])
    assert (compiled.labels[silences] == special.silence).all()
