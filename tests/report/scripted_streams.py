"""Streams told slot by slot, for what a page has to show: revisions, interruptions, mistakes, long silences.

`python tests/report/scripted_streams.py page.html` writes a page of them to look at.
"""

import colorsys
import sys
from pathlib import Path

import numpy as np

from moss_train.evaluate.transcript import Confirmation, Question, Revision, SlotRecord, StreamTranscript, UserTurn


class Script:
    """A transcript under construction: `user`, `frame`, then `done`. One frame a second."""

    def __init__(self, key: str):
        self.key = key
        self.slots: list[SlotRecord] = []
        self.turns: list[UserTurn] = []
        self.frames = 0

    def user(self, text: str, interrupts: bool = False, after_s: float = 0.5) -> int:
        """The user speaks after the last frame; returns the slot of the turn."""
        time_s = max(0.0, self.frames - 1 + after_s) if self.frames else 0.0
        self.turns.append(UserTurn(time_s, text, len(self.slots), interrupts))
        self._slot(self.frames - 1, True, time_s, "", "", 0.97)
        return len(self.slots) - 1

    def frame(
        self, reference: str = "", model: str = "", event: str | None = None, silence: float | None = None
    ) -> int:
        """A frame arrives; words that end in "…" go on in the next slot, words that begin with "…" go on from the last.
        Returns the frame's slot."""
        self.frames += 1
        silence = (0.06 if model else 0.96 - 0.02 * (self.frames % 3)) if silence is None else silence
        self._slot(self.frames - 1, False, float(self.frames - 1), reference, model, silence, event)
        return len(self.slots) - 1

    def silence(self, frames: int) -> None:
        for _ in range(frames):
            self.frame()

    def _slot(self, frame, opens_turn, time_s, reference, model, silence, event=None) -> None:
        def side(words: str) -> tuple[str, str, bool]:
            state = "continue" if words.startswith("…") else "speak" if words else "silence"
            return state, words.strip("…"), bool(words) and not words.endswith("…")

        self.slots.append(
            SlotRecord(frame, opens_turn, time_s, *side(reference), event if reference else None, *side(model), silence)
        )

    def done(self, questions=(), revisions=(), confirmations=(), **notes) -> StreamTranscript:
        return StreamTranscript(
            self.key,
            tuple(self.turns),
            tuple(self.slots),
            tuple(questions),
            tuple(revisions),
            tuple(confirmations),
            dict(notes),
        )


def eventful_stream() -> StreamTranscript:
    """Two minutes and a half with everything in it; the model is stale once, revises falsely once, and is late once."""
    script = Script("workshop")
    asked = script.user("What colour is the block that the man holds?")
    script.silence(3)
    first = script.frame("It is…", "It is…", "a1")
    script.frame("… red.", "… red.", "a1")
    script.silence(2)
    changes = script.frame("Now blue.", "", "a2")
    script.frame("", "Now blue.")
    script.silence(2)
    holds = script.frame("", "")
    script.silence(42)
    changes_again = script.frame("Now green.", "Now blue.", "a3")
    script.silence(3)
    holds_again = script.frame("", "Now it is yellow.")
    script.silence(4)
    asked_how = script.user("How was the box made, step by step?")
    said = script.frame("First the…", "First the…", "a4")
    script.frame("… boards are sawn…", "… boards are sawn…", "a4")
    script.frame("… then glued…", "… then glued…", "a4")
    stop = script.user("Stop. Where is the saw?", interrupts=True)
    where = script.frame("On the left.", "On the right.", "a5")
    script.silence(55)
    moved = script.frame("Now at the top.", "Now at the top.", "a6")
    script.silence(20)
    return script.done(
        questions=[
            Question("q1", asked, "It is red.", "a1", first, first, True),
            Question("q2", asked_how, "First the boards are sawn then glued", "a4", said, 0, False),
            Question("q3", stop, "On the left.", "a5", where, 0, False),
        ],
        revisions=[
            Revision("a2", "It is red.", "Now blue.", first, changes),
            Revision("a3", "Now blue.", "Now green.", changes, changes_again),
            Revision("a6", "On the left.", "Now at the top.", where, moved),
        ],
        confirmations=[Confirmation(holds, "Now blue."), Confirmation(holds_again, "Now green.")],
    )


def moving_frames(count: int, height: int = 90, width: int = 160) -> np.ndarray:
    """uint8 [F, 3, H, W]: a block that moves and changes its colour, in a square tile padded with black."""
    side = max(height, width)
    frames = np.zeros((count, 3, side, side), np.uint8)
    yy, xx = np.mgrid[:height, :width]
    for number in range(count):
        shade = (200 - 60 * yy / height + 10 * np.sin(xx / 7 + number)).astype(np.uint8)
        frames[number, :, :height, :width] = shade
        colour = np.array(colorsys.hsv_to_rgb(0.003 * number % 1, 0.85, 0.9)) * 255
        left = int((0.5 + 0.4 * np.sin(number / 9)) * (width - height // 3))
        frames[number, :, height // 3 : 2 * height // 3, left : left + height // 3] = colour[:, None, None]
    return frames


if __name__ == "__main__":
    from moss_train.evaluate.judges import TextJudge
    from moss_train.report.html import document, legend
    from moss_train.report.stream_view import stream_view

    stream = eventful_stream()
    html = stream_view(stream, moving_frames(len(stream.slots)), TextJudge())
    Path(sys.argv[1]).write_text(document("scripted streams", legend() + html), encoding="utf-8")
