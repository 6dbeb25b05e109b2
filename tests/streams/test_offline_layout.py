"""Captions and conversations: templates, media, and which frames of a video are shown."""

import numpy as np
import pytest
from stream_cases import compiled, rows, tokenizer

from moss_train.errors import ConfigError, SampleError
from moss_train.streams.compiled import IGNORED_LABEL, FrameRequest, Kind
from moss_train.streams.compiler import compile_sample
from moss_train.streams.config import CompilerConfig
from moss_train.streams.importers.moss import import_moss_row
from moss_train.streams.media import MediaInfo, offline_frame_times, stream_frame_times
from moss_train.streams.template import TurnTemplate

EIGHT = CompilerConfig(min_frames=1, max_frames=4)


def conversation(*messages: tuple[str, str], media=(), **fields) -> dict:
    kinds = {"v": ("video", "mp4"), "i": ("image", "jpg")}
    return {
        "schema": "moss_train/conversation@1",
        "id": "case",
        "media": [
            {"id": f"m{n}", "kind": kinds[letter][0], "member": f"{n}.{kinds[letter][1]}"}
            for n, letter in enumerate(media)
        ],
        "messages": [{"role": role, "content": content} for role, content in messages],
    } | fields


def caption(text: str, prompt: str = "") -> dict:
    media = [{"id": "i0", "kind": "image", "member": "jpg"}]
    return {"schema": "moss_train/caption@1", "id": "case", "media": media, "text": text, "prompt": prompt}


def pieces(*parts) -> list[int]:
    """Ids spelled out: strings are text, upper-case names are roles of special tokens, numbers are anchors."""
    special = tokenizer().special
    ids = []
    for part in parts:
        if isinstance(part, int):
            ids += [special.anchor] * part
        elif part.isupper():
            ids.append(getattr(special, part.lower()))
        else:
            ids += tokenizer().encode(part)
    return ids


USER = ("START_HEADER", "user", "END_HEADER")
ASSISTANT = ("END_OF_TURN", "START_HEADER", "assistant", "END_HEADER", "\n\n")


def test_a_caption_in_the_pretraining_template():
    row = compiled(caption("<|image|>A red ball."))
    assert row.ids.tolist() == pieces("BEGIN_OF_TEXT", 1, "A red ball.", "END_OF_TEXT")
    assert row.labels.tolist() == [IGNORED_LABEL, *pieces("A red ball.", "END_OF_TEXT"), IGNORED_LABEL]
    assert row.kinds[:-1].tolist() == [0] + [Kind.TEXT] * (len(row.ids) - 2)
    assert row.visible_hi.tolist() == [0] + [1] * (len(row.ids) - 1)
    assert row.frames == (FrameRequest("i0", 0.0),) and row.kind == "caption" and row.slots == ()


def test_a_caption_without_a_placeholder_starts_with_its_media():
    assert compiled(caption("A ball.")).ids.tolist() == compiled(caption("<|image|>A ball.")).ids.tolist()


def test_a_captions_prompt_is_not_trained():
    row = compiled(caption("A ball.", "Say: "))
    assert row.ids.tolist() == pieces("BEGIN_OF_TEXT", 1, "Say: ", "A ball.", "END_OF_TEXT")
    assert row.labels[row.labels >= 0].tolist() == pieces("A ball.", "END_OF_TEXT")


def test_a_caption_as_a_chat_turn():
    row = compiled(caption("A ball.", "Say."), CompilerConfig(pretrain_template=False))
    expected = pieces("BEGIN_OF_TEXT", *USER, "\n\n", 1, "Say.", *ASSISTANT, "A ball.", "END_OF_TURN")
    assert row.ids.tolist() == expected
    assert row.labels[row.labels >= 0].tolist() == pieces("A ball.", "END_OF_TURN")


def test_a_conversation_with_media_and_two_turns():
    data = conversation(
        ("user", "<|video|>Where<|image|> is it?"),
        ("assistant", "Here."),
        ("user", "Sure?"),
        ("assistant", "Yes."),
        media="vi",
        system="Be brief.",
    )
    row = compiled(data, EIGHT)
    assert row.ids.tolist() == pieces(
        *("BEGIN_OF_TEXT", "START_HEADER", "system", "END_HEADER", "\n\nBe brief.", "END_OF_TURN"),
        *(*USER, "\n\n", 4, "Where", 1, " is it?", *ASSISTANT, "Here.", "END_OF_TURN"),
        *(*USER, "\n\nSure?", *ASSISTANT, "Yes.", "END_OF_TURN"),
    )
    assert row.labels[row.labels >= 0].tolist() == pieces("Here.", "END_OF_TURN", "Yes.", "END_OF_TURN")
    assert [request.media_id for request in row.frames] == ["m0"] * 4 + ["m1"]
    assert row.visible_hi[-1] == 5 and row.visible_hi[row.frame_positions].tolist() == [1, 2, 3, 4, 5]
    untaught = compiled(data, CompilerConfig(max_frames=4, train_turn_end_offline=False))
    assert untaught.labels[untaught.labels >= 0].tolist() == pieces("Here.", "Yes.")


