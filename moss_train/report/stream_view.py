"""One evaluated stream as a part of the page: what was on screen, what the reference and the model say and when.

Columns are slots (`columns.py`); arrows lead from a reply to the one whose answer it replaces, above the reference's
row and below the model's. Everything is HTML and inline SVG: words can be selected, searched, read aloud and printed.

Shape suffixes: F frames, C colour channels, H, W pixels.
"""

from collections.abc import Callable, Sequence

import numpy as np

from moss_train.evaluate.findings import Finding
from moss_train.evaluate.judges import Judge
from moss_train.evaluate.transcript import StreamTranscript
from moss_train.report.clips import choose_clips
from moss_train.report.columns import Cell, Column, StreamColumns, stream_columns
from moss_train.report.said_table import reply_id, said_table, seconds_text
from moss_train.report.thumbnails import thumbnails, without_padding
from moss_train.report.words import escaped

#: of one stream on the page, pictures included
MOST_BYTES = 150_000
#: columns of a stream in one line; a longer stream goes on in the next line, unless it is only a little longer
_LINE_COLUMNS, _MOST_LINE_COLUMNS = 14, 16
#: a stream that does not fit is drawn as far as this
_MOST_COLUMNS = 9 * _LINE_COLUMNS
_LEAST_PICTURE_BYTES = 24_000
#: units of the arrows' and curves' drawings, in which a column is `_UNIT` wide
_UNIT, _ARC_HEIGHT, _CURVE_HEIGHT = 88.0, 24.0, 26.0
_NOTHING = "nobody asks"


def stream_views(
    transcripts: Sequence[StreamTranscript],
    frames_of: Callable[[str], np.ndarray],
    judge: Judge,
    count: int = 12,
    window_frames: int = 2,
) -> list[str]:
    """The HTML of chosen streams. `frames_of(key)` gives a stream's frames, uint8 RGB [F, 3, H, W], as the model saw
    them; `window_frames` is that of the evaluation."""
    return [
        stream_view(transcript, np.asarray(frames_of(transcript.key)), judge, number, window_frames)
        for number, transcript in enumerate(choose_clips(transcripts, count), 1)
    ]


def stream_view(
    transcript: StreamTranscript, frames_FCHW: np.ndarray, judge: Judge, number: int = 1, window_frames: int = 2
) -> str:
    """The HTML of one stream, at most `MOST_BYTES` long. `number` tells its anchors from those of other streams on the
    page."""
    view = stream_columns(transcript, judge, window_frames)
    name = f'<h3><a href="#s{number}" title="only this stream">{escaped(transcript.key, 200)}</a></h3>'
    caption = f'<p class="caption">· {stream_caption(view)}</p>'
    title = f'<div class="title">{name} {caption} <a class="all" href="#">all streams</a></div>'
    table = said_table(view, number)
    bare = len((title + table + _lines(view, {}, False, number)).encode())
    frames_FCHW = without_padding(frames_FCHW)
    wanted = [transcript.slots[column.first].frame for column in _drawn(view) if _shows_frame(view, column)]
    pictures = thumbnails(frames_FCHW, wanted, max(_LEAST_PICTURE_BYTES, MOST_BYTES - bare - 4000))
    tiny = bool(frames_FCHW.size) and max(frames_FCHW.shape[2:]) <= 80
    return (
        f'<article class="card stream" id="s{number}">{title}'
        f'<div class="scroll">{_lines(view, pictures, tiny, number)}</div>{table}</article>'
    )


def stream_caption(view: StreamColumns) -> str:
    """`1 question · 2 revisions · 3 of 20 slots wrong`."""
    transcript = view.transcript
    parts = [
        _plural(len(transcript.questions), "question"),
        _plural(len(transcript.revisions), "revision"),
        _plural(len(transcript.confirmations), "confirmation"),
    ]
    told = " · ".join(part for part in parts if part) or _NOTHING
    if not view.has_reference:
        return _plural(len(view.model_findings), "reply", "replies") or "silent throughout"
    wrong = sum(cell.fault is not None for cell in view.model)
    told += f" · {f'{wrong} of {len(transcript.slots)} slots wrong' if wrong else 'no mistake'}"
    stale = sum(finding.stale for finding in view.model_findings)
    false = sum(finding.false_revision for finding in view.model_findings)
    marked = [_plural(stale, "stale answer"), _plural(false, "false revision")]
    return " · ".join([told, *(f'<span class="bad-tag">{text}</span>' for text in marked if text)])


def _plural(number: int, name: str, many: str | None = None) -> str:
    return f"{number} {name if number == 1 else many or name + 's'}" if number else ""


def _drawn(view: StreamColumns) -> list[Column]:
    return view.columns[:_MOST_COLUMNS]


def _shows_frame(view: StreamColumns, column: Column) -> bool:
    return column.slots == 1 and not view.transcript.slots[column.first].opens_turn


