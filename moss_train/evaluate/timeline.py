"""What happens in one stream, in the order in which it happens: user turns and frames, without any reply.

The order and the header slots are read from the compiled stream, so free-running evaluation meets every event between
the same two frames as training did.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moss_train.errors import SampleError
from moss_train.evaluate.transcript import (
    Confirmation,
    Question,
    Revision,
    SlotRecord,
    StreamTranscript,
    UserTurn,
    reference_utterances,
)
from moss_train.streams.compiled import CompiledStream, FrameRequest, Slot

_SAME_TIME = 1e-6  # seconds; times come from decimal JSON and from products with the frame rate


@dataclass(frozen=True)
class Step:
    """One event and the slot it opens: the user says something (`user` is not None) or a frame arrives."""

    time_s: float
    user: str | None
    budget: int  #: most tokens that may be said in this slot


@dataclass(frozen=True)
class Timeline:
    """The events of one stream. `steps[0]` is the first user turn, whose text may be empty."""

    key: str
    system: str | None
    steps: tuple[Step, ...]
    frames: tuple[FrameRequest, ...]  #: the frames to show, in order of arrival

    def __post_init__(self) -> None:
        if not self.steps or self.steps[0].user is None:
            raise ValueError("a timeline starts with a user turn")
        shown = sum(step.user is None for step in self.steps)
        if shown != len(self.frames):
            raise ValueError(f"{shown} frames arrive but {len(self.frames)} are given")


def slot_budget(seconds: float, tokens_per_second: float) -> int:
    """How many tokens are said in a slot of `seconds`: at least one, so that no slot is mute by rounding."""
    return max(1, math.floor(seconds * tokens_per_second + _SAME_TIME))


def user_texts(events: Sequence[Any], slots: Sequence[Slot]) -> list[Any]:
    """The user event of each slot that opens a turn; None for an empty first turn that no event asks for."""
    users = [event for event in events if event.role == "user"]
    turns = sum(slot.frame < 0 for slot in slots)
    return [None] * (turns - len(users)) + users


def build_timeline(sample: Any, compiled: CompiledStream, tokens_per_second: float) -> Timeline:
    """The events of a `stream` sample, in the order of its compiled slots.

    Raises SampleError when the sample is no stream or its user turns are not those of the compiled stream.
    """
    if not compiled.slots:
        raise SampleError(compiled.key, f"is a {compiled.kind}; only streams can be evaluated free-running")
    users = user_texts(sample.events, compiled.slots)
    turns = [slot for slot in compiled.slots if slot.frame < 0]
    if len(users) != len(turns) or len(users) - len([user for user in users if user is not None]) > 1:
        raise SampleError(compiled.key, f"has {len(users)} user turns where the compiled stream has {len(turns)}")
    texts = iter(users)
    times = [slot.time_s for slot in compiled.slots]
    usual = min((b - a for a, b in _frame_gaps(compiled.slots)), default=1.0)
    steps = []
    for index, slot in enumerate(compiled.slots):
        until = times[index + 1] if index + 1 < len(times) else slot.time_s + usual
        user = None
        if slot.frame < 0:
            event = next(texts)
            user = "" if event is None else event.text
        steps.append(Step(slot.time_s, user, slot_budget(until - slot.time_s, tokens_per_second)))
    return Timeline(compiled.key, sample.system, tuple(steps), compiled.frames)


def _frame_gaps(slots: Sequence[Slot]) -> list[tuple[float, float]]:
    times = [slot.time_s for slot in slots if slot.frame >= 0]
    return list(zip(times, times[1:], strict=False))


def reference_transcript(sample: Any, compiled: CompiledStream) -> StreamTranscript:
    """The reference's side of the transcript, with the items that the figures score; the model's side is silent.

    Questions, revisions and confirmations come from `source_metadata` where the sample has them (times in seconds,
    see `data/world.py`); otherwise questions and revisions are read from the events' links and evidence.
    """
    slots: list[SlotRecord] = []
    frame = -1
    for slot in compiled.slots:
        frame = slot.frame if slot.frame >= 0 else frame
        slots.append(
            SlotRecord(
                frame=frame,
                opens_turn=slot.frame < 0,
                time_s=slot.time_s,
                reference_state=slot.state,
                reference_text=slot.text,
                reference_ends=slot.ends,
                reference_event=slot.event_id,
            )
        )
    headers = [ordinal for ordinal, slot in enumerate(slots) if slot.opens_turn]
    users = user_texts(sample.events, compiled.slots)
    turns, asked = [], {}
    for ordinal, event in zip(headers, users, strict=True):
        if event is not None:
            asked[event.id] = ordinal
        turns.append(
            UserTurn(
                time_s=slots[ordinal].time_s,
                text="" if event is None else event.text,
                slot=ordinal,
                interrupts=event is not None and event.kind == "interrupt",
            )
        )
    started = {reply.event: reply.slot for reply in reference_utterances(tuple(slots))}
    items = _Items(sample, slots, asked, started)
    return StreamTranscript(
        compiled.key,
        tuple(turns),
        tuple(slots),
        tuple(items.questions()),
        tuple(items.revisions()),
        tuple(items.confirmations()),
    )


class _Items:
    """The questions, revisions and confirmations of one stream, with their times turned into slots."""

    def __init__(self, sample: Any, slots: Sequence[SlotRecord], asked: dict[str, int], started: dict[str, int]):
        self._metadata = sample.source_metadata or {}
        self._events = {event.id: event for event in sample.events}
        self._slots = slots
        self._asked = asked  # user event → slot that its turn opens
        self._started = started  # assistant event → slot in which the reference starts it

    def _slot_at(self, time_s: float) -> int | None:
        """The slot of the first frame that arrives at `time_s` or later."""
        for ordinal, slot in enumerate(self._slots):
            if not slot.opens_turn and slot.time_s >= time_s - _SAME_TIME:
                return ordinal
        return None

    def questions(self) -> list[Question]:
        rows = self._metadata.get("questions")
        if rows is None:
            rows = self._questions_of_events()
        found = []
        for row in rows:
            if row["id"] not in self._asked or row["answer_id"] not in self._started:
                continue  # outside of what was sampled
            found.append(
                Question(
                    id=row["id"],
                    asked_slot=self._asked[row["id"]],
                    answer=row["answer"],
                    answer_event=row["answer_id"],
                    answer_slot=self._started[row["answer_id"]],
                    evidence_slot=self._slot_at(row["evidence_t"]) or 0,
                    evidence_after=row["evidence_t"] > row["asked_t"] + _SAME_TIME,
                )
            )
        return found

    def _questions_of_events(self) -> list[dict[str, Any]]:
        rows, answered = [], set()
        for event in self._events.values():
            question = self._events.get(event.reply_to) if event.role == "assistant" else None
            if question is None or question.id in answered or event.kind == "revise":
                continue
            answered.add(question.id)
            rows.append(
                {
                    "id": question.id,
                    "asked_t": question.t,
                    "evidence_t": event.evidence[0] if event.evidence else question.t,
                    "answer_id": event.id,
                    "answer": event.text,
                }
            )
        return rows

    def revisions(self) -> list[Revision]:
        rows = self._metadata.get("revisions")
        if rows is None:
            rows = self._revisions_of_events()
        found = []
        for row in rows:
            evidence_slot = self._slot_at(row["t"])
            if row["id"] not in self._started or evidence_slot is None:
                continue
            found.append(
                Revision(
                    id=row["id"],
                    old=row["old"],
                    new=row["new"],
                    since_slot=min(self._started.get(row["supersedes"], 0), evidence_slot),
                    evidence_slot=evidence_slot,
                )
            )
        return found

    def _revisions_of_events(self) -> list[dict[str, Any]]:
        return [
            {
                "id": event.id,
                "t": event.evidence[1] if event.evidence else event.t,
                "old": self._events[event.supersedes].text,
                "new": event.text,
                "supersedes": event.supersedes,
            }
            for event in self._events.values()
            if event.role == "assistant" and event.supersedes is not None
        ]

    def confirmations(self) -> list[Confirmation]:
        found = []
        for row in self._metadata.get("confirmations", []):
            slot = self._slot_at(row["t"])
            if slot is not None:
                found.append(Confirmation(slot, row["standing"]))
        return found
