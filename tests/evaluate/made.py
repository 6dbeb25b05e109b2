"""Hand-made transcripts. One slot per frame and second: "." silence, words otherwise; "…" at the end of a slot's text
means that the reply goes on in the next slot; "?" opens a turn (a header slot, which may hold text after it). A word
counts as a token."""

from moss_train.evaluate.judges import TextJudge
from moss_train.evaluate.metrics import streaming_figures
from moss_train.evaluate.transcript import SlotRecord, StreamTranscript


def make(reference: str, model: str, questions=(), revisions=(), confirmations=()) -> StreamTranscript:
    """Cells are separated by "|". Reference events are numbered a1, a2, … in order of their start."""
    slots, frame, count = [], -1, 0
    running = {"reference": False, "model": False}

    def read(cell: str, side: str, opens: bool):
        cell = cell.strip().removeprefix("?").strip()
        if cell == ".":
            running[side] = False
            return "silence", "", False
        continues = cell.endswith("…")
        state = "continue" if running[side] and not opens else "speak"
        running[side] = continues
        return state, cell.removesuffix("…"), not continues

    for reference_cell, model_cell in zip(reference.split("|"), model.split("|"), strict=True):
        opens = reference_cell.strip().startswith("?")
        frame += not opens
        if reference_cell.strip() == "unknown":
            reference_state, reference_text, reference_ends = "unknown", "", False
        else:
            reference_state, reference_text, reference_ends = read(reference_cell, "reference", opens)
        state, text, ends = read(model_cell, "model", opens)
        count += reference_state == "speak"
        event = f"a{count}" if reference_state in ("speak", "continue") else None
        slots.append(
            SlotRecord(
                frame,
                opens,
                float(max(frame, 0)),
                reference_state,
                reference_text,
                reference_ends,
                event,
                state,
                text,
                ends,
                tokens=len(text.split()),
                reference_tokens=len(reference_text.split()),
            )
        )
    return StreamTranscript("k", (), tuple(slots), tuple(questions), tuple(revisions), tuple(confirmations))


def figures(*transcripts: StreamTranscript, window: int = 2) -> dict[str, float]:
    return streaming_figures(transcripts, TextJudge(), window)