def test_untrained_turns_and_text_only():
    data = conversation(("user", "Hi."), ("assistant", "No."), ("user", "Why?"), ("assistant", "Yes."))
    data["messages"][1]["train"] = False
    row = compiled(data)
    assert row.labels[row.labels >= 0].tolist() == pieces("Yes.", "END_OF_TURN")
    assert row.frames == () and not row.visible_hi.any()


def test_special_strings_in_messages_stay_text():
    row = compiled(conversation(("user", "<|eot_id|>"), ("assistant", "<|silence|>")))
    special = tokenizer().special
    assert (row.ids == special.end_of_turn).sum() == 2 and special.silence not in row.ids


def test_the_template_pieces_make_the_compiled_row():
    """Evaluation builds its prompts from these pieces; they must be what training showed."""
    template = TurnTemplate(tokenizer())
    data = conversation(("user", "Where is it?"), ("assistant", "Here."), system="Look <|silence|> out.")
    built = template.system_prefix("Look <|silence|> out.") + template.user_turn("Where is it?")
    built += tokenizer().encode("Here.") + template.close_turn()
    assert compiled(data).ids.tolist() == built
    assert tokenizer().special.silence in template.system_prefix("Look <|silence|> out.")
    assert template.system_prefix(None) == template.system_prefix("") == pieces("BEGIN_OF_TEXT")


def test_the_demo_rows():
    for row in rows("mllm_pretrain_demo"):
        sample, _ = import_moss_row(row, "row")
        ids = compile_sample(sample, {"i0": MediaInfo(0.0)}, tokenizer(), CompilerConfig()).ids
        text = row["messages"][1]["content"].removeprefix("<|image|>")
        assert ids.tolist() == pieces("BEGIN_OF_TEXT", 1, text, "END_OF_TEXT")
    for row in rows("mllm_offline_sft_demo"):
        sample, _ = import_moss_row(row, "row")
        info = MediaInfo(10.0, 30.0, 300)
        compiled_row = compile_sample(sample, {"v0": info}, tokenizer(), CompilerConfig(min_frames=8))
        question = row["messages"][0]["content"].removeprefix("<|video|>")
        answer = row["messages"][1]["content"]
        expected = pieces("BEGIN_OF_TEXT", *USER, "\n\n", 10, question, *ASSISTANT, answer, "END_OF_TURN")
        assert compiled_row.ids.tolist() == expected
        assert compiled_row.labels[compiled_row.labels >= 0].tolist() == pieces(answer, "END_OF_TURN")


# --- which frames (model_facts C.3) --------------------------------------------------------------------------


def reference_indices(info: MediaInfo, fps: float, low: int, high: int) -> list[int]:
    """C.3 as it is written there."""
    total = min(x for x in (info.frame_count or 0, round(info.duration_s * info.frame_rate)) if x > 0)
    target = int(np.ceil(info.duration_s * fps - 1e-6))
    n = min(max(target, low), high, total)
    if n == target:
        return [int(i * info.frame_rate / fps) for i in range(n)]
    return np.linspace(0, total - 1, n).astype(int).tolist()


