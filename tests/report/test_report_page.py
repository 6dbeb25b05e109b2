"""The HTML page stands alone; timelines show what they should; loss curves of every stage."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from moss_train.data.synthetic.judge import WorldJudge
from moss_train.evaluate.transcript import Confirmation, Question, Revision, SlotRecord, StreamTranscript, UserTurn
from moss_train.report.curves import loss_curves, smoothed
from moss_train.report.html import write_html
from moss_train.report.metrics_file import MetricsRow
from moss_train.report.palette import ERROR, SLOT_COLOURS
from moss_train.report.quickstart import FULL, build_report
from moss_train.report.timelines import (
    choose_clips,
    draw_timeline,
    model_cells,
    reference_cells,
    timeline_pictures,
)

JUDGE = WorldJudge()


def transcript(key="clip", frames=6, says="Red.", revises="Now blue.") -> StreamTranscript:
    """An opening turn, `frames` frames, an answer at frame 1 over two slots, a revision at frame 4."""
    slots = [SlotRecord(-1, True, 0.0, "silence", "", False, None)]
    slots += [SlotRecord(k, False, float(k), "silence", "", False, None) for k in range(frames)]
    slots[2] = replace(slots[2], reference_state="speak", reference_text="It is", reference_event="a1")
    slots[3] = replace(
        slots[3], reference_state="continue", reference_text=" red.", reference_ends=True, reference_event="a1"
    )
    slots[5] = replace(
        slots[5], reference_state="speak", reference_text="Now blue.", reference_ends=True, reference_event="a2"
    )
    slots[2] = replace(slots[2], state="speak", text=says, ends=True)
    if revises:
        slots[5] = replace(slots[5], state="speak", text=revises, ends=True)
    return StreamTranscript(
        key,
        (UserTurn(0.0, "What colour is it?", 0),),
        tuple(slots),
        (Question("q", 0, "It is red.", "a1", 2, 2, True),),
        (Revision("a2", "It is red.", "Now blue.", 2, 5),),
        (Confirmation(4, "It is red."),),
    )


def pixels(png: bytes) -> set[tuple[int, int, int]]:
    image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return set(map(tuple, image.reshape(-1, 3).tolist()))


def rgb(colour: str) -> tuple[int, int, int]:
    return tuple(int(colour[k : k + 2], 16) for k in (1, 3, 5))


FRAMES = np.full((6, 3, 8, 8), [[[10]], [[200]], [[30]]], np.uint8)


def test_cells_know_replies_revisions_and_faults():
    cells = reference_cells(transcript())
    assert [cell.colour for cell in cells] == ["silence", "silence", "speak", "speak", "silence", "revise", "silence"]
    assert [cell.goes_on for cell in cells] == [False, False, True, False, False, False, False]
    own = model_cells(transcript(), JUDGE)
    assert [cell.colour for cell in own] == ["silence", "silence", "speak", "silence", "silence", "revise", "silence"]
    assert [cell.fault for cell in own] == [None, None, None, "timing", None, None, None]
    wrong = model_cells(transcript(says="Green.", revises=""), JUDGE)
    assert [cell.fault for cell in wrong] == [None, None, "answer", "timing", None, "timing", None]
    again = model_cells(transcript(says="Blue.", revises="Now blue."), JUDGE)
    assert again[5].colour == "speak", "the same answer again is no revision"


def test_picture_shows_frames_slots_and_errors():
    found = pixels(draw_timeline(transcript(), FRAMES, JUDGE))
    assert (10, 200, 30) in found, "the frames"
    for colour in (SLOT_COLOURS["speak"][0], SLOT_COLOURS["revise"][0], SLOT_COLOURS["silence"][0], ERROR):
        assert rgb(colour) in found, colour
    perfect = pixels(draw_timeline(transcript().as_reference(), FRAMES, JUDGE))
    assert rgb(ERROR) not in perfect


def test_long_clips_go_on_in_the_next_line_and_odd_words_are_harmless():
    def size(picture: bytes) -> tuple[int, int]:
        return Image.open(io.BytesIO(picture)).size

    short = size(draw_timeline(transcript(frames=6), FRAMES, JUDGE))
    long = size(draw_timeline(transcript(frames=40), FRAMES, JUDGE))
    assert long[0] == short[0] and long[1] > 2.5 * short[1]
    draw_timeline(transcript(says="$x$ \x1b \ufffd " + "w" * 500), FRAMES, JUDGE)


def test_chosen_clips_differ_and_include_mistakes():
    plain = [replace(transcript(f"plain{k}").as_reference(), revisions=(), confirmations=()) for k in range(50)]
    mistaken = transcript("mistaken")
    idle = [replace(t, key="idle", questions=(), turns=()) for t in plain[:1]]
    chosen = [t.key for t in choose_clips([*plain, mistaken, *idle], 4)]
    assert "mistaken" in chosen and len(chosen) == 4
    assert choose_clips(plain[:2], 12) == plain[:2]


class Reader(HTMLParser):
    """Every address that a page names, and its words."""

    def __init__(self):
        super().__init__()
        self.addresses, self.words, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]

    def handle_data(self, data):
        self.words.append(data)


ROWS = [
    MetricsRow(stage, step, 20, 0.0, {"loss": 3.0 / step, "loss/text": 2.0 / step, "loss/onset": 4.0 / step})
    for stage in ("align", "realtime")
    for step in range(1, 21)
]


def test_page_needs_nothing_else_and_hides_secrets(tmp_path):
    figures = {"speak_f1": 0.5, "n_streams": 3, "revision_delay_frames": float("nan")}
    report = build_report({"": figures, "untrained.": figures}, {"seconds": 3.0})
    pictures = timeline_pictures([transcript("a<b")], lambda key: FRAMES, JUDGE)
    path = write_html(
        tmp_path / "report.html", report, FULL, ROWS, pictures, {"model": "tiny & fast"}, {"hub_token": "geheim"}
    )
    page = path.read_text()
    reader = Reader()
    reader.feed(page)
    assert "script" not in reader.tags and "link" not in reader.tags
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in reader.addresses)
    assert re.findall(r"url\((?!#)", page) == []
    words = " ".join(reader.words)
    for part in (
        "failed",
        "speak F1",
        "0.500",
        "≥ 0.95",
        "a<b",
        "tiny & fast",
        "1 question · 1 revision",
        "1 of 7 slots",
    ):
        assert part in words, part
    assert "geheim" not in page
    (picture,) = (address for address in reader.addresses if address.startswith("data:"))
    assert Image.open(io.BytesIO(base64.b64decode(picture.split(",")[1]))).format == "PNG"
    assert page.count("<svg") == 1
    assert list(tmp_path.iterdir()) == [path]


def test_page_without_training_or_clips(tmp_path):
    report = build_report({"": {"speak_f1": 1.0}}, {})
    page = write_html(tmp_path / "report.html", report, FULL).read_text()
    assert "Training loss" not in page and "What the model says" not in page


def test_curves_of_every_stage():
    assert loss_curves([]) == ""
    assert loss_curves(ROWS).startswith("<svg")
    bad = [replace(row, metrics={"loss": float("nan")}) for row in ROWS]
    assert loss_curves(bad).startswith("<svg"), "a run that diverged still gets its page"


def test_smoothing_keeps_level_and_start():
    assert smoothed(np.full(100, 2.5)) == pytest.approx(np.full(100, 2.5))
    assert smoothed(np.array([])).tolist() == []
    ramp = smoothed(np.linspace(10, 0, 300))
    assert ramp[0] == 10 and (np.diff(ramp) < 0).all()
