"""The published annotation formats: from a file as published to streams that compile, over tiny clips."""

import json
import shutil
from pathlib import Path

import pytest
from data_samples import numbered_clip

from moss_train.data.convert import ConvertOptions, convert
from moss_train.data.corpus import Corpus, load_source
from moss_train.data.shards.pack import pack
from moss_train.errors import DataError
from moss_train.streams.compiled import Kind
from moss_train.streams.config import TokenizerConfig
from moss_train.streams.importers.formats import FORMATS
from moss_train.streams.tokenizer import load_tokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "data_specs" / "examples"
#: file name → seconds, of the clips that the examples name
CLIPS = {
    "kitchen.mp4": 10,
    "v_QOlSCBRmfWY.mkv": 12,
    "v_bXdq2zI1Ms0.mp4": 10,
    "v_uqiMw7tQ1Cc.mp4": 8,
    "0a8f2c1e-77aa-4c0f-9d55-1f6f9d1b2c33.mp4": 20,
    "WLVQMQbMBhc.mp4": 14,
    "9rTZxkQ3mKw.mp4": 10,
    "match.mp4": 14,
    "street.mp4": 9,
}
#: format → reasons of the rows of its example that must be left out
REFUSED = {
    "llava_video": [],
    "activitynet": ["v_uqiMw7tQ1Cc.timestamps[0]: ends at 2.0 s, before it starts at 7.5 s"],
    "coin": ["9rTZxkQ3mKw.annotation[0].segment: [7.0, 9.0] lies outside the task [0.0, 6.0]"],
    "ego4d": ["b7d1e6f0-1c22-4f3e-8a10-6b2f5d3a9e01.narration_pass_1.narrations: is NoneType"],
    "videollm_online": [],
    "text_stream": ["text_stream[1]: 7.0 s lies outside the clip [0.0, 3.0]"],
    "streamo": ["response[0]: comes at 2.0 s, before the first question"],
}


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name, seconds in CLIPS.items():
        container = "matroska" if name.endswith("mkv") else "mp4"
        (folder / name).write_bytes(numbered_clip(2 * seconds, rate=2, container=container))
    return folder


@pytest.fixture(scope="module")
def corpus(media, tmp_path_factory) -> Corpus:
    """All examples, converted one format after the other and packed together."""
    folder = tmp_path_factory.mktemp("formats")
    staging = folder / "staging"
    staging.mkdir()
    for source, reasons in REFUSED.items():
        summary = convert(options(source, media, folder / source))
        assert [
            error.reason[: len(reason)] for error, reason in zip(summary.quarantined, reasons, strict=True)
        ] == reasons
        for path in (folder / source).iterdir():
            if path.suffix != ".jsonl":
                shutil.copy(path, staging / path.name)
    packed, rejected, _ = pack(staging, folder / "packed")
    assert not rejected and packed == 12
    return load_source(folder / "packed", load_tokenizer(TokenizerConfig()))


def options(source: str, media: Path, out: Path, annotations: Path | None = None, **more) -> ConvertOptions:
    annotations = annotations or EXAMPLES / source
    return ConvertOptions(str(annotations), str(media), str(out), source=source, copy=False, **more)


def sample_of(corpus: Corpus, key: str):
    return corpus.sample(corpus.index.number(key))


def said(corpus: Corpus, key: str) -> list[tuple[float, str]]:
    """(arrival of the frame or time of the header, text) of every slot in which the assistant speaks."""
    row = corpus.compile(corpus.index.number(key))
    return [(round(slot.time_s, 2), slot.text) for slot in row.slots if slot.text]


def asked(corpus: Corpus, key: str) -> list[tuple[float, str]]:
    return [(round(event.t, 2), event.text) for event in sample_of(corpus, key).events if event.role == "user"]


def test_every_format_has_an_example():
    assert set(REFUSED) | {"moss", "conversations"} == set(FORMATS)


def test_llava_video(corpus):
    first, second = (sample_of(corpus, f"0_30_s_academic_v0_1-00000{number}") for number in range(2))
    assert first.messages[0].content == "<|video|>Please describe the video in detail."
    contents = [message.content for message in second.messages]
    assert contents[0].startswith("<|video|>Where does the knife end up?\nA.") and contents[2] == "What was cut?"
    assert first.source_metadata["id"] == "kitchen-7" and first.media == second.media
    assert len(corpus.compile(corpus.index.number("0_30_s_academic_v0_1-000000")).frames) == 10


def test_activitynet(corpus):
    # overlapping spans and one listed twice; two that end in one second are one reply, the last is clipped to the video
    assert said(corpus, "train-000000") == [
        (5.0, "A young woman stands in a room."),
        (10.0, "Her dress swings. She begins to dance."),
        (11.0, "She stops and walks off the screen."),
    ]
    evidence = [event.evidence for event in sample_of(corpus, "train-000000").events if event.role == "assistant"]
    assert evidence == [[0.0, 4.2], [3.0, 9.7], [10.0, 11.0]]
    assert [t for t, _ in said(corpus, "train-000001")] == [6.0, 9.0]  # unsorted in the file
    assert sample_of(corpus, "train-000000").media[0].member == "mkv"  # named without an extension


