"""How long a reply takes: its tokens at a rate, laid into the slots between frames as the stream compiler does it.

A reply that starts at time t has said at most `rate x (time since t)` tokens by the end of a slot, and at least one in
each (`streams/timeline.py`). With a spread, each reply is spoken at its own rate, as a decoder under changing load
does: then its words are written as `chunks`, so that they keep their slots whatever the recipe's rate is.
"""

import hashlib
import math
from dataclasses import dataclass

from moss_train.streams.importers.talk import Watch
from moss_train.streams.tokenizer import StreamTokenizer


@dataclass(frozen=True)
class Utterance:
    """A reply laid into slots."""

    text: str
    t: float
    free_frame: int  #: the first frame at which another reply may start
    over_s: float  #: when its last token has been said
    chunks: list[tuple[float, str]] | None = None  #: [slot, text]; None: the compiler emits it at the recipe's rate


@dataclass(frozen=True)
class Pace:
    """The rate at which replies are spoken, on the frames of one stream."""

    watch: Watch
    tokenizer: StreamTokenizer
    tokens_per_second: float
    spread: float = 0.0  #: each reply's rate lies in [1 - spread, 1 + spread] x tokens_per_second
    seed: str = ""

    def frames(self, text: str) -> int:
        """Frames that a reply occupies when it starts at one."""
        return self._lay(len(self.tokenizer.encode(text)), self.watch.time(0), self.tokens_per_second)[0]

    def say(self, text: str, t: float) -> Utterance:
        """`text` from `t` on: at a frame, or right after a question between two frames. The last frame takes what is
        left, as nothing arrives after it."""
        rate = self.tokens_per_second * (1.0 + self.spread * (2.0 * self._coin(text, t) - 1.0))
        if self.spread:
            chunks = self._chunks(text, t, rate)
            free = self.watch.last_until(chunks[-1][0]) + 1
            over_s = self.watch.time(free) if free < self.watch.frames() else self.watch.end_s
            return Utterance(text, t, free, over_s, chunks)
        return Utterance(text, t, *self._lay(len(self.tokenizer.encode(text)), t, rate))

    def _lay(self, tokens: int, t: float, rate: float) -> tuple[int, float]:
        """The first free frame, and when the last token has been said."""
        watch, last = self.watch, self.watch.frames() - 1
        following = watch.last_until(t) + 1  # the frame that ends the first slot
        said = 0
        while True:
            if following > last:
                return last + 1, max(watch.end_s, t + tokens / rate)
            said = max(said + 1, int(rate * (watch.time(following) - t) + 1e-6))
            if said >= tokens:
                return following, min(watch.time(following), t + tokens / rate)
            following += 1

    def _chunks(self, text: str, t: float, rate: float) -> list[tuple[float, str]]:
        """Whole words in the slots in which they are over, at least one in each."""
        words = text.split(" ")
        words = [words[0], *(" " + word for word in words[1:])]
        watch, last = self.watch, self.watch.frames() - 1
        chunks, slot_s, following, said = [], t, watch.last_until(t) + 1, 0
        while words:
            held = ""
            allowed = math.inf if following > last else rate * (watch.time(following) - t)
            while words and (not held or said + len(self.tokenizer.encode(words[0])) <= allowed):
                held += words[0]
                said += len(self.tokenizer.encode(words.pop(0)))
            chunks.append((slot_s, held))
            slot_s, following = watch.time(min(following, last)), following + 1
        return chunks

    def _coin(self, text: str, t: float) -> float:
        digest = hashlib.sha256(f"{self.seed}/{t:.6f}/{text}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64
