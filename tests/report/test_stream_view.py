"""A stream on the page: what is drawn where, what leads where, and that it stays small, alone and harmless."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from scripted_streams import Script, eventful_stream, moving_frames

from moss_train.data.synthetic.judge import WorldJudge
from moss_train.evaluate.findings import model_findings, reference_findings, slot_faults
from moss_train.evaluate.judges import TextJudge
from moss_train.evaluate.metrics import streaming_figures
from moss_train.evaluate.transcript import Confirmation, Question, Revision, SlotRecord, StreamTranscript, UserTurn
from moss_train.report.clips import choose_clips
from moss_train.report.columns import stream_columns
from moss_train.report.html import document, legend
from moss_train.report.stream_view import MOST_BYTES, stream_view, stream_views
from moss_train.report.thumbnails import thumbnails, without_padding
from moss_train.report.words import escaped, shortened, visible

JUDGE = WorldJudge()
FRAMES = np.full((6, 3, 8, 8), [[[10]], [[200]], [[30]]], np.uint8)


def transcript(key="clip", frames=6, says="Red.", revises="Now blue.", asks="What colour is it?") -> StreamTranscript:
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
        (UserTurn(0.0, asks, 0),),
        tuple(slots),
        (Question("q", 0, "It is red.", "a1", 2, 2, True),),
        (Revision("a2", "It is red.", "Now blue.", 2, 5),),
        (Confirmation(4, "It is red."),),
    )


class Page(HTMLParser):
    """Tags in order with their attributes, words, and the words below each anchor; refuses tags left open."""

    EMPTY = {"img", "meta", "br", "path", "polyline", "circle", "rect"}

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self._open: list[tuple[str, str | None]] = []
        self.below: dict[str, str] = {}
        self.feed(html)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self._open.append((tag, dict(attrs).get("id")))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open and self._open[-1][0] == tag, (tag, self._open[-3:])
        self._open.pop()

    def handle_data(self, data):
        self.words.append(data)
        for _, name in self._open:
            if name is not None:
                self.below[name] = self.below.get(name, "") + data

    def of(self, tag: str, style: str = "") -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag and style in attrs.get("class", "").split() + [""]]


def test_cells_know_replies_revisions_and_faults():
    view = stream_columns(transcript(), JUDGE, 2)
    reference = [cell.state for cell in view.reference]
    assert reference == ["silence", "silence", "speak", "speak", "silence", "revise", "silence"]
    assert [cell.goes_on for cell in view.reference] == [False, False, True, False, False, False, False]
    assert [cell.state for cell in view.model] == ["silence"] * 2 + ["speak"] + ["silence"] * 2 + ["revise", "silence"]
    assert [cell.fault for cell in view.model] == [None, None, None, "timing", None, None, None]
    wrong = slot_faults(transcript(says="Green.", revises=""), JUDGE)
    assert wrong == [None, None, "answer", "timing", None, "timing", None]
    again = stream_columns(transcript(says="Blue.", revises="Now blue."), JUDGE, 2)
    assert again.model[5].state == "speak", "the same answer again is no revision"


def test_findings_are_those_of_the_figures():
    """Each mark stands at the reply for which the figures count it."""
    stream = eventful_stream()
    model, reference = model_findings(stream, TextJudge(), 2), reference_findings(stream, TextJudge(), 2)
    said = [finding.reply.text for finding in model]
    assert said == [
        "It is red.",
        "Now blue.",
        "Now blue.",
        "Now it is yellow.",
        "First the boards are sawn then glued",
        "On the right.",
        "Now at the top.",
    ]
    assert [finding.replaces for finding in model] == [None, 0, None, 2, None, None, 5]
    assert [finding.stale for finding in model] == [False, False, True, False, False, False, False]
    assert [finding.false_revision for finding in model] == [False, False, False, True, False, False, False]
    assert [finding.delay_frames for finding in model] == [0, 1, 0, 4, 1, 1, 0]
    assert [finding.delay_s for finding in model] == [0.0, 1.0, 0.0, 4.0, 0.5, 0.5, 0.0]
    assert [finding.right for finding in model] == [True, True, False, False, True, False, True]
    assert [finding.reply.complete for finding in model] == [True, True, True, True, False, True, True]
    assert [finding.replaces for finding in reference] == [None, 0, 1, None, None, 4]
    assert not any(finding.stale or finding.false_revision for finding in reference)
    figures = streaming_figures([stream], TextJudge(), 2)
    assert figures["stale_rate"] == pytest.approx(1 / 3) and figures["false_revision_rate"] == pytest.approx(1 / 2)
    missed = [(due.revises, due.missed) for due in stream_columns(stream, TextJudge(), 2).dues]
    assert [late for revises, late in missed if revises] == [False, True, False]
    assert figures["revision_accuracy"] == pytest.approx(2 / 3)
    assert [late for revises, late in missed if not revises] == [False, False, True]
    assert figures["answer_accuracy"] == pytest.approx(2 / 3)


def test_a_reply_before_its_evidence_is_early():
    early = replace(transcript(), questions=(Question("q", 0, "Now blue.", "a2", 5, 5, True),), revisions=())
    first, second = model_findings(early, JUDGE, 2)
    assert first.early and first.due is None and first.right is None
    assert not second.early and second.delay_frames == 0 and second.right


def test_revisions_lead_to_what_they_supersede():
    page = Page(stream_view(eventful_stream(), moving_frames(146, 18, 32), TextJudge(), 4))
    anchors = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {f"s4m{k}" for k in range(7)} | {f"s4r{k}" for k in range(6)} <= anchors
    links = [attrs["href"] for attrs in page.of("a")]
    assert all(link.startswith("#") and link[1:] in anchors | {""} for link in links)
    # the row of each side's revision names what it replaces, that row is struck through and names its successor
    assert "replaces “It is red.” of 3 s" in page.below["s4m1"]
    assert "replaced by “Now blue.” of 8 s" in page.below["s4m0"]
    assert "replaces “Now blue.” of 7 s" in page.below["s4r2"]
    html = stream_view(eventful_stream(), FRAMES, TextJudge(), 4)
    row = re.search(r'<tr id="s4m0">.*?</tr>', html)[0]
    assert '<s class="old">It is red.</s>' in row and 'href="#s4m1"' in row
    assert '<s class="old">' not in re.search(r'<tr id="s4m1">.*?</tr>', html)[0]
    assert "stale answer" in page.below["s4m2"] and "false revision" in page.below["s4m3"]
    assert "1 frame, 1 s" in page.below["s4m1"] and "at once" in page.below["s4r1"]


def test_live_streams_say_how_long_the_model_took():
    slots = tuple(replace(slot, emitted_s=slot.time_s + 0.042 if slot.speaks else None) for slot in transcript().slots)
    page = Page(stream_view(replace(transcript(), slots=slots), FRAMES, JUDGE))
    assert "at once · 42 ms by the clock" in page.below["s1m0"] and "42 ms" in page.below["s1m1"]
    assert "by the clock" not in page.below["s1r0"]


def arrows(html: str) -> list[list[tuple[float, float]]]:
    """Per drawing of arrows, the horizontal place of each arrow's tail (None where it comes from another line) and
    head, in columns."""
    found = []
    for drawing in re.findall(r'<svg class="arcs".*?</svg>', html):
        pairs = []
        for path in re.findall(
            r'class="arc" d="M([\d.]+) ([\d.]+)(Q?)[^"]*?(?:H0|Q([\d.]+) [\d.]+ [\d.]+ [\d.-]+)"', drawing
        ):
            tail = float(path[0]) / 88 if path[2] else None
            pairs.append((tail, float(path[3]) / 88 if path[3] else None))
        found.append(pairs)
    return found


def test_arrows_run_from_the_revision_to_the_old_answer():
    reference, model = arrows(stream_view(transcript(), FRAMES, JUDGE))
    # columns: the turn, frames 0 … 5; the answer stands in column 2, its revision in column 5
    for ((tail, head),) in (reference, model):
        assert tail == pytest.approx(5.44, abs=0.01) and head == pytest.approx(2.56, abs=0.01)
    assert arrows(stream_view(replace(transcript(revises=""), revisions=()), FRAMES, JUDGE)) == []


def test_an_arrow_over_lines_leaves_one_and_enters_the_next():
    html = stream_view(eventful_stream(), FRAMES, TextJudge())
    lines = html.split('<div class="line"')[1:]
    drawn = [arrows(line) for line in lines]
    assert len(lines) == 4 and [len(line) for line in drawn] == [2, 2, 2, 0]
    across = [pair for pair in drawn[0][0] if pair[0] is None]
    assert len(across) == 1 and int(across[0][1]) == 8, "the head is at frame 7, after the opening turn"
    (entering,) = drawn[1][0]
    assert entering[1] is None and int(entering[0]) == 4


def test_long_silences_are_one_column_and_short_streams_are_whole():
    view = stream_columns(eventful_stream(), TextJudge(), 2)
    hidden = [(column.first, column.slots) for column in view.columns if column.slots > 1]
    assert [slots for _, slots in hidden] == [38, 50, 16]
    covered = [slot for column in view.columns for slot in range(column.first, column.last + 1)]
    assert covered == list(range(146)), "every slot stands in one column, in order"
    html = stream_view(eventful_stream(), FRAMES, TextJudge())
    for words in ("… 38 s silent …", "… 50 s silent …", "… 16 s silent …"):
        assert words in html
    short = Script("short")
    short.user("Is anything there?")
    short.silence(26)
    assert len(stream_columns(short.done(), JUDGE, 2).columns) == 27
    reply = Script("long reply")
    reply.user("Tell me all.")
    for number in range(60):
        reply.frame("", "…and on…" if number else "On…")
    view = stream_columns(reply.done(), JUDGE, 2)
    assert any(column.slots > 40 for column in view.columns), "a reply that only goes on is a quiet stretch too"
    html = stream_view(reply.done(), FRAMES, JUDGE)
    assert "nothing new" in html and "and onand on" in html


def test_silence_probability_is_a_curve_under_the_row():
    script = Script("curve")
    script.user("Is anything there?")
    for probability in (1.0, 0.0, 0.5):
        script.frame(silence=probability)
    (points,) = re.findall(r'class="curve" points="([^"]+)"', stream_view(script.done(), FRAMES, JUDGE))
    places = [tuple(map(float, point.split(","))) for point in points.split()]
    assert [x for x, _ in places] == [44, 132, 220, 308], "in the middle of each column"
    top, bottom = 3.0, 23.0
    assert [y for _, y in places[1:]] == [top, bottom, (top + bottom) / 2]
    unknown = replace(transcript(), slots=tuple(replace(s, silence_probability=None) for s in transcript().slots))
    assert "P(silence)" not in stream_view(unknown, FRAMES, JUDGE)


def test_perfect_streams_have_no_red_and_live_ones_no_reference():
    perfect = Page(stream_view(transcript().as_reference(), FRAMES, JUDGE))
    assert not perfect.of("div", "timing") and not perfect.of("div", "answer") and not perfect.of("span", "bad-tag")
    assert "no mistake" in " ".join(perfect.words)
    assert Page(stream_view(transcript(), FRAMES, JUDGE)).of("div", "timing")
    slots = tuple(replace(slot, reference_state="unknown", reference_text="") for slot in transcript().slots)
    live = StreamTranscript("live", transcript().turns, slots)
    words = " ".join(Page(stream_view(live, FRAMES, JUDGE)).words)
    assert "reference" not in words and "2 replies" in words and "wrong" not in words


HOSTILE = [
    '"><script>alert(1)</script>',
    "</span></div></article><img src=http://example.org/x onerror=alert(1)>",
    "\ud800 \x00 \x1b[31m \u202e turned \u2028 $x$ &amp; ' \" `",
    "w" * 5000,
    "一二三 שלום مرحبا 👩‍👩‍👧 é",
    "",
]


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_words_stay_words(words):
    stream = transcript(key=words or "empty", says=words, asks=words)
    stream = replace(stream, revisions=(Revision("a2", words, words, 2, 5),), confirmations=(Confirmation(4, words),))
    html = document(words, legend() + stream_view(stream, FRAMES, TextJudge()))
    html.encode("utf-8")  # no lone surrogates
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    assert all(not name.startswith("on") for _, attrs in page.tags for name in attrs)
    addresses = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in addresses)
    assert "\x1b" not in html and "\u202e" not in html and "\x00" not in html
    assert len(html.encode()) < 60_000


def test_words_are_shown_as_they_are_but_for_what_cannot_be_seen():
    assert visible("a\tb\n c\x1b\u202ed") == "a b c▯▯d"
    assert visible("👩‍👩‍👧 مرحبا") == "👩‍👩‍👧 مرحبا"
    assert shortened("abcdef", 4) == "abc…" and shortened("abcd", 4) == "abcd"
    assert escaped("<\"&'>") == "&lt;&quot;&amp;&#x27;&gt;"


def test_a_stream_stays_small_whatever_it_holds():
    noise = np.random.default_rng(0).integers(0, 256, (400, 3, 64, 64), np.uint8)
    script = Script("talkative")
    script.user("q" * 3000)
    for number in range(400):
        script.frame("word " * 20 if number % 3 else "", f"{number} " * 30 if number % 2 else "")
    html = stream_view(script.done(), noise, TextJudge())
    assert len(html.encode()) < MOST_BYTES
    assert "more slots" in html and "more in the transcript" in html
    quiet = Script("quiet")
    quiet.user("Is anything there?")
    quiet.silence(400)
    assert len(stream_view(quiet.done(), noise, TextJudge()).encode()) < MOST_BYTES
    assert len(stream_view(eventful_stream(), moving_frames(146, 120, 160), TextJudge()).encode()) < MOST_BYTES


def test_thumbnails_fit_their_budget_and_show_their_frames():
    frames = moving_frames(30, 90, 160)
    whole = without_padding(frames)
    assert whole.shape == (30, 3, 90, 160) and without_padding(frames[:0]).shape[0] == 0
    assert without_padding(np.zeros((2, 3, 8, 8), np.uint8)).shape == (2, 3, 1, 1)
    addresses = thumbnails(whole, [3, 7, 99, -1], 100_000)
    assert sorted(addresses) == [3, 7], "frames that are not there are left out"
    data = base64.b64decode(addresses[3].removeprefix("data:image/jpeg;base64,"))
    shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=float)
    assert shown.shape == (72, 128, 3)
    exact = np.asarray(Image.fromarray(whole[3].transpose(1, 2, 0)).resize((128, 72)), dtype=float)
    assert np.abs(shown - exact).mean() < 4
    for budget in (3_000, 20_000, 60_000):
        assert 0 < sum(map(len, thumbnails(whole, range(30), budget).values())) <= budget
    assert thumbnails(whole, range(30), 10) == {}


def test_chosen_clips_differ_and_include_mistakes():
    plain = [replace(transcript(f"plain{k}").as_reference(), revisions=(), confirmations=()) for k in range(50)]
    mistaken = transcript("mistaken")
    idle = [replace(t, key="idle", questions=(), turns=()) for t in plain[:1]]
    chosen = [t.key for t in choose_clips([*plain, mistaken, *idle], 4)]
    assert "mistaken" in chosen and len(chosen) == 4
    assert choose_clips(plain[:2], 12) == plain[:2]
    assert len(stream_views([*plain, mistaken], lambda key: FRAMES, JUDGE, 3)) == 3
