"""One picture per clip: what was on screen, what the reference says and when, what the model says and when.

Frames stand on top, below each its slot of the reference and of the model. A user's words stand where a frame would.
Shape suffixes: F frames, C colour channels, H, W pixels.
"""

import io
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")  # no display, in any process
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch

from moss_train.evaluate.judges import Judge
from moss_train.evaluate.metrics import slot_errors
from moss_train.evaluate.transcript import (
    StreamTranscript,
    Utterance,
    model_utterances,
    reference_utterances,
)
from moss_train.report.palette import ERROR, GRID, MUTED, SLOT_COLOURS, USER

#: inches
_COLUMN, _GAP, _LABEL = 0.94, 0.06, 0.86
_SLOT, _TIME = 0.52, 0.26
_FONT = 9.5  #: points; the page shows a picture at about two thirds of its size
_COLUMNS = 14  #: slots in one line; a longer clip goes on in the next line
_NOTHING = "nobody asks"


@dataclass(frozen=True)
class TimelinePicture:
    """A clip's picture and the words that stand above it."""

    key: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class _Cell:
    """One slot of one side, ready to be drawn."""

    colour: str  #: key of SLOT_COLOURS
    text: str
    goes_on: bool  #: the reply continues in the next slot
    fault: str | None  #: "timing", "answer" or None


def choose_clips(transcripts: Sequence[StreamTranscript], count: int = 12) -> list[StreamTranscript]:
    """`count` clips that show as much different behaviour as possible, mistakes among them, in their old order."""
    features = [_features(transcript) for transcript in transcripts]
    shown: Counter[str] = Counter()
    chosen: list[int] = []
    rest = list(range(len(transcripts)))
    while rest and len(chosen) < count:
        best = max(rest, key=lambda index: (sum(_worth(feature, shown) for feature in features[index]), -index))
        rest.remove(best)
        chosen.append(best)
        shown.update(features[best])
    return [transcripts[index] for index in sorted(chosen)]


def _worth(feature: str, shown: Counter[str]) -> float:
    """How much another clip with this feature would add to those chosen."""
    interest = 0.3 if feature == _NOTHING else 1.0
    return interest / (1 + shown[feature]) ** 2


def _features(transcript: StreamTranscript) -> set[str]:
    marks = {
        "revision": transcript.revisions,
        "confirmation": transcript.confirmations,
        "interruption": [turn for turn in transcript.turns if turn.interrupts],
        "evidence after": [question for question in transcript.questions if question.evidence_after],
        "evidence before": [question for question in transcript.questions if not question.evidence_after],
        "two questions": transcript.questions[1:],
        "long reply": [slot for slot in transcript.slots if slot.reference_state == "continue"],
        "mistake": [error for error in slot_errors(transcript) if error],
    }
    found = {name for name, items in marks.items() if items}
    return found or {_NOTHING}


def timeline_pictures(
    transcripts: Sequence[StreamTranscript],
    frames_of: Callable[[str], np.ndarray],
    judge: Judge,
    count: int = 12,
) -> list[TimelinePicture]:
    """Pictures of chosen clips. `frames_of(key)` gives a clip's frames, uint8 [F, C, H, W], as the model saw them."""
    return [
        TimelinePicture(
            transcript.key,
            _caption(transcript, judge),
            draw_timeline(transcript, np.asarray(frames_of(transcript.key)), judge),
        )
        for transcript in choose_clips(transcripts, count)
    ]


def _caption(transcript: StreamTranscript, judge: Judge) -> str:
    parts = [
        _plural(len(transcript.questions), "question"),
        _plural(len(transcript.revisions), "revision"),
        _plural(len(transcript.confirmations), "confirmation"),
    ]
    wrong = sum(cell.fault is not None for cell in model_cells(transcript, judge))
    told = " · ".join(part for part in parts if part) or _NOTHING
    return f"{told} · {f'{wrong} of {len(transcript.slots)} slots wrong' if wrong else 'no mistake'}"


def _plural(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}" if number else ""