def test_coin(corpus):
    assert asked(corpus, "COIN-000000") == [
        (1.0, "I am about to put on hair extensions. Tell me each step when I begin it.")
    ]
    # sorted, and the step that goes on with the same label is no news
    assert said(corpus, "COIN-000000") == [
        (2.0, "Divide the hair."),
        (6.0, "Clip the extensions in."),
        (10.0, "Comb the hair, cover the clips."),
    ]


def test_ego4d(corpus):
    # the length of the video is not in the file: the last frame is that of the last narration
    assert said(corpus, "narration-000000") == [
        (2.55, "C picks a knife."),
        (6.55, "C cuts the bread."),
        (8.55, "A man X opens a something."),
        (19.55, "C puts the knife in the sink."),
    ]
    assert sample_of(corpus, "narration-000000").source_metadata["left_out"] == {"unclear": 1, "repeated": 1}
    row = corpus.compile(corpus.index.number("narration-000000"))
    silent = [round(slot.time_s, 2) for slot in row.slots if row.kinds[slot.position] == Kind.IDLE_SILENCE]
    assert silent == [3.55, 4.55, 5.55, 7.55]  # only between close narrations, not in the ten seconds without any
    assert [t for t, _ in said(corpus, "narration-000001")] == [4.0, 8.0]  # the other pass is a sample of its own


def test_videollm_online(corpus):
    key = "goalstep_livechat_trainval_filtered_21k-000000"
    assert [(t, text[:20]) for t, text in asked(corpus, key)] == [
        (3.4, "What should I do fir"), (6.97, "Is that thin enough?")]  # fmt: skip
    # the later of two answers at one time, at once; the dialogue ends where time goes back
    texts = "".join(text for _, text in said(corpus, key))
    assert texts == (
        "Take the bread knife; it is the one with the teeth.Good. Now cut a slice.Yes, that slice is thin."
        "Put the knife into the sink."
    )
    assert said(corpus, key)[0][0] == 3.4 and said(corpus, key)[-1][0] == 19.5
    assert sample_of(corpus, key).source_metadata["left_out"] == {"after_going_back": 2}
    assert [t for t, _ in said(corpus, "narration_stream_val-000000")] == [3.1, 7.1, 9.1]


def test_text_stream(corpus):
    # sorted by their starts; the pauses are silence, the word after the last frame is said at it
    assert said(corpus, "live_with_seeks-000000") == [
        (4.0, "and"),
        (5.0, " she passes"),
        (6.0, " it to"),
        (7.0, " the left,"),
        (12.0, " what a goal!"),
        (13.0, " Two-nil."),
    ]
    assert sample_of(corpus, "live_with_seeks-000000").source_metadata["title"] == "Final, second half"
    # a question of 2.9 s waits for the word of 2.8 s, which is said at 3 s; the word of 3.3 s waits for the answer
    assert asked(corpus, "live_with_seeks-000001") == [(3.0, "Who plays in white?")]
    assert said(corpus, "live_with_seeks-000001") == [
        (1.0, "Kick-off"),
        (3.0, " for the home"),
        (3.0, "The guests."),
        (4.0, "side,"),
        (6.0, " they attack."),
    ]


def test_streamo(corpus):
    assert asked(corpus, "raw_data-000000") == [(4.0, "What happens in the video?"), (4.0, "What colour is the car?")]
    assert said(corpus, "raw_data-000000") == [
        (5.0, "The car is red."),
        (9.0, "A person crosses the street. A bus drives past."),
    ]


def test_a_finer_grid(media, tmp_path):
    summary = convert(options("activitynet", media, tmp_path / "out", fps=2.0))
    assert summary.written == {"stream": 2}
    data = json.loads((tmp_path / "out" / "train-000000.json").read_text())
    assert data["sampling"]["fps"] == 2.0
    assert [event["t"] for event in data["events"]] == [0.0, 4.5, 9.5, 10.0, 11.5]


def test_a_file_of_another_form_is_named(media, tmp_path):
    for source in ("activitynet", "coin", "ego4d"):
        with pytest.raises(DataError, match=f"raw_data.json: .* is it of source={source}"):
            convert(options(source, media, tmp_path / "out", annotations=EXAMPLES / "streamo"))


def test_a_video_that_is_not_there_is_named(tmp_path):
    (tmp_path / "media").mkdir()
    with pytest.raises(DataError, match="no video file is named 'v_QOlSCBRmfWY'"):
        convert(options("activitynet", tmp_path / "media", tmp_path / "out"))
