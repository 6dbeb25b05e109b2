"""What is written down about one evaluated stream; figures and pictures are made from nothing else.

Everything here is plain data that survives a round trip through JSON.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class UserTurn:
    """One user turn: the first opens the stream, the later ones arrive while it runs."""

    time_s: float
    text: str
    slot: int  #: ordinal of the slot that the assistant header of this turn opens
    interrupts: bool = False  #: True when it cuts a running reply of the reference


@dataclass(frozen=True)
class SlotRecord:
    """One slot: what the reference says in it and what the model says in it.

    `frame` counts the frames that have arrived, minus one: the slot at the anchor of frame k has `frame = k`,
    the slot that opens a turn has the frame that arrived last (-1 before the first).
    """

    frame: int
    opens_turn: bool  #: True for the slot after the header of an assistant turn
    time_s: float
    reference_state: str  #: "silence", "speak", "continue" or "unknown" (not scored)
    reference_text: str
    reference_ends: bool
    reference_event: str | None
    state: str = "silence"  #: the model's own: "silence", "speak" or "continue"
    text: str = ""
    ends: bool = False  #: the model closed its reply in this slot
    silence_probability: float | None = None  #: of the decision; None where no decision was read
    tokens: int = 0  #: text tokens that the model says here
    reference_tokens: int = 0  #: text tokens that the reference says here
    labels: int = 0  #: teacher-forced: labels of the reference's reply here, its stop silence included
    labels_right: int = 0  #: of these, how many from the first on are the most probable ones
    labels_nll: float = 0.0  #: sum of their cross-entropies, nats
    emitted_s: float | None = None  #: live: when the first token was out, in seconds of the wall clock since the start

    @property
    def speaks(self) -> bool:
        """Whether the model says anything in this slot."""
        return self.state != "silence"

    @property
    def reference_speaks(self) -> bool:
        return self.reference_state in ("speak", "continue")


@dataclass(frozen=True)
class Utterance:
    """One reply, put together from its slots. `slot`, `last_slot` are ordinals into the transcript's slots."""

    text: str
    slot: int
    last_slot: int
    complete: bool
    event: str | None = None  #: the reference's event; None for what the model says
    tokens: int = 0


@dataclass(frozen=True)
class Question:
    """A user's question and the reply that the reference gives first."""

    id: str
    asked_slot: int  #: slot that its turn opens
    answer: str
    answer_event: str
    answer_slot: int  #: slot in which the reference starts to answer
    evidence_slot: int  #: first slot at which the evidence is complete; 0 when nothing says where it is
    evidence_after: bool  #: True when the question must wait for its evidence


@dataclass(frozen=True)
class Revision:
    """The evidence changes and with it the answer: `old` is to be replaced by `new`."""

    id: str
    old: str
    new: str
    since_slot: int  #: slot from which `old` could have been said
    evidence_slot: int


@dataclass(frozen=True)
class Confirmation:
    """Something changes, the answer does not: the model should stay silent. `answer` is what still holds."""

    slot: int
    answer: str


@dataclass(frozen=True)
class RolledForward:
    """A reply that a teacher-forced model did not begin in time, and what it did when the silence went on."""

    slot: int  #: in which the reference begins the reply
    frames: int  #: how many further frames it was shown, each but the last followed by silence
    spoke_after: int | None  #: at the how manieth of them it spoke, from 1; None: at none


@dataclass(frozen=True)
class StreamTranscript:
    """All that is known about one stream after it was evaluated."""

    key: str
    turns: tuple[UserTurn, ...]
    slots: tuple[SlotRecord, ...]
    questions: tuple[Question, ...] = ()
    revisions: tuple[Revision, ...] = ()
    confirmations: tuple[Confirmation, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)  #: free figures, e.g. tokens generated
    end_s: float | None = None  #: when the stream ends, seconds
    rolled: tuple[RolledForward, ...] = ()  #: teacher-forced, of replies that were begun at none of their turns' slots

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "StreamTranscript":
        return cls(
            key=data["key"],
            turns=tuple(UserTurn(**turn) for turn in data["turns"]),
            slots=tuple(SlotRecord(**slot) for slot in data["slots"]),
            questions=tuple(Question(**question) for question in data["questions"]),
            revisions=tuple(Revision(**revision) for revision in data["revisions"]),
            confirmations=tuple(Confirmation(**confirmation) for confirmation in data["confirmations"]),
            notes=dict(data["notes"]),
            end_s=data["end_s"],
            rolled=tuple(RolledForward(**rolled) for rolled in data["rolled"]),
        )

    def as_reference(self) -> "StreamTranscript":
        """The transcript that a perfect model leaves: the reference in the model's place."""
        slots = tuple(
            replace(
                slot,
                state=slot.reference_state if slot.reference_speaks else "silence",
                text=slot.reference_text,
                ends=slot.reference_ends,
                tokens=slot.reference_tokens,
            )
            for slot in self.slots
        )
        return replace(self, slots=slots)


def model_utterances(slots: tuple[SlotRecord, ...]) -> list[Utterance]:
    """The model's replies in order. A reply ends at its stop silence, at a silent slot or at a user turn."""
    return _utterances([(slot.state, slot.text, slot.ends, slot.opens_turn, None, slot.tokens) for slot in slots])


def reference_utterances(slots: tuple[SlotRecord, ...]) -> list[Utterance]:
    """The reference's replies in order; each knows its event."""
    return _utterances(
        [
            (
                slot.reference_state if slot.reference_speaks else "silence",
                slot.reference_text,
                slot.reference_ends,
                slot.opens_turn,
                slot.reference_event,
                slot.reference_tokens,
            )
            for slot in slots
        ]
    )


def _utterances(said: list[tuple[str, str, bool, bool, str | None, int]]) -> list[Utterance]:
    replies: list[Utterance] = []
    running = False
    for ordinal, (state, text, ends, opens_turn, event, tokens) in enumerate(said):
        if state == "silence":
            running = False
            continue
        if running and state == "continue" and not opens_turn:
            previous = replies[-1]
            replies[-1] = replace(
                previous,
                text=previous.text + text,
                last_slot=ordinal,
                complete=ends,
                tokens=previous.tokens + tokens,
            )
        else:
            replies.append(Utterance(text, ordinal, ordinal, ends, event, tokens))
        running = not ends
    return replies


def write_transcripts(transcripts: Iterable[StreamTranscript], path: Path) -> None:
    """One transcript a line (`StreamTranscript.to_json`), whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for transcript in transcripts:
            file.write(json.dumps(transcript.to_json(), ensure_ascii=False) + "\n")
    os.replace(partial, path)