def reference_cells(transcript: StreamTranscript) -> list[_Cell]:
    revisions = {revision.id for revision in transcript.revisions}
    cells = []
    for index, slot in enumerate(transcript.slots):
        colour = slot.reference_state if slot.reference_state in SLOT_COLOURS else "speak"
        if slot.reference_speaks and slot.reference_event in revisions:
            colour = "revise"
        following = transcript.slots[index + 1 : index + 2]
        goes_on = slot.reference_speaks and bool(following) and following[0].reference_state == "continue"
        cells.append(_Cell(colour, slot.reference_text, goes_on, None))
    return cells


def model_cells(transcript: StreamTranscript, judge: Judge) -> list[_Cell]:
    """The model's slots: a reply that differs from the last one of its turn is a revision.

    A fault is "timing" where the model speaks and the reference is silent or the other way round, "answer" where both
    speak but do not say the same.
    """
    replies = model_utterances(transcript.slots)
    reply_of = _by_slot(replies)
    reference_of = _by_slot(reference_utterances(transcript.slots))
    revising = _revising(transcript, replies, judge)
    wrong_timing = slot_errors(transcript)
    cells = []
    for index, slot in enumerate(transcript.slots):
        colour = "silence"
        if slot.speaks:
            colour = "revise" if reply_of[index] in revising else "speak"
        fault = "timing" if wrong_timing[index] else None
        if fault is None and slot.speaks and slot.reference_speaks:
            said, asked = replies[reply_of[index]].text, reference_of.get(index)
            reference = reference_utterances(transcript.slots)[asked].text if asked is not None else ""
            fault = None if _same(judge, said, reference) else "answer"
        following = transcript.slots[index + 1 : index + 2]
        goes_on = slot.speaks and bool(following) and following[0].state == "continue" and not slot.ends
        cells.append(_Cell(colour, slot.text, goes_on, fault))
    return cells


def _same(judge: Judge, said: str, reference: str) -> bool:
    return said.strip() == reference.strip() or judge.same_answer(said, reference)


def _by_slot(replies: Sequence[Utterance]) -> dict[int, int]:
    return {slot: number for number, reply in enumerate(replies) for slot in range(reply.slot, reply.last_slot + 1)}


def _revising(transcript: StreamTranscript, replies: Sequence[Utterance], judge: Judge) -> set[int]:
    turns = [turn.slot for turn in transcript.turns]
    found = set()
    for number, (earlier, reply) in enumerate(zip(replies, replies[1:], strict=False), 1):
        same_turn = not any(earlier.slot < turn <= reply.slot for turn in turns)
        if same_turn and not _same(judge, reply.text, earlier.text):
            found.add(number)
    return found


def draw_timeline(transcript: StreamTranscript, frames_FCHW: np.ndarray, judge: Judge) -> bytes:
    """The picture of one clip as PNG."""
    columns = _columns(transcript)
    lines = [columns[start : start + _COLUMNS] for start in range(0, len(columns), _COLUMNS)]
    height = _TIME + _COLUMN + 2 * (_SLOT + _GAP) + _GAP
    width = _LABEL + _COLUMNS * (_COLUMN + _GAP)  # the same for all clips, so that a page shows all at one scale
    between = 0.25
    total = len(lines) * height + (len(lines) - 1) * between
    with plt.rc_context({"font.family": "DejaVu Sans", "font.size": _FONT}):
        figure = plt.figure(figsize=(width, total))
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set_xlim(0, width)
        axis.set_ylim(total, 0)
        axis.set_axis_off()
        reference, model = reference_cells(transcript), model_cells(transcript, judge)
        for number, line in enumerate(lines):
            top = number * (height + between)
            slots_top = top + _TIME + _COLUMN + _GAP
            for label, y in (("reference", slots_top), ("model", slots_top + _SLOT + _GAP)):
                axis.text(_LABEL - 0.1, y + _SLOT / 2, label, ha="right", va="center", color=MUTED)
            for place, slot in enumerate(line):
                left = _LABEL + place * (_COLUMN + _GAP)
                _draw_top(axis, transcript, slot, frames_FCHW, left, top)
                _draw_slot(axis, reference[slot], left, slots_top)
                _draw_slot(axis, model[slot], left, slots_top + _SLOT + _GAP)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=150, facecolor="white")
        plt.close(figure)
    return picture.getvalue()


def _columns(transcript: StreamTranscript) -> list[int]:
    """The slots to draw: all but an opening turn in which nobody says anything."""
    said = {turn.slot: turn.text for turn in transcript.turns}
    return [
        index
        for index, slot in enumerate(transcript.slots)
        if not slot.opens_turn or said.get(index) or slot.speaks or slot.reference_speaks
    ]


