"""What an annotation says when, as the events of a stream in which one speaks at a time.

Annotations overlap, crowd and come between two frames; a stream does not allow it (`timeline.py`). So everything keeps
its order and waits its turn: a reply starts at the first frame at or after its time at which nobody speaks, replies
that fall to the same frame become one, and a question waits until the reply before it has been said (unless the stream
ends first: then it cuts the reply). How long a reply takes is estimated from its characters at the reference's rate, so
that ordinary text takes no longer under any tokenizer in use; where a sample's texts are extraordinary, or the recipe's
`tokens_per_second` is lower, the compiler may still refuse it.
"""

import math
from dataclasses import dataclass
from typing import Literal

from moss_train.errors import SampleError
from moss_train.streams.config import CompilerConfig
from moss_train.streams.importers.common import Imported, describe_media
from moss_train.streams.media import SAME_MOMENT_S, stream_frame_count
from moss_train.streams.schema import parse_sample

#: characters of a token: the small tokenizer that is shipped has 1.7 in a sentence, those of large models 4
CHARACTERS_PER_TOKEN = 1.5
#: a short text may have shorter tokens: so many more than the above are allowed for
MORE_TOKENS = 3
#: what comes after the end of a stream comes so long before it
LAST_MOMENT_S = 0.01
#: a reply that had to wait longer than this would no longer fit what is seen
LONGEST_WAIT_S = 10.0


@dataclass
class Saying:
    """One thing said, as an annotation has it."""

    role: Literal["user", "assistant"]
    t: float  #: seconds of the video's clock
    text: str
    where: str  #: field of the row, for messages
    evidence: tuple[float, float] | None = None  #: assistant: when the video shows it


@dataclass(frozen=True)
class Watch:
    """The frames of a stream: start_s + k / fps below end_s."""

    fps: float
    start_s: float
    end_s: float

    def sampling(self) -> dict:
        return {"fps": self.fps, "start_s": self.start_s, "end_s": self.end_s}

    def frames(self) -> int:
        return stream_frame_count(self.fps, self.start_s, self.end_s)

    def time(self, frame: int) -> float:
        return self.start_s + frame / self.fps

    def first_from(self, time_s: float) -> int:
        """The first frame at or after `time_s`."""
        return max(0, math.ceil((time_s - self.start_s) * self.fps - SAME_MOMENT_S))

    def last_until(self, time_s: float) -> int:
        """The last frame at or before `time_s`; -1 before the first."""
        return math.floor((time_s - self.start_s) * self.fps + SAME_MOMENT_S)


def watch_until(last_s: float, fps: float, from_s: float = 0.0) -> Watch:
    """A stream whose last frame arrives exactly at `last_s`, and whose first is the earliest from `from_s` on.

    For annotations that do not tell how long the video is: what they time lies inside it, the frame after may not.
    """
    steps = math.floor(max(0.0, last_s - from_s) * fps + SAME_MOMENT_S)
    start_s = max(0.0, last_s - steps / fps)
    return Watch(fps, start_s, last_s + min(0.5 / fps, 0.1))


def spoken_s(text: str) -> float:
    """Seconds that a text takes, estimated from above; of other scripts than Latin, every byte may be a token."""
    plain = sum(character.isascii() for character in text)
    tokens = plain / CHARACTERS_PER_TOKEN + len(text.encode()) - plain
    return (math.ceil(tokens) + MORE_TOKENS) / CompilerConfig.tokens_per_second


def stream_of(key: str, video: str, watch: Watch, events: list[dict], metadata: dict, **fields) -> Imported:
    """The stream sample of one watched video, checked, with the source path of its video."""
    media, members = describe_media([("video", video)], key)
    data = {"schema": "moss_train/stream@1", "id": key, "media": media, "sampling": watch.sampling(), "events": events}
    return parse_sample(data | fields | {"source_metadata": metadata}, key), members


