"""Rows of the published formats that are malformed: refused with the field, and nothing else ever happens."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_cases import tokenizer

from moss_train.errors import SampleError
from moss_train.streams.compiler import compile_sample
from moss_train.streams.config import CompilerConfig
from moss_train.streams.importers.common import ImportContext
from moss_train.streams.importers.formats import FORMATS
from moss_train.streams.importers.narrations import clean_narration
from moss_train.streams.media import MediaInfo

EXAMPLES = Path(__file__).resolve().parents[2] / "data_specs" / "examples"


class AnyVideo(dict):
    def __contains__(self, name) -> bool:
        return True

    def __getitem__(self, name) -> str:
        return f"{name}.mp4"


ANY_VIDEO = ImportContext(videos=AnyVideo())


def loaded(source: str) -> list:
    """The parsed example files of a format."""
    files = []
    for path in sorted((EXAMPLES / source).iterdir()):
        text = path.read_text(encoding="utf-8")
        lines = path.suffix == ".jsonl"
        files.append([json.loads(line) for line in text.splitlines()] if lines else json.loads(text))
    return files


def read(source: str, file) -> list:
    """The samples of all rows of one file."""
    form = FORMATS[source]
    return [form.read(row, "key", ANY_VIDEO)[0] for row in form.rows(file)]


def changed(source: str, *path, value, file: int = 0):
    """The example file of a format with one value changed (None removes it)."""
    data = copy.deepcopy(loaded(source)[file])
    place = data
    for part in path[:-1]:
        place = place[part]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


ACTIVITY, COOK, STEP = "v_QOlSCBRmfWY", "0a8f2c1e-77aa-4c0f-9d55-1f6f9d1b2c33", "WLVQMQbMBhc"
PASS = (COOK, "narration_pass_1", "narrations")


@pytest.mark.parametrize(
    ("source", "path", "value", "fault"),
    [
        ("llava_video", (0, "video"), 5, "video: is int, not text"),
        ("llava_video", (0, "conversations", 1, "value"), 5, "conversations[1].value: is int"),
        ("llava_video", (0, "conversations", 1, "from"), "robot", "conversations[1].from: 'robot' is none of human"),
        ("llava_video", (0, "image"), "a.jpg", "image: a row of this set shows one video"),
        ("activitynet", (ACTIVITY, "duration"), -1, f"{ACTIVITY}.duration: -1 is no time"),
        ("activitynet", (ACTIVITY, "timestamps", 0), [1.0], f"{ACTIVITY}.timestamps[0]: has 1 entries"),
        ("activitynet", (ACTIVITY, "timestamps", 4), [12.5, 13.0], f"{ACTIVITY}.timestamps[4]: starts at 12.5 s"),
        ("activitynet", (ACTIVITY, "sentences", 0), "  ", f"{ACTIVITY}.sentences[0]: is blank"),
        ("activitynet", (ACTIVITY, "sentences", 0), None, f"{ACTIVITY}.timestamps: 5 for 4 sentences"),
        ("coin", ("database", STEP, "annotation", 1, "segment"), [9, 8], f"{STEP}.annotation[1].segment: ends at 8.0"),
        ("coin", ("database", STEP, "annotation", 1, "segment"), [0, 0.5], "[0.0, 0.5] lies outside the task"),
        ("coin", ("database", STEP, "annotation", 1, "label"), None, f"{STEP}.annotation[1].label: is NoneType"),
        ("coin", ("database", STEP, "end"), 0.5, f"{STEP}.start: 1.0 s is not before the task's end"),
        ("ego4d", (*PASS, 0, "timestamp_sec"), "soon", "narrations[0].timestamp_sec: 'soon' is no time"),
        ("ego4d", (*PASS, 0, "timestamp_sec"), float("nan"), "narrations[0].timestamp_sec: nan is no time"),
        ("ego4d", PASS, [], "narrations: none of at least two words"),
        ("videollm_online", (0, "conversation", 0, "role"), "assistant", "conversation[0].role: a live chat starts"),
        ("videollm_online", (0, "conversation", 4, "content"), " ", "conversation[4].content: is blank"),
        ("videollm_online", (0, "conversation", 1, "time"), None, "conversation[1].time: None is no time"),
        ("text_stream", (0, 0, "content", 0, "video_end"), 1.0, "[0].content[0].video_end: 1.0 is not after"),
        ("text_stream", (0, 1, "content", 0, "text_stream", 3), [5.9, 5.0, "to"], "text_stream[3]: ends at 5.0 s"),
        ("text_stream", (0, 1, "content", 0, "text_stream", 3), [5.9, "to"], "text_stream[3]: has 2 entries"),
        ("text_stream", (1, 1, "content", 0, "qa_stream", 0, 1), 30.0, "qa_stream[0][1]: 30.0 s lies outside"),
        ("text_stream", (1, 1, "content", 0, "qa_stream", 0, 3), "", "qa_stream[0]: question or answer is blank"),
        ("streamo", (0, "question"), [], "question: is empty"),
        ("streamo", (0, "response", 1, "time"), "", "response[1].time: missing"),
        ("streamo", (0, "response", 0, "end_time"), "", "response[0]: needs both st_time and end_time"),
        ("streamo", (0, "response", 0, "end_time"), 5.0, "response[0].end_time: 5.0 is before st_time 6.0"),
    ],
)
def test_refused_with_the_field(source, path, value, fault):
    with pytest.raises(SampleError) as caught:
        read(source, changed(source, *path, value=value))
    assert fault in caught.value.reason and "key" == caught.value.key


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("#C C picks a knife.", "C picks a knife."),
        ("#O A man X opens a #unsure", "A man X opens a something."),
        ("#c c  washes , the pan , #Unsure.", "C washes , the pan , something."),
        ("@c C walks", "C walks."),
        ("#Condition stays", "Condition stays."),
        ("#C", ""),
    ],
)
def test_narrations_lose_their_tags(text, clean):
    assert clean_narration(text) == clean


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=6), st.just([]), st.just({}),
    st.just([[1, 2]]), st.sampled_from(["user", "7.5", 1e300, 2.0, "<|video|>", "x.mp4"]),
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(st.data(), st.sampled_from(sorted({path.name for path in EXAMPLES.iterdir() if path.is_dir()} & set(FORMATS))))
def test_any_change_is_refused_or_compiles(data, source):
    """A value anywhere in a row replaced by any other: a checked sample that compiles, or a SampleError."""
    file = copy.deepcopy(data.draw(st.sampled_from(loaded(source))))
    place = file
    while True:
        key = data.draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        if not (isinstance(place[key], dict | list) and place[key]) or data.draw(st.integers(0, 9)) == 0:
            break
        place = place[key]
    place[key] = data.draw(VALUES)
    try:
        rows = list(FORMATS[source].rows(file))
    except SampleError:
        return
    for row in rows:
        try:
            sample, members = FORMATS[source].read(row, "key", ANY_VIDEO)
        except SampleError:
            continue
        media = {medium.id: MediaInfo(1e6, 25.0) for medium in sample.media}
        assert set(members) == {medium.member for medium in sample.media}
        try:
            compile_sample(sample, media, tokenizer(), CompilerConfig())
        except SampleError as error:
            assert "frames" in error.reason or "beyond the video" in error.reason  # a time was changed to a huge one
