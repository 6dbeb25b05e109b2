"""What stands under a clip at each moment: the user's words, the model's as they come, the answer it has taken back."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from moss_train.evaluate.judges import TextJudge
from moss_train.evaluate.schedule import Step
from moss_train.report.words import visible
from moss_train.streams.growing_text import Decoder, GrowingText

KINDS = ("user", "text", "end", "silence")
#: what the model is doing; what comes later is the rarer and hides what comes earlier
MODES = ("silence", "speak", "revise")


@dataclass(frozen=True)
class CaptionEvent:
    """Something that happens at `time_s`, seconds of the clip.

    `kind`: "user" (says `text`, which opens a turn and cuts a running reply), "text" (`text` is added to the model's
    reply, or begins one), "end" (the reply is complete), "silence" (the model decides to say nothing).
    """

    time_s: float
    kind: str
    text: str = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: legal values are {', '.join(KINDS)}")


@dataclass(frozen=True)
class Shown:
    """What stands under the clip, from `time_s` on until the next one."""

    time_s: float
    mode: str = "silence"  #: "silence", "speak" or "revise"
    mode_since_s: float = 0.0
    user: str = ""
    text: str = ""  #: the model's last reply as far as it has come
    revised: bool = False  #: that reply replaces `old`
    old: str = ""  #: the answer that is taken back, or that the user has cut
    cut: bool = False  #: `old` was cut by the user


class Decoded(Protocol):
    """What the model did in one slot, see `evaluate.decoder.SlotOutput`."""

    state: str
    ids: list[int]
    ends: bool


def captions_of(
    steps: Sequence[Step],
    outputs: Sequence[Decoded],
    tokenizer: Decoder,
    tokens_per_second: float,
    token_times_s: Sequence[Sequence[float]] | None = None,
) -> list[CaptionEvent]:
    """The events of a played clip.

    Args:
        steps: the user's turns and the frames, in order.
        outputs: what the model did after each.
        tokens_per_second: rate of speech; token k of a slot is shown k / rate after the slot's time, but not after it
            has ended.
        token_times_s: when each token of each slot was really chosen, in seconds of the clip, where that is known.

    A letter that takes several tokens comes with the last of them.
    """
    events: list[CaptionEvent] = []
    said = GrowingText(tokenizer)
    for number, (step, output) in enumerate(zip(steps, outputs, strict=True)):
        if step.user is not None and step.user.strip():
            events.append(CaptionEvent(step.time_s, "user", step.user))
        if output.state == "silence":
            events.append(CaptionEvent(step.time_s, "silence"))
            continue
        if output.state == "speak" or step.user is not None:
            said = GrowingText(tokenizer)
        time_s = step.time_s
        for place, token in enumerate(output.ids):
            time_s = min(step.time_s + place / tokens_per_second, step.end_s)
            if token_times_s is not None:
                time_s = token_times_s[number][place]
            if new := said.add(token):
                events.append(CaptionEvent(time_s, "text", new))
        if output.ends:
            end_s = min(time_s + 1 / tokens_per_second, step.end_s) if token_times_s is None else time_s
            events.append(CaptionEvent(max(end_s, time_s), "end"))
    return events


class CaptionTrack:
    """The states of a clip's captions, in order."""

    def __init__(self, events: Sequence[CaptionEvent]):
        ordered = sorted(events, key=lambda event: event.time_s)  # stable: what comes at one moment keeps its order
        self.states = [Shown(0.0), *_states(ordered, _revisions(ordered))]
        self._times = [state.time_s for state in self.states]
        lasting = [*np.flatnonzero(np.diff(self._times)), len(self.states) - 1]  # of those of one moment the last
        modes = np.array([MODES.index(self.states[index].mode) for index in lasting])
        self._lasting_s = np.array(self._times)[lasting]
        #: [mode, n]: how many of the first n lasting states have this mode
        self._counts = np.cumsum(np.pad(modes == np.arange(len(MODES))[:, None], ((0, 0), (1, 0))), axis=1)
        asked = [b.time_s for a, b in zip(self.states, self.states[1:], strict=False) if a.user != b.user]
        self._asked_s = np.array(asked)

    def index_at(self, time_s: float) -> int:
        """Index into `states` of what is shown at `time_s`."""
        return max(0, bisect_right(self._times, time_s + 1e-6) - 1)

    def at(self, time_s: float) -> Shown:
        return self.states[self.index_at(time_s)]

    def modes_between(self, edges_s: np.ndarray) -> np.ndarray:
        """int [N]: index into `MODES` of the rarest that stands somewhere in [edges_s[n], edges_s[n + 1]), by search:
        it takes no longer when the clip is long."""
        first = np.maximum(np.searchsorted(self._lasting_s, edges_s[:-1], "right") - 1, 0)
        end = np.maximum(np.searchsorted(self._lasting_s, edges_s[1:], "left"), first + 1)
        found = self._counts[:, end] > self._counts[:, first]
        return len(MODES) - 1 - np.argmax(found[::-1], axis=0)

    def asked_between(self, begins_s: np.ndarray, ends_s: np.ndarray) -> np.ndarray:
        """bool [N]: whether the user says something new in [begins_s[n], ends_s[n])."""
        return np.searchsorted(self._asked_s, ends_s, "left") > np.searchsorted(self._asked_s, begins_s, "left")


def _revisions(events: Sequence[CaptionEvent]) -> list[str | None]:
    """Per reply, the answer that it replaces: the one before it in its turn, if it gives another one. Known only when
    the reply is complete, but shown from its first word on."""
    replies: list[tuple[str, bool]] = []  # words, whether it is the first of its turn
    speaking, fresh = False, True
    for event in events:
        if event.kind == "text":
            if speaking:
                replies[-1] = (replies[-1][0] + event.text, replies[-1][1])
            else:
                replies.append((event.text, fresh))
            speaking, fresh = True, False
        else:
            speaking = False
            fresh = fresh or event.kind == "user"
    judge = TextJudge()
    replaced: list[str | None] = []
    for (words, first), (earlier, _) in zip(replies, [("", True), *replies], strict=False):
        same = first or words.strip() == earlier.strip() or judge.same_answer(words, earlier)
        replaced.append(None if same else earlier)
    return replaced


def _states(events: Sequence[CaptionEvent], replaced: Sequence[str | None]) -> Iterator[Shown]:
    state, raw, replies, speaking = Shown(0.0), "", 0, False
    for event in events:
        state = replace(state, time_s=event.time_s)
        if event.kind == "user":
            old = state.text if speaking else ""
            state = replace(state, user=visible(event.text), text="", revised=False, old=old, cut=bool(old))
        if event.kind == "text":
            if not speaking:
                old = replaced[replies]
                raw, replies = "", replies + 1
                mode = "speak" if old is None else "revise"
                state = replace(state, mode=mode, mode_since_s=event.time_s)
                state = replace(state, revised=old is not None, old=visible(old or ""), cut=False)
            raw += event.text
            speaking = True
            state = replace(state, text=visible(raw))
        elif speaking:
            speaking = False
            state = replace(state, mode="silence", mode_since_s=event.time_s)
        yield state