def hold_talk(sayings: list[Saying], watch: Watch, key: str) -> list[dict]:
    """The events of a stream (ids q0…, a0…), in which each saying waits its turn.

    Sayings are taken by their times, equal times in the given order. A reply at the very time of the question right
    before it answers at once. What is to be said after the last frame is said at the last frame. Raises SampleError
    when a reply would have to wait more than LONGEST_WAIT_S, or is due before the stream starts.
    """
    talk = _Talk(watch, key)
    for saying in sorted(sayings, key=lambda saying: saying.t):
        if saying.role == "user":
            talk.ask(saying)
        else:
            talk.reply(saying)
    return talk.events


class _Talk:
    def __init__(self, watch: Watch, key: str):
        self.events: list[dict] = []
        self._watch = watch
        self._key = key
        self._free = 0  #: the first frame at which a reply may start
        self._asked_at = -1.0  #: when the annotation has the last question, which may have had to wait
        self._counts = {"q": 0, "a": 0}

    def ask(self, saying: Saying) -> None:
        watch = self._watch
        t = max(saying.t, watch.start_s)
        if self.events:
            before = self.events[-1]
            t = max(t, before["t"] + (spoken_s(before["text"]) if before["role"] == "assistant" else 0.0))
        t = min(t, watch.end_s - LAST_MOMENT_S)
        self.events.append({"id": self._id("q"), "t": t, "role": "user", "text": saying.text})
        self._asked_at = saying.t
        opens = t <= watch.start_s + SAME_MOMENT_S
        self._free = max(self._free, 0 if opens else watch.last_until(t) + 1)

    def reply(self, saying: Saying) -> None:
        watch, last_frame = self._watch, self._watch.frames() - 1
        if saying.t < watch.start_s - 1.0 / watch.fps:
            raise SampleError(self._key, f"{saying.where}: {saying.t} s is before the stream starts ({watch.start_s})")
        if self._last_is("user") and (self._asked_at == saying.t or self._free > last_frame):
            self._say(saying, self.events[-1]["t"], self.events[-1]["id"])
            return
        due = min(watch.first_from(saying.t), last_frame)
        before = self.events[-1] if self._last_is("assistant") else None
        if before is not None and (due <= watch.last_until(before["t"]) or self._free > last_frame):
            self._add_to(before, saying)
            return
        frame = max(due, self._free)
        if watch.time(frame) - saying.t > LONGEST_WAIT_S + 1.0 / watch.fps:
            raise SampleError(
                self._key,
                f"{saying.where}: what is said before it leaves no room until {watch.time(frame)} s, more than "
                f"{LONGEST_WAIT_S} s after its time; shorten the texts",
            )
        self._say(saying, watch.time(frame))

    def _say(self, saying: Saying, t: float, answers: str | None = None) -> None:
        event = {"id": self._id("a"), "t": t, "role": "assistant", "kind": "speak", "text": saying.text}
        if answers is None and self._counts["q"] == 1:  # of several questions, the annotation does not say which
            answers = "q0"
        event |= {"reply_to": answers} if answers else {}
        self.events.append(event)
        self._see(event, saying)
        self._take(event)

    def _add_to(self, event: dict, saying: Saying) -> None:
        """Two replies in one frame are one reply; the same words are said once."""
        if saying.text not in event["text"]:
            event["text"] += " " + saying.text
        self._see(event, saying)
        self._take(event)

    def _see(self, event: dict, saying: Saying) -> None:
        """Evidence lies inside the stream and before the reply; of a reply made of several it spans them all."""
        if saying.evidence is None:
            return
        start_s, end_s = (min(max(time_s, self._watch.start_s), event["t"]) for time_s in saying.evidence)
        earlier = event.get("evidence", [start_s, end_s])
        event["evidence"] = [min(start_s, earlier[0]), max(end_s, earlier[1])]

    def _take(self, event: dict) -> None:
        until_s = event["t"] + spoken_s(event["text"])
        self._free = max(self._watch.first_from(until_s), self._watch.last_until(event["t"]) + 1)

    def _last_is(self, role: str) -> bool:
        return bool(self.events) and self.events[-1]["role"] == role

    def _id(self, letter: str) -> str:
        self._counts[letter] += 1
        return f"{letter}{self._counts[letter] - 1}"