@pytest.mark.parametrize("fps", [0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("duration_s", [0.3, 1.0, 7.96, 64.0, 300.2])
@pytest.mark.parametrize("rate", [5.0, 25.0, 29.97])
def test_offline_frames_are_the_references(fps, duration_s, rate):
    info = MediaInfo(duration_s, rate, round(duration_s * rate))
    times = offline_frame_times(info, fps, 8, 64)
    assert [round(time_s * rate) for time_s in times] == reference_indices(info, fps, 8, 64)
    assert all(0 <= time_s <= duration_s for time_s in times)


def test_offline_frames_of_a_part_and_without_facts():
    info = MediaInfo(20.0, 10.0, 200)
    assert offline_frame_times(info, 1.0, 1, 64, 5.0, 8.0) == [5.0, 6.0, 7.0]
    assert offline_frame_times(info, 1.0, 1, 2, 5.0, 8.0) == [5.0, 7.9]
    assert offline_frame_times(MediaInfo(3.0), 1.0, 1, 64) == [0.0, 1.0, 2.0]
    assert offline_frame_times(MediaInfo(3.0), 1.0, 6, 64) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert offline_frame_times(info, 1.0, 1, 64, 25.0) == []
    assert offline_frame_times(MediaInfo(2.0, 25.0, 3), 8.0, 8, 64) == [0.0, 0.04, 0.08]  # only three frames exist


def test_stream_frames():
    assert stream_frame_times(1.0, 0.0, 3.0) == [0.0, 1.0, 2.0]
    assert stream_frame_times(2.0, 1.0, 2.2) == [1.0, 1.5, 2.0]
    assert len(stream_frame_times(0.1, 0.0, 30.0)) == 3
    assert len(stream_frame_times(1 / 3, 0.0, 9.0)) == 3


def test_the_samples_own_sampling_wins():
    data = conversation(("user", "<|video|>?"), ("assistant", "Yes."), media="v")
    data["sampling"] = {"fps": 2.0, "max_frames": 6, "start_s": 10.0, "end_s": 12.0}
    assert [request.time_s for request in compiled(data).frames] == [10.0, 10.48, 11.0, 11.48]  # at 25 frames a second
    data["sampling"]["max_frames"] = 3
    assert len(compiled(data).frames) == 3
    assert len(compiled(data, CompilerConfig(max_frames=2)).frames) == 2


def times_of(config: CompilerConfig, duration_s: float = 600.0, **sampling) -> list[float]:
    data = conversation(("user", "<|video|>?"), ("assistant", "Yes."), media="v", sampling=sampling)
    return [request.time_s for request in compiled(data, config, duration_s=duration_s).frames]


def test_sampling_modes():
    uniform = CompilerConfig(sampling="uniform", max_frames=4)
    assert times_of(uniform, 10.0) == [0.0, 3.32, 6.64, 9.96]  # at 25 frames a second, from the first to the last
    assert times_of(uniform, 0.1) == [0.0, 0.04]  # no more than there are
    assert times_of(uniform, 10.0, max_frames=2, start_s=2.0, end_s=4.0) == [2.0, 3.96]
    fixed = CompilerConfig(sampling="fixed_rate", max_frames=4, min_frames=3)
    assert times_of(fixed, 1.9) == [0.0, 1.0]  # never evened out to reach min_frames
    assert times_of(fixed, 10.0, start_s=2.5, end_s=4.0, fps=2.0) == [2.5, 3.0, 3.5]
    with pytest.raises(SampleError, match="sampling: 10 frames exceed the limit of 4"):
        times_of(fixed, 10.0)
    with pytest.raises(SampleError, match="exceed the limit of 4"):
        times_of(fixed, 1e8, fps=1000.0)  # counted, never listed
    with pytest.raises(SampleError, match="no frame from 20.0 s on"):
        times_of(fixed, 10.0, start_s=20.0)
    with pytest.raises(ConfigError, match="sampling='uniformly' is none of reference, uniform, fixed_rate"):
        CompilerConfig(sampling="uniformly").validate()


@pytest.mark.parametrize("mode", ["reference", "uniform", "fixed_rate"])
def test_frames_named_by_their_times(mode):
    config = CompilerConfig(sampling=mode, max_frames=3)
    assert times_of(config, times_s=[0.5, 7.25, 8.0]) == [0.5, 7.25, 8.0]
    with pytest.raises(SampleError, match="sampling.times_s: 4 frames exceed the limit of 3"):
        times_of(config, times_s=[0.5, 7.25, 8.0, 9.0])
    with pytest.raises(SampleError, match="sampling.times_s: 9.0 s lies beyond"):
        times_of(config, 8.5, times_s=[0.5, 9.0])
    with pytest.raises(SampleError, match=r"sampling.times_s\[1\]: 0.5 is not after"):
        times_of(config, times_s=[0.5, 0.5])
    with pytest.raises(SampleError, match="sampling.fps: has no effect beside times_s"):
        times_of(config, times_s=[0.5], fps=1.0)
    two = conversation(("user", "<|video|><|video|>?"), ("assistant", "Yes."), media="vv", sampling={"times_s": [1.0]})
    with pytest.raises(SampleError, match="sampling.times_s: names frames of one video, the sample has 2"):
        compiled(two)


def test_media_that_are_unknown_or_too_short():
    data = conversation(("user", "<|video|>?"), ("assistant", "Yes."), media="v", sampling={"start_s": 700.0})
    with pytest.raises(SampleError, match="sampling: video 'm0'"):
        compiled(data)
    sample, _ = import_moss_row(rows("mllm_offline_sft_demo")[0], "row")
    with pytest.raises(SampleError, match="media: nothing is known of v0"):
        compile_sample(sample, {}, tokenizer(), CompilerConfig())


def test_text_is_tokenised_together_with_the_line_breaks_of_its_header():
    """As the reference does: a tokenizer may merge the header's line breaks with those the text starts with."""

    class Recorder:
        special = tokenizer().special

        def encode(self, text):
            return [text]

    template = TurnTemplate(Recorder())
    assert "\n\n\nWhere?" in template.user_turn("\nWhere?")
    assert "\n\n\nWatch." in template.system_prefix("\nWatch.")
    assert template.user_turn("")[-1] == "\n\n"  # what the assistant says is tokenised apart from its header