def _lines(view: StreamColumns, pictures: dict[int, str], tiny: bool, number: int) -> str:
    drawn = _drawn(view)
    most = _line_columns(view)
    lines = [
        _line(view, start, drawn[start : start + most], pictures, tiny, number) for start in range(0, len(drawn), most)
    ]
    label = f"timeline of {escaped(view.transcript.key, 200)}, slot by slot; what is said stands in the table below it"
    rest = view.columns[len(drawn) :]
    cut = f'<p class="caption">… and {rest[-1].last - rest[0].first + 1} more slots</p>' if rest else ""
    return f'<div role="group" aria-label="{label}">{"".join(lines)}{cut}</div>'


def _line_columns(view: StreamColumns) -> int:
    return len(view.columns) if _LINE_COLUMNS < len(view.columns) <= _MOST_LINE_COLUMNS else _LINE_COLUMNS


def _line(
    view: StreamColumns, start: int, columns: Sequence[Column], pictures: dict[int, str], tiny: bool, number: int
) -> str:
    rows = ["<b></b>", *(_time(view, column) for column in columns)]
    rows += ["<b></b>", *(_top(view, column, pictures, tiny) for column in columns)]
    if view.has_reference:
        arcs = _arcs(view, _links(view, "r"), start, len(columns), above=True)
        rows += ["<b></b>", arcs] if arcs else []
        rows += ["<b>reference</b>", *(_cell(view, view.reference, column, "r", number) for column in columns)]
    rows += ["<b>model</b>", *(_cell(view, view.model, column, "m", number) for column in columns)]
    arcs = _arcs(view, _links(view, "m"), start, len(columns), above=False)
    rows += ["<b></b>", arcs] if arcs else []
    notes = [_note(view, column) for column in columns]
    if any(notes):
        rows += ["<b></b>", *(f'<div class="n">{note}</div>' for note in notes)]
    if any(slot.silence_probability is not None for slot in view.transcript.slots):
        rows += ['<b title="probability of silence at the decision: 1 above, 0 below">P(silence)</b>']
        rows += [_silence_curve(view, columns)]
    return f'<div class="line" style="--columns: {_line_columns(view)}">{"".join(rows)}</div>'


def _time(view: StreamColumns, column: Column) -> str:
    slot = view.transcript.slots[column.first]
    if column.slots > 1:
        return f'<div class="t">{seconds_text(slot.time_s)} …</div>'
    if slot.opens_turn:
        turn = next((turn for turn in view.transcript.turns if turn.slot == column.first), None)
        if turn is None or not turn.text:  # the stream opens, nobody has asked anything
            return f'<div class="t">{seconds_text(slot.time_s)}</div>'
        title = "cuts in" if turn.interrupts else "user"
        return f'<div class="t u">{title} {seconds_text(slot.time_s)}</div>'
    marks = ""
    if column.first in view.answer_changes:
        marks += ' <span class="mark" title="the answer changes">◆</span>'
    if column.first in view.something_changes:
        marks += ' <span title="something changes, the answer holds">◇</span>'
    return f'<div class="t">{seconds_text(slot.time_s)}{marks}</div>'


def _top(view: StreamColumns, column: Column, pictures: dict[int, str], tiny: bool) -> str:
    """The frame, the user's words, or how long nothing happens."""
    slots = view.transcript.slots
    slot = slots[column.first]
    if column.slots > 1:
        after = slots[column.last + 1].time_s if column.last + 1 < len(slots) else slots[column.last].time_s
        quiet = all(cells[column.first].state in ("silence", "unknown") for cells in (view.reference, view.model))
        what = "silent" if quiet else "nothing new"
        return f'<div class="f g"><span>… {seconds_text(after - slot.time_s)} {what} …</span></div>'
    if slot.opens_turn:
        words = next((turn.text for turn in view.transcript.turns if turn.slot == column.first), "")
        if not words:
            return '<div class="f g"><span>nothing asked yet</span></div>'
        return f'<div class="f u"><span dir="auto">{escaped(words, 120)}</span></div>'
    address = pictures.get(slot.frame)
    if address is None:
        return '<div class="f none"></div>'
    style = ' class="tiny"' if tiny else ""
    return f'<div class="f"><img{style} alt="frame at {seconds_text(slot.time_s)}" src="{address}"></div>'


