"""What happens to a stream, in the order in which it happens: user turns and frames, without any reply.

Order and duration of the slots come from the stream compiler's own timeline, so free-running evaluation, and a live
clip, meet every event between the same two frames as training did.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
from moss_train.streams.compiled import CompiledStream
from moss_train.streams.config import CompilerConfig
from moss_train.streams.media import SAME_MOMENT_S
from moss_train.streams.schema import Confirm, Reply, StreamSample
from moss_train.streams.timeline import TimelineSlot, build_timeline
from moss_train.streams.tokenizer import StreamTokenizer


@dataclass(frozen=True)
class Step:
    """One event and the slot it opens: the user says something (`user` is not None) or a frame arrives."""

    time_s: float
    end_s: float  #: when the next event ends the slot; infinity for the last one
    user: str | None
    turn_ends_s: tuple[float, ...] = ()  #: when the slots of this turn end, all of them
    place: int = 0  #: of this slot among them


@dataclass(frozen=True)
class Schedule:
    """The events of one stream. `steps[0]` is the first user turn, whose text may be empty."""

    key: str
    system: str | None
    steps: tuple[Step, ...]

    @property
    def frames(self) -> int:
        return sum(step.user is None for step in self.steps)


def schedule_of(sample: StreamSample, slots: Sequence[TimelineSlot]) -> Schedule:
    """The events of the compiler's slots."""
    steps = []
    for slot in slots:
        user = None
        if slot.opens_turn:
            user = "" if slot.question is None else slot.question.text
        steps.append(Step(slot.time_s, slot.end_s, user))
    steps[-1] = Step(steps[-1].time_s, math.inf, steps[-1].user)
    first = 0
    while first < len(steps):
        end = next((n for n in range(first + 1, len(steps)) if steps[n].user is not None), len(steps))
        ends_s = tuple(step.end_s for step in steps[first:end])
        steps[first:end] = [replace(step, turn_ends_s=ends_s, place=n) for n, step in enumerate(steps[first:end])]
        first = end
    return Schedule(sample.key, sample.system, tuple(steps))


def read_stream(
    sample: StreamSample, compiled: CompiledStream, config: CompilerConfig, tokenizer: StreamTokenizer
) -> tuple[Schedule, StreamTranscript]:
    """What happens to the stream, and its transcript with the model's side still silent.

    Questions, revisions and confirmations come from `source_metadata` where the sample has them (times in seconds,
    see `data/synthetic/world.py`); otherwise they are read from the events' links and evidence.
    Raises SampleError when the sample is no stream.
    """
    if not isinstance(sample, StreamSample):
        raise SampleError(sample.key, f"is a {compiled.kind}; only streams can be evaluated while they run")
    arrivals = [slot.time_s for slot in compiled.slots if slot.frame >= 0]
    timeline = build_timeline(sample, arrivals, config, tokenizer)
    if [slot.frame for slot in timeline] != [slot.frame for slot in compiled.slots]:
        raise SampleError(sample.key, "was compiled with another configuration than it is evaluated with")
    return schedule_of(sample, timeline), _transcript(sample, compiled, timeline)


def _transcript(sample: StreamSample, compiled: CompiledStream, timeline: Sequence[TimelineSlot]) -> StreamTranscript:
    slots: list[SlotRecord] = []
    turns: list[UserTurn] = []
    asked: dict[str, int] = {}
    frame = -1
    for ordinal, (slot, event) in enumerate(zip(compiled.slots, timeline, strict=True)):
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
                reference_tokens=0 if event.piece is None else len(event.piece.ids),
            )
        )
        if event.opens_turn:
            user = event.question
            if user is None:
                turns.append(UserTurn(slot.time_s, "", ordinal))
            else:
                turns.append(UserTurn(slot.time_s, user.text, ordinal, user.kind == "interrupt"))
                asked[user.id] = ordinal
    started: dict[str, int] = {}
    for reply in reference_utterances(tuple(slots)):
        if reply.event is not None:
            started.setdefault(reply.event, reply.slot)
    items = _Items(sample, slots, asked, started)
    return StreamTranscript(
        compiled.key,
        tuple(turns),
        tuple(slots),
        tuple(items.questions()),
        tuple(items.revisions()),
        tuple(items.confirmations()),
        end_s=sample.sampling.end_s,
    )


class _Items:
    """The questions, revisions and confirmations of one stream, with their times turned into slots."""

    def __init__(
        self, sample: StreamSample, slots: Sequence[SlotRecord], asked: dict[str, int], started: dict[str, int]
    ):
        self._metadata = sample.source_metadata or {}
        self._replies = [event for event in sample.events if isinstance(event, Reply)]
        self._confirms = [event for event in sample.events if isinstance(event, Confirm)]
        self._asked_at = {event.id: event.t for event in sample.events if event.role == "user"}
        self._slots = slots
        self._asked = asked  # user event → slot that its turn opens
        self._started = started  # reply → slot in which the reference starts it

    def _slot_at(self, time_s: float) -> int | None:
        """The slot of the first frame that arrives at `time_s` or later."""
        for ordinal, slot in enumerate(self._slots):
            if not slot.opens_turn and slot.time_s >= time_s - SAME_MOMENT_S:
                return ordinal
        return None

    def questions(self) -> list[Question]:
        rows = self._metadata.get("questions")
        if rows is None:
            rows = self._questions_of_replies()
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
                    evidence_after=row["evidence_t"] > row["asked_t"] + SAME_MOMENT_S,
                )
            )
        return found

    def _questions_of_replies(self) -> list[dict]:
        rows: dict[str, dict] = {}
        for reply in self._replies:
            if reply.reply_to is None or reply.kind == "revise" or reply.reply_to in rows:
                continue
            asked_t = self._asked_at[reply.reply_to]
            rows[reply.reply_to] = {
                "id": reply.reply_to,
                "asked_t": asked_t,
                "evidence_t": reply.evidence[0] if reply.evidence else asked_t,
                "answer_id": reply.id,
                "answer": reply.text,
            }
        return list(rows.values())

    def revisions(self) -> list[Revision]:
        rows = self._metadata.get("revisions")
        if rows is None:
            rows = self._revisions_of_replies()
        found = []
        for row in rows:
            evidence_slot = self._slot_at(row["t"])
            if row["id"] not in self._started or evidence_slot is None:
                continue
            since_slot = min(self._started.get(row["supersedes"], 0), evidence_slot)
            found.append(Revision(row["id"], row["old"], row["new"], since_slot, evidence_slot))
        return found

    def _revisions_of_replies(self) -> list[dict]:
        texts = {reply.id: reply.text for reply in self._replies}
        return [
            {
                "id": reply.id,
                "t": reply.evidence[1] if reply.evidence else reply.t,
                "old": texts[reply.supersedes],
                "new": reply.text,
                "supersedes": reply.supersedes,
            }
            for reply in self._replies
            if reply.supersedes is not None
        ]

    def confirmations(self) -> list[Confirmation]:
        found = []
        rows = self._metadata.get("confirmations")
        if rows is None:
            rows = self._confirmations_of_events()
        for row in rows:
            slot = self._slot_at(row["t"])
            if slot is not None:
                found.append(Confirmation(slot, row["standing"]))
        return found

    def _confirmations_of_events(self) -> list[dict]:
        texts = {reply.id: reply.text for reply in self._replies}
        return [{"t": event.t, "standing": texts[event.confirms]} for event in self._confirms]
