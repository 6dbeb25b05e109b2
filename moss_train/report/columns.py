"""A stream as columns of a picture: one per slot, long stretches in which nothing begins or ends as one.

A column holds, from top to bottom, the time, the frame (or the user's words), the reference's slot and the model's.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from moss_train.evaluate.findings import Due, Finding, dues, model_findings, reference_findings, slot_faults
from moss_train.evaluate.judges import Judge
from moss_train.evaluate.transcript import StreamTranscript

#: a stream of so many columns is drawn slot by slot, whatever happens in it
SHORT = 28
#: slots of a quiet stretch that are still drawn one by one: how it begins, and what came before it ends
_BEFORE, _AFTER = 2, 2
#: fewer than these are not worth hiding
_LEAST_HIDDEN = 4


@dataclass(frozen=True)
class Cell:
    """One slot of one side, ready to be drawn."""

    state: str  #: "silence", "speak", "revise" or "unknown"
    text: str
    goes_on: bool  #: the reply continues in the next slot
    fault: str | None = None  #: "timing", "answer" or None
    finding: int | None = None  #: index of the reply that begins in this slot


@dataclass(frozen=True)
class Column:
    """Slots `first` … `last`, one unless it is a quiet stretch."""

    first: int
    last: int

    @property
    def slots(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class StreamColumns:
    """All that the picture of one stream is made from."""

    transcript: StreamTranscript
    columns: list[Column]
    reference: list[Cell]  #: per slot
    model: list[Cell]
    reference_findings: list[Finding]
    model_findings: list[Finding]
    dues: list[Due]
    answer_changes: frozenset[int]  #: slots at which the evidence of a revision is there
    something_changes: frozenset[int]  #: slots at which something changes that leaves the answer as it is

    def column_of(self, slot: int) -> int | None:
        """Number of the column that shows `slot`."""
        number = bisect_right(self.columns, slot, key=lambda column: column.first) - 1
        return number if number >= 0 and slot <= self.columns[number].last else None

    @property
    def has_reference(self) -> bool:
        return any(slot.reference_state != "unknown" for slot in self.transcript.slots)


def stream_columns(transcript: StreamTranscript, judge: Judge, window_frames: int) -> StreamColumns:
    """What to draw of a stream. `window_frames`: how late an answer may be, as in `EvaluationConfig`."""
    reference_replies = reference_findings(transcript, judge, window_frames)
    model_replies = model_findings(transcript, judge, window_frames)
    reference, model = reference_cells(transcript, reference_replies), model_cells(transcript, model_replies, judge)
    answer_changes = frozenset(revision.evidence_slot for revision in transcript.revisions)
    something_changes = frozenset(confirmation.slot for confirmation in transcript.confirmations)
    said = {turn.slot: turn.text for turn in transcript.turns}
    # an opening turn in which nobody says anything is no column
    shown = [
        ordinal
        for ordinal, slot in enumerate(transcript.slots)
        if not slot.opens_turn or said.get(ordinal) or slot.speaks or slot.reference_speaks
    ]
    eventful = {
        ordinal
        for ordinal in shown
        if transcript.slots[ordinal].opens_turn
        or ordinal in answer_changes
        or ordinal in something_changes
        or _is_eventful(reference, ordinal)
        or _is_eventful(model, ordinal)
    }
    columns = [Column(ordinal, ordinal) for ordinal in shown]
    if len(shown) > SHORT:
        columns = _collapsed(shown, eventful)
    return StreamColumns(
        transcript,
        columns,
        reference,
        model,
        reference_replies,
        model_replies,
        dues(transcript, judge, window_frames),
        answer_changes,
        something_changes,
    )


def _is_eventful(cells: Sequence[Cell], ordinal: int) -> bool:
    """Whether a reply begins or ends here."""
    cell, before = cells[ordinal], cells[ordinal - 1] if ordinal else None
    if before is None or before.state != cell.state or before.goes_on != cell.goes_on:
        return True
    return cell.finding is not None or (cell.state in ("speak", "revise") and not cell.goes_on)


def _collapsed(shown: Sequence[int], eventful: set[int]) -> list[Column]:
    columns: list[Column] = []
    quiet: list[int] = []

    def close(at_end: bool) -> None:
        after = 1 if at_end else _AFTER
        if len(quiet) - _BEFORE - after >= _LEAST_HIDDEN:
            hidden = quiet[_BEFORE : len(quiet) - after]
            columns.extend(Column(slot, slot) for slot in quiet[:_BEFORE])
            columns.append(Column(hidden[0], hidden[-1]))
            columns.extend(Column(slot, slot) for slot in quiet[len(quiet) - after :])
        else:
            columns.extend(Column(slot, slot) for slot in quiet)
        quiet.clear()

    for slot in shown:
        if slot in eventful:
            close(at_end=False)
            columns.append(Column(slot, slot))
        else:
            quiet.append(slot)
    close(at_end=True)
    return columns


def reference_cells(transcript: StreamTranscript, findings: Sequence[Finding]) -> list[Cell]:
    """The reference's slots."""
    revisions = {revision.id for revision in transcript.revisions}
    starts = {finding.reply.slot: number for number, finding in enumerate(findings)}
    cells = []
    for index, slot in enumerate(transcript.slots):
        state = "speak" if slot.reference_speaks else slot.reference_state
        if slot.reference_speaks and slot.reference_event in revisions:
            state = "revise"
        following = transcript.slots[index + 1 : index + 2]
        goes_on = slot.reference_speaks and bool(following) and following[0].reference_state == "continue"
        cells.append(Cell(state, slot.reference_text, goes_on, None, starts.get(index)))
    return cells


def model_cells(transcript: StreamTranscript, findings: Sequence[Finding], judge: Judge) -> list[Cell]:
    """The model's slots: a reply that differs from the last one of its turn is a revision."""
    finding_of = {
        slot: number
        for number, finding in enumerate(findings)
        for slot in range(finding.reply.slot, finding.reply.last_slot + 1)
    }
    faults = slot_faults(transcript, judge)
    cells = []
    for index, slot in enumerate(transcript.slots):
        number = finding_of.get(index)
        state, begins = "silence", None
        if slot.speaks and number is not None:
            state = "speak" if findings[number].replaces is None else "revise"
            begins = number if findings[number].reply.slot == index else None
        following = transcript.slots[index + 1 : index + 2]
        goes_on = slot.speaks and bool(following) and following[0].state == "continue" and not slot.ends
        cells.append(Cell(state, slot.text, goes_on, faults[index], begins))
    return cells