def _cell(view: StreamColumns, cells: Sequence[Cell], column: Column, side: str, number: int) -> str:
    cell, last = cells[column.first], cells[column.last]
    style = f"c {cell.state}"
    style += " on" if last.goes_on else ""
    style += " from" if column.first and cells[column.first - 1].goes_on else ""
    style += f" {cell.fault}" if cell.fault else ""
    words = "".join(cells[slot].text for slot in range(column.first, column.last + 1))
    if cell.state not in ("speak", "revise"):
        return f'<div class="{style}"></div>'
    shown = escaped(words, 60) or "…"
    whole = f' title="{escaped(words, 300)}"' if len(words) > 24 else ""
    if cell.finding is None:
        return f'<div class="{style}"{whole}><span dir="auto">{shown}</span></div>'
    return f'<div class="{style}"{whole}><a dir="auto" href="#{reply_id(number, side, cell.finding)}">{shown}</a></div>'


def _note(view: StreamColumns, column: Column) -> str:
    """How late the reply that begins here is, and what the figures hold against it."""
    cell = view.model[column.first]
    if cell.finding is None:
        return ""
    finding, notes = view.model_findings[cell.finding], []
    if finding.stale:
        notes.append('<span class="bad-tag">stale</span>')
    if finding.false_revision:
        notes.append('<span class="bad-tag">false revision</span>')
    if finding.delay_frames and finding.delay_frames > _reference_delay(view, finding):
        notes.append(f"+{_plural(finding.delay_frames, 'frame')}")
    return " ".join(notes)


def _reference_delay(view: StreamColumns, finding: Finding) -> int:
    """Frames that the reference takes for the same; a question between two frames is answered at the second."""
    delays = [other.delay_frames for other in view.reference_findings if other.due == finding.due]
    return min((delay for delay in delays if delay is not None), default=0)


def _links(view: StreamColumns, side: str) -> list[tuple[int, int]]:
    """(column of a reply, column of the one it replaces), of one side."""
    findings = view.reference_findings if side == "r" else view.model_findings
    links = []
    for finding in findings:
        if finding.replaces is not None:
            ends = view.column_of(finding.reply.slot), view.column_of(findings[finding.replaces].reply.slot)
            if ends[0] is not None and ends[1] is not None:
                links.append((ends[0], ends[1]))
    return links


def _arcs(view: StreamColumns, links: Sequence[tuple[int, int]], start: int, count: int, above: bool) -> str:
    """The arrows, or the parts of them, that run over columns `start` … `start + count - 1`."""
    end, height = start + count, _ARC_HEIGHT
    near, far = (height, 3.0) if above else (0.0, height - 3.0)
    towards = -5.0 if above else 5.0  # an arrow's head stands this far from the row
    full = _line_columns(view) * _UNIT
    shapes = []
    for later, earlier in links:
        if later < start or earlier >= end:
            continue
        tail, head = (later - start + 0.44) * _UNIT, (earlier - start + 0.56) * _UNIT
        if later >= end:  # the rest of the arrow is in a line below
            path = f"M{full:.0f} {far:.0f}"
        else:
            path = f"M{tail:.0f} {near:.0f}Q{tail:.0f} {far:.0f} {tail - 14:.0f} {far:.0f}"
        if earlier < start:
            path += "H0"
        else:
            path += f"H{head + 14:.0f}Q{head:.0f} {far:.0f} {head:.0f} {near + towards:.0f}"
            tip = near - (0.5 if above else -0.5)
            base = near + 1.6 * towards
            shapes.append(f'<path class="head" d="M{head:.0f} {tip:.1f}l-5 {base - tip:.1f}h10z"/>')
        shapes.append(f'<path class="arc" d="{path}"/>')
    if not shapes:
        return ""
    return f'<svg class="arcs" viewBox="0 0 {full:.0f} {height:.0f}" aria-hidden="true">{"".join(shapes)}</svg>'


def _silence_curve(view: StreamColumns, columns: Sequence[Column]) -> str:
    """P(silence) of each decision in the middle of its column; a quiet stretch's are squeezed into its column."""
    low, high = _CURVE_HEIGHT - 3, 3.0
    pieces: list[list[str]] = [[]]
    for place, column in enumerate(columns):
        for nth in range(column.slots):
            probability = view.transcript.slots[column.first + nth].silence_probability
            if probability is None:
                pieces.append([])
                continue
            x = (place + (nth + 0.5) / column.slots) * _UNIT
            y = low - min(1.0, max(0.0, probability)) * (low - high)
            pieces[-1].append(f"{x:.0f},{y:.1f}")
    width, full = len(columns) * _UNIT, _line_columns(view) * _UNIT
    drawn = [f'<path class="rule" d="M0 {y:.0f}H{width:.0f}"/>' for y in (low, high)]
    drawn += [f'<polyline class="curve" points="{" ".join(piece)}"/>' for piece in pieces if len(piece) > 1]
    for piece in pieces:
        if len(piece) == 1:
            x, y = piece[0].split(",")
            drawn.append(f'<circle class="dot" cx="{x}" cy="{y}" r="2"/>')
    return f'<svg viewBox="0 0 {full:.0f} {_CURVE_HEIGHT:.0f}" aria-hidden="true">{"".join(drawn)}</svg>'