def _draw_top(axis, transcript: StreamTranscript, slot: int, frames_FCHW: np.ndarray, left: float, top: float) -> None:
    record = transcript.slots[slot]
    y = top + _TIME
    middle = left + _COLUMN / 2
    if record.opens_turn:
        turn = next(turn for turn in transcript.turns if turn.slot == slot)
        title = "cuts in" if turn.interrupts else "user"
        axis.text(middle, top + _TIME / 2, f"{title}  {record.time_s:g} s", ha="center", va="center", color=USER)
        _box(axis, left, y, _COLUMN, _COLUMN, "#f3eefc", USER)
        words = _wrapped(turn.text, 11, 5) or "…"
        axis.text(middle, y + _COLUMN / 2, words, ha="center", va="center", color=USER, linespacing=1.15)
        return
    marks = []
    if any(revision.evidence_slot == slot for revision in transcript.revisions):
        marks.append(("◆", SLOT_COLOURS["revise"][0]))
    if any(confirmation.slot == slot for confirmation in transcript.confirmations):
        marks.append(("◇", MUTED))
    axis.text(middle, top + _TIME / 2, f"{record.time_s:g} s", ha="center", va="center", color=MUTED)
    for number, (mark, colour) in enumerate(marks):
        axis.text(middle + 0.26 + 0.14 * number, top + _TIME / 2, mark, ha="center", va="center", color=colour)
    if record.frame < len(frames_FCHW):
        image_HWC = np.moveaxis(frames_FCHW[record.frame], 0, -1)
        axis.imshow(
            image_HWC, extent=(left, left + _COLUMN, y + _COLUMN, y), aspect="auto", interpolation="nearest", zorder=1
        )
        axis.add_patch(plt.Rectangle((left, y), _COLUMN, _COLUMN, fill=False, edgecolor=GRID, linewidth=0.8, zorder=2))


def _draw_slot(axis, cell: _Cell, left: float, top: float) -> None:
    fill, ink = SLOT_COLOURS[cell.colour]
    width = _COLUMN + _GAP if cell.goes_on else _COLUMN
    if cell.goes_on:  # a bridge to the next slot, under both
        axis.add_patch(
            plt.Rectangle((left + _COLUMN / 2, top + 0.06), width, _SLOT - 0.12, facecolor=fill, linewidth=0, zorder=1)
        )
    edge = GRID if cell.colour == "unknown" else None
    _box(axis, left, top, _COLUMN, _SLOT, fill, edge)
    if cell.fault is not None:
        style = "solid" if cell.fault == "timing" else (0, (3, 1.5))
        _box(axis, left, top, _COLUMN, _SLOT, "none", ERROR, 2.2, style, zorder=4)
    silent = cell.colour in ("silence", "unknown")
    text = {"silence": "·", "unknown": "?"}[cell.colour] if silent else _wrapped(cell.text, 12, 3)
    size = _FONT if text.count("\n") < 2 else _FONT - 1.5
    axis.text(
        left + _COLUMN / 2,
        top + _SLOT / 2,
        text,
        ha="center",
        va="center",
        color=ink,
        fontsize=size,
        linespacing=1.05,
        zorder=5,
    )


def _box(axis, left, top, width, height, fill, edge=None, line=1.0, style="solid", zorder=2.0) -> None:
    inset = 0.02  # the line of a box lies inside its column
    axis.add_patch(
        FancyBboxPatch(
            (left + inset, top + inset),
            width - 2 * inset,
            height - 2 * inset,
            boxstyle="round,pad=0,rounding_size=0.07",
            facecolor=fill,
            edgecolor=edge or "none",
            linewidth=line if edge else 0.0,
            linestyle=style,
            zorder=zorder,
        )
    )


def _wrapped(text: str, columns: int, lines: int) -> str:
    """Words in lines of at most `columns` letters; what does not fit into `lines` is left out, with "…"."""
    text = text.replace("$", r"\$")  # a pair of dollars would be read as mathematics
    return "\n".join(
        textwrap.wrap("".join(c if c.isprintable() else "▯" for c in text), columns, max_lines=lines, placeholder="…")
    )
