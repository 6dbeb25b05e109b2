"""The HTML page stands alone and hides secrets; loss curves of every stage."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from scripted_streams import eventful_stream, moving_frames

from moss_train.evaluate.judges import TextJudge
from moss_train.report.curves import loss_curves, smoothed
from moss_train.report.html import write_html
from moss_train.report.metrics_file import MetricsRow
from moss_train.report.palette import DARK, LIGHT
from moss_train.report.quickstart import FULL, build_report
from moss_train.report.stream_view import stream_views


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
    stream = replace(eventful_stream(), key="a<b")
    streams = stream_views([stream], lambda key: moving_frames(146, 18, 32), TextJudge())
    path = write_html(
        tmp_path / "report.html", report, FULL, ROWS, streams, {"model": "tiny & fast"}, {"hub_token": "geheim"}
    )
    page = path.read_text()
    reader = Reader()
    reader.feed(page)
    assert "script" not in reader.tags and "link" not in reader.tags
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in reader.addresses)
    assert re.findall(r"url\((?!#)", page) == []
    words = " ".join(reader.words)
    for part in (
        "failed",
        "speak F1",
        "0.500",
        "≥ 0.95",
        "a<b",
        "tiny & fast",
        "3 questions · 3 revisions",
        "5 of 146 slots",
    ):
        assert part in words, part
    assert "geheim" not in page
    assert list(tmp_path.iterdir()) == [path]


def test_page_is_legible_by_day_and_by_night(tmp_path):
    """Text on what it stands on has a contrast of 4.5 (WCAG AA), in both sets of colours."""

    def light(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    pairs = [(ink, paper) for ink in ("ink", "muted", "error", "good", "revise-text", "user") for paper in ("paper",)]
    pairs += [
        ("speak-ink", "speak"),
        ("revise-ink", "revise"),
        ("user", "user-back"),
        ("muted", "back"),
        ("ink", "back"),
    ]
    for colours in (LIGHT, DARK):
        for ink, paper in pairs:
            bright, dark = sorted((light(colours[ink]), light(colours[paper])), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, (ink, paper)
    report = build_report({"": {"speak_f1": 1.0}}, {})
    page = write_html(tmp_path / "report.html", report, FULL, ROWS).read_text()
    assert "prefers-color-scheme: dark" in page and "@media print" in page
    drawing = page[page.index("<svg") :]
    assert LIGHT["ink"] not in drawing and "var(--ink)" in drawing, "the curves' words follow the page's colours"


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
