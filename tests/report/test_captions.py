"""Clips with captions: what stands there when, and that the written video is the clip, picture by picture."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import ImageColor

from moss_train.data.decoding.probe import probe_media
from moss_train.data.decoding.pyav_reader import each_picture
from moss_train.data.synthetic.render import write_video
from moss_train.errors import ConfigError, SampleError
from moss_train.evaluate.schedule import Step
from moss_train.report.caption_fonts import Lettering, fonts_for, plain_font
from moss_train.report.caption_track import MODES, CaptionEvent, CaptionTrack, captions_of
from moss_train.report.captions import Stage, at_rate, caption_clip, check_save, write_captioned_video
from moss_train.report.palette import DARK

FONT = [plain_font()]


def event(time_s: float, kind: str, text: str = "") -> CaptionEvent:
    return CaptionEvent(time_s, kind, text)


TALK = [
    event(0.0, "user", "What colour is it?"),
    event(0.0, "silence"),
    event(1.0, "text", "It is"),
    event(1.5, "text", " red."),
    event(2.0, "end"),
    event(3.0, "text", "Now"),
    event(3.5, "text", " blue."),
    event(4.0, "end"),
    event(5.0, "user", "Where is it?"),
    event(5.5, "text", "On the left, next to"),
    event(6.0, "user", "Stop."),
    event(7.0, "text", "Stopped."),
    event(7.5, "end"),
]


def decoded(path: Path) -> tuple[list[float], list[np.ndarray], float]:
    """Times and pictures of a video, and its length in seconds."""
    with av.open(path) as container:
        (stream,) = container.streams
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p"
        pairs = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        return [time for time, _ in pairs], [picture for _, picture in pairs], container.duration / av.time_base


def test_what_stands_there_at_each_moment():
    track = CaptionTrack(TALK)
    seen = {t: track.at(t) for t in (0.5, 1.2, 1.7, 2.5, 3.2, 4.5, 5.2, 5.7, 6.5, 7.2, 99.0)}
    assert [state.text for state in seen.values()] == [
        "",
        "It is",
        "It is red.",
        "It is red.",
        "Now",
        "Now blue.",
        "",
        "On the left, next to",
        "",
        "Stopped.",
        "Stopped.",
    ]
    modes = [state.mode for state in seen.values()]
    assert modes == [
        "silence",
        "speak",
        "speak",
        "silence",
        "revise",
        *["silence"] * 2,
        "speak",
        "silence",
        "speak",
        "silence",
    ]
    assert {t for t, state in seen.items() if state.revised} == {3.2, 4.5}, "known from the first word on"
    assert seen[3.2].old == "It is red." and not seen[3.2].cut
    assert seen[5.2].old == "" and seen[6.5].old == "On the left, next to" and seen[6.5].cut
    assert seen[7.2].old == "" and seen[5.2].user == "Where is it?" and seen[2.5].mode_since_s == 2.0


def test_the_line_shows_what_was_when():
    """Beside a look at every hundredth of a second; what is shorter than a pixel is seen too, the rarer before the
    other."""
    track = CaptionTrack(TALK)
    edges_s = np.array([0.0, 0.9, 1.0, 1.25, 2.0, 2.9, 3.1, 4.2, 5.4, 5.7, 6.0, 7.4, 9.0])
    expected = [
        max(MODES.index(track.at(k / 100).mode) for k in range(round(100 * begin), round(100 * end)))
        for begin, end in zip(edges_s, edges_s[1:], strict=False)
    ]
    assert track.modes_between(edges_s).tolist() == expected and set(expected) == {0, 1, 2}
    assert track.modes_between(np.array([0.0, 9.0])).tolist() == [2]
    asked = track.asked_between(edges_s[:-1], edges_s[1:])
    assert edges_s[:-1][asked].tolist() == [0.0, 4.2, 6.0]
    stage = Stage.of(100, 100, track, 10.0, FONT)
    blank = np.zeros((100, 100, 3), np.uint8)
    line = stage.draw(blank, 3.5)[stage.panel + 1]
    fills = [tuple(line[round(second * stage.width / 10)]) for second in (0.0, 0.5, 1.2, 2.5, 3.2, 4.0)]
    colours = [DARK["user"], "#3a4652", DARK["speak"], "#3a4652", DARK["revise"], DARK["silence"]]
    assert fills == [ImageColor.getrgb(colour) for colour in colours]


def test_a_picture_late_in_a_long_clip_takes_no_longer_than_an_early_one():
    def seconds(replies: int) -> float:
        events = [event(2 * n + k, kind, "a") for n in range(replies) for k, kind in enumerate(("text", "end"))]
        stage = Stage.of(100, 100, CaptionTrack(events), fonts=FONT)
        blank, taken = np.zeros((100, 100, 3), np.uint8), []
        for _ in range(5):
            began = time.perf_counter()
            stage.draw(blank, 2.0 * replies)
            taken.append(time.perf_counter() - began)
        return min(taken)

    assert seconds(10_000) < 5 * seconds(10)


def test_the_same_answer_again_or_to_another_question_is_no_revision():
    again = [event(0, "text", "It is red."), event(1, "end"), event(2, "text", "It is RED"), event(3, "end")]
    assert not any(state.revised for state in CaptionTrack(again).states)
    asked = [*again[:2], event(1.5, "user", "And now?"), event(2, "text", "Blue."), event(3, "end")]
    assert not any(state.revised for state in CaptionTrack(asked).states)
    with pytest.raises(ValueError, match="kind='shout'"):
        event(0, "shout")


@dataclass
class Output:
    state: str
    ids: list[int] = field(default_factory=list)
    ends: bool = False


class Bytes:
    """A tokenizer whose tokens are bytes, so that a letter takes several of them."""

    def decode(self, ids) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_tokens_become_captions_at_the_time_of_their_slot():
    steps = [Step(0.0, 1.0, "Wie?"), Step(1.0, 2.0, None), Step(2.0, 3.0, None), Step(3.0, float("inf"), None)]
    outputs = [
        Output("silence"),
        Output("speak", list("aé".encode())),
        Output("continue", [98], True),
        Output("silence"),
    ]
    events = captions_of(steps, outputs, Bytes(), 4.0)
    assert [(e.time_s, e.kind, e.text) for e in events] == [
        (0.0, "user", "Wie?"),
        (0.0, "silence", ""),
        (1.0, "text", "a"),
        (1.5, "text", "é"),  # its first byte, at 1.25, is no letter yet
        (2.0, "text", "b"),
        (2.25, "end", ""),
        (3.0, "silence", ""),
    ]
    assert CaptionTrack(events).at(2.1).text == "aéb"
    exact = captions_of(steps, outputs, Bytes(), 4.0, [[], [1.1, 1.2, 1.3], [2.7], []])
    assert [e.time_s for e in exact if e.kind == "text"] == [1.1, 1.3, 2.7]
    fast = captions_of(steps, outputs, Bytes(), 0.5)
    assert max(e.time_s for e in fast if e.kind == "text" and e.text != "b") <= 2.0, "not after the slot has ended"


def test_the_written_video_is_the_clip_with_words_that_change_when_they_should(tmp_path):
    rng = np.random.default_rng(0)
    clip = np.repeat(rng.integers(40, 216, (20, 3, 4, 3), np.uint8), 20, axis=1).repeat(20, axis=2)
    source = tmp_path / "clip.mp4"
    write_video(source, clip, 2.5)
    data = source.read_bytes()
    out = tmp_path / "out.mp4"
    assert caption_clip(out, data, probe_media(data), TALK, 100.0) == 20
    times, pictures, length_s = decoded(out)
    source_times, source_pictures, source_length_s = decoded(source)
    assert times == pytest.approx(source_times, abs=1e-4) and length_s == pytest.approx(source_length_s, abs=0.002)
    assert b"moov" in out.read_bytes()[:200], "the index stands before the pictures"
    assert list(tmp_path.glob("*.partial")) == []
    height = 480
    assert pictures[0].shape[0] > height and pictures[0].shape[1] == 640
    for picture, original in zip(pictures, source_pictures, strict=True):
        shown = picture[:height].reshape(60, 8, 80, 8, 3).mean((1, 3))
        assert np.abs(shown - original).mean() < 6, "the picture, eight times as large"
    # below the status line, words change exactly between the pictures between which they should
    track = CaptionTrack(TALK)
    bottom = [picture[height + 40 :].astype(int) for picture in pictures]
    for number in range(1, 20):
        change = np.abs(bottom[number] - bottom[number - 1])
        changed = bool((change.max(-1) > 60).sum() > 20)
        states = [track.at(times[k]) for k in (number - 1, number)]
        expected = len({(s.user, s.old, s.text, s.revised) for s in states}) == 2
        assert changed == expected, times[number]

    def has(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
        return bool((np.abs(picture.astype(int) - colour).max(-1) < 40).sum() > 20)

    orange = (245, 165, 82)
    assert [t for t, picture in zip(times, bottom, strict=True) if has(picture, orange)] == pytest.approx(
        np.arange(3.2, 4.95, 0.4), abs=1e-4
    )
    whole_seconds = [pictures[k][height + 6 : height + 40, -120:] for k in (0, 5)]
    assert np.abs(whole_seconds[0].astype(int) - whole_seconds[1]).max() > 100, "the time code goes on"
    short = tmp_path / "short.mp4"
    assert caption_clip(short, data, probe_media(data), TALK, 3.0) == 8
    assert decoded(short)[2] == pytest.approx(3.0, abs=0.002)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(9, 9, (480, 480)), (33, 17, (480, 480)), (500, 31, (500, 480)), (20, 1000, (480, 1920)), (1300, 7, (1080, 480))],
)
def test_odd_sizes_become_even_and_large_enough(tmp_path, height, width, expected):
    frames = np.full((2, height, width, 3), 128, np.uint8)
    out = tmp_path / "odd.mp4"
    assert write_captioned_video(out, at_rate(frames, 2.0), TALK[:3], fonts=FONT) == 2
    times, pictures, length_s = decoded(out)
    assert times == [0.0, 0.5] and length_s == pytest.approx(1.0, abs=0.002), "the last lasts as long as the one before"
    shown = pictures[0]
    assert shown.shape[1] == expected[1] and shown.shape[0] % 2 == 0
    stage = Stage.of(width, height, CaptionTrack(TALK[:3]), fonts=FONT)
    assert (stage.panel, stage.width) == expected and shown.shape[0] == stage.height
    left, top, w, h = stage.picture
    assert abs(w / h - width / height) / (width / height) < max(0.1, 2 / min(w, h))
    middle = shown[top + h // 2, left + w // 2].astype(int)
    assert np.abs(middle - 128).max() < 8
    if left > 8:
        assert shown[: stage.panel, : left - 4].max() < 40, "black beside a narrow picture"


HOSTILE = ["\ud800\x00\x1b[31m\u202e", "w" * 3000, "a b " * 900, "一二三 שלום مرحبا 👩‍👩‍👧 é ▯", "", "\n\n", "<b>&amp;"]


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_words_are_drawn_inside_the_picture(words):
    talk = [event(0, "user", words), event(0.1, "text", words), event(0.2, "end"), event(0.3, "text", "No: " + words)]
    stage = Stage.of(64, 48, CaptionTrack(talk), fonts=FONT)
    for time_s in (0.0, 0.15, 0.25, 0.35):
        drawn = stage.draw(np.zeros((48, 64, 3), np.uint8), time_s)
        assert drawn.shape == (stage.height, stage.width, 3) and stage.height < 480 + 240
        margin = drawn[stage.panel + 10 :, -6:]
        assert margin.max() < 60, "nothing runs over the edge"


def test_letters_without_a_glyph_become_boxes():
    letters = Lettering(FONT, 20)
    assert letters.width("一") == letters.width("▯") and letters.width("一二") == 2 * letters.width("▯")
    assert fonts_for("abcé") == FONT
    assert fonts_for("a\U0010fffd")[0] == FONT[0], "asking the system's fonts finds nothing, and does not fail"
    lines = letters.wrapped("some words " + "w" * 100, 120)
    assert len(lines) > 3 and all(letters.width(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == "somewords" + "w" * 100


def test_mistakes_are_told_and_leave_nothing_behind(tmp_path):
    out = tmp_path / "out.mp4"
    with pytest.raises(ValueError, match="at least one picture"):
        write_captioned_video(out, [], TALK)
    frame = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="does not come after"):
        write_captioned_video(out, [(0.0, frame), (0.0, frame)], [], fonts=FONT)
    assert list(tmp_path.iterdir()) == []
    for save, words in ((str(tmp_path / "x.avi"), r"\.mp4"), (str(tmp_path / "none" / "x.mp4"), "no folder")):
        with pytest.raises(ConfigError, match=words):
            check_save(save, "clip.mp4")
    write_video(out, np.zeros((3, 16, 16, 3), np.uint8), 5.0)
    with pytest.raises(ConfigError, match="the clip itself"):
        check_save(str(out), str(out))
    data = out.read_bytes()
    facts = probe_media(data)
    assert [time for time, _ in each_picture(data, facts)] == pytest.approx([0.0, 0.2, 0.4], abs=1e-4)
    with pytest.raises(SampleError, match="does not decode"):
        list(each_picture(data[:-60] if data.index(b"moov") > data.index(b"mdat") else data[:600], facts))
