"""What was said in one stream, as a table in order of time: every reply with how late it is and what it replaces."""

from collections.abc import Iterator, Sequence

from moss_train.evaluate.findings import Due, Finding
from moss_train.evaluate.transcript import StreamTranscript
from moss_train.report.columns import StreamColumns
from moss_train.report.words import escaped

#: rows of one table; the rest stands in the transcripts alone
_MOST_ROWS = 120
#: letters of one reply
_MOST_LETTERS = 500
#: a longer table is closed until the reader opens it
_OPEN_ROWS = 24
_BAD, _GOOD = '<span class="bad-tag">{}</span>', '<span class="good-tag">{}</span>'


def reply_id(number: int, side: str, index: int) -> str:
    """The anchor of a reply: `s3m0` is the first one of the model in stream 3, `s3r0` the reference's."""
    return f"s{number}{side}{index}"


def said_table(view: StreamColumns, number: int) -> str:
    """The table; `number` is the stream's on the page. Empty where nothing happened."""
    rows = [html for _, _, html in sorted(_rows(view, number), key=lambda row: row[:2])]
    if not rows:
        return ""
    more = len(rows) - _MOST_ROWS
    cut = f'<p class="caption">… and {more} more in the transcript</p>' if more > 0 else ""
    opened = " open" if len(rows) <= _OPEN_ROWS else ""
    head = "<tr><th>time</th><th>who</th><th>says</th><th>after its evidence</th><th></th></tr>"
    return (
        f'<details class="said"{opened}><summary>what was said, and when</summary><div class="scroll">'
        f"<table><thead>{head}</thead><tbody>{''.join(rows[:_MOST_ROWS])}</tbody></table></div>{cut}</details>"
    )


def _rows(view: StreamColumns, number: int) -> Iterator[tuple[int, int, str]]:
    """(slot, place among the rows of the slot, HTML)."""
    transcript = view.transcript
    missed = {(due.slot, due.answer) for due in _missed(view)}
    for turn in transcript.turns:
        if turn.text:
            about = [question for question in transcript.questions if question.asked_slot == turn.slot]
            notes = ["cuts in"] if turn.interrupts else []
            for question in about:
                if (max(question.asked_slot, question.evidence_slot), question.answer) in missed:
                    notes.append(_BAD.format("not answered rightly in time"))
            yield turn.slot, 0, _row(turn.time_s, "user", "user", escaped(turn.text, _MOST_LETTERS), "", notes)
    for revision in transcript.revisions:
        words = f"◆ the answer changes from “{escaped(revision.old, 160)}” to “{escaped(revision.new, 160)}”"
        notes = [_BAD.format("not revised in time")] if (revision.evidence_slot, revision.new) in missed else []
        yield revision.evidence_slot, 1, _row(transcript.slots[revision.evidence_slot].time_s, "", "", words, "", notes)
    for confirmation in transcript.confirmations:
        words = f"◇ something changes, “{escaped(confirmation.answer, 200)}” still holds"
        yield confirmation.slot, 1, _row(transcript.slots[confirmation.slot].time_s, "", "", words, "", [])
    for place, side, who, findings in (
        (2, "r", "reference", view.reference_findings),
        (3, "m", "model", view.model_findings),
    ):
        followers = {finding.replaces: index for index, finding in enumerate(findings) if finding.replaces is not None}
        for index, finding in enumerate(findings):
            yield (
                finding.reply.slot,
                place,
                _row(
                    transcript.slots[finding.reply.slot].time_s,
                    who,
                    "revise" if finding.replaces is not None else "speak",
                    _words(finding, index in followers),
                    _lag(transcript, finding, side),
                    _notes(transcript, findings, finding, followers.get(index), number, side),
                    reply_id(number, side, index),
                ),
            )


def _missed(view: StreamColumns) -> list[Due]:
    """What the model did not say in time; see `evaluate.findings.dues`."""
    return [due for due in view.dues if due.missed]


def _row(
    time_s: float, who: str, colour: str, words: str, lag: str, notes: Sequence[str], anchor: str | None = None
) -> str:
    key = f'<span class="chip key {colour}"></span>{who}' if who else ""
    name = f' id="{anchor}"' if anchor else ""
    return (
        f'<tr{name}><td>{seconds_text(time_s)}</td><td class="who">{key}</td><td class="words" dir="auto">{words}</td>'
        f'<td class="lag">{lag}</td><td class="notes">{" · ".join(notes)}</td></tr>'
    )


def _words(finding: Finding, superseded: bool) -> str:
    words = escaped(finding.reply.text, _MOST_LETTERS) or "…"
    return f'<s class="old">{words}</s>' if superseded else words


def _lag(transcript: StreamTranscript, finding: Finding, side: str) -> str:
    parts = []
    if finding.delay_frames is not None and finding.delay_s is not None:
        frames = f"{finding.delay_frames} frame{'' if finding.delay_frames == 1 else 's'}"
        parts.append(f"{frames}, {seconds_text(finding.delay_s)}" if finding.delay_s > 0 else "at once")
    elif finding.early:
        parts.append("before it")
    spent_s = _spent_s(transcript, finding.reply.slot) if side == "m" else None
    if spent_s is not None:
        parts.append(f"{1000 * spent_s:.0f} ms by the clock")
    return " · ".join(parts)


def _spent_s(transcript: StreamTranscript, slot: int) -> float | None:
    """Seconds of the wall clock from the slot's event to the first word out, of a stream that was live."""
    emitted_s = transcript.slots[slot].emitted_s
    return None if emitted_s is None else emitted_s - transcript.slots[slot].time_s


def _notes(
    transcript: StreamTranscript,
    findings: Sequence[Finding],
    finding: Finding,
    follower: int | None,
    number: int,
    side: str,
) -> list[str]:
    notes = []
    if finding.replaces is not None:
        notes.append(f"replaces {_link(transcript, findings, finding.replaces, number, side)}")
    if follower is not None:
        notes.append(f"replaced by {_link(transcript, findings, follower, number, side)}")
    if side == "m":
        if finding.right is not None and not (finding.stale or finding.false_revision):
            notes.append(_GOOD.format("right") if finding.right else _BAD.format("wrong"))
        notes += [_BAD.format("stale answer")] if finding.stale else []
        notes += [_BAD.format("false revision")] if finding.false_revision else []
    if not finding.reply.complete:
        notes.append("cut off")
    return notes


def _link(transcript: StreamTranscript, findings: Sequence[Finding], index: int, number: int, side: str) -> str:
    reply = findings[index].reply
    words, time = escaped(reply.text, 40) or "…", seconds_text(transcript.slots[reply.slot].time_s)
    return f'<a href="#{reply_id(number, side, index)}">“<bdi>{words}</bdi>” of {time}</a>'


def seconds_text(seconds: float) -> str:
    """`0.5 s`, `42 s`, `3:05`."""
    if seconds >= 120:
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
    return f"{seconds:.2f}".rstrip("0").rstrip(".") + " s"
