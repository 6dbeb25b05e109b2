"""How fast a live stream is: latencies of frames, first tokens and rates, at constant memory however long it runs."""

import math
from collections import deque
from collections.abc import Sequence

from moss_train.evaluate.conversation import Said

_RECENT = 1024  #: measurements of each kind that percentiles are taken over


class _Times:
    """Seconds of one kind: all of them counted, the recent ones kept."""

    def __init__(self) -> None:
        self.count, self.total, self.most = 0, 0.0, 0.0
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def add(self, seconds: float) -> None:
        self.count, self.total, self.most = self.count + 1, self.total + seconds, max(self.most, seconds)
        self._recent.append(seconds)

    def percentile(self, part: float) -> float:
        ordered = sorted(self._recent)
        return ordered[min(len(ordered) - 1, math.ceil(part * len(ordered)) - 1)] if ordered else math.nan

    def figures(self) -> dict[str, float]:
        mean = self.total / self.count if self.count else math.nan
        return {"mean": mean, "p50": self.percentile(0.5), "p95": self.percentile(0.95), "max": self.most}


class LiveFigures:
    """Counts and times of one session; written by its threads, each of which has its own numbers."""

    def __init__(self) -> None:
        self.frames = 0  #: handed over
        self.dropped = 0  #: of these, never seen: others came faster than they could be taken
        self.held_dropped = (
            0  #: never seen either: they waited for the end of a reply, and others after them (`blocked`)
        )
        self.seen = 0  #: whose anchor was fed
        self.prompts = self.tokens = self.replies = self.silences = 0
        self.encode_s = _Times()  #: scaling and encoding of a frame
        self.step_s = _Times()  #: the step in which frames or prompts were read
        self.lag_s = _Times()  #: of a frame, from when it was handed over until it was read (or, with `blocked`, held)
        #: of a reply's first token, from when the prompt or frame was handed over after which the model began to speak
        self.first_token_s = _Times()
        self.answer_s = _Times()  #: the same from the latest prompt, however long the model meant to wait
        self.between_tokens_s = _Times()
        self._asked_s: float | None = None
        self._event_s = 0.0
        self._token_s: float | None = None

    def encoded(self, seconds: float) -> None:
        self.encode_s.add(seconds)

    def read(self, done_s: float, prompts_s: Sequence[float], frames_s: Sequence[float], step_s: float) -> None:
        """Events that came at these times were read in one step, which was over at `done_s` and took `step_s`."""
        self.step_s.add(step_s)
        for came_s in frames_s:
            self.lag_s.add(max(0.0, done_s - came_s))
        self.prompts += len(prompts_s)
        self._event_s = max([*prompts_s, *frames_s])
        if prompts_s:
            self._asked_s = prompts_s[-1]

    def said(self, said: Said, now_s: float) -> None:
        if said.kind == "token":
            self.tokens += 1
            self.replies += said.starts
            if said.starts:
                self.first_token_s.add(max(0.0, now_s - self._event_s))
                if self._asked_s is not None:
                    self.answer_s.add(max(0.0, now_s - self._asked_s))
                self._asked_s = None
            if not said.starts and self._token_s is not None:
                self.between_tokens_s.add(max(0.0, now_s - self._token_s))
            self._token_s = now_s
        elif said.kind == "silence":
            self.silences += 1
        elif said.kind == "frame":
            self.seen += 1

    def to_json(self) -> dict[str, float]:
        """All of it; seconds."""
        counts = ("frames", "dropped", "held_dropped", "seen", "prompts", "tokens", "replies", "silences")
        times = ("encode_s", "step_s", "lag_s", "first_token_s", "answer_s", "between_tokens_s")
        flat: dict[str, float] = {name: getattr(self, name) for name in counts}
        for name in times:
            flat |= {f"{name}.{part}": value for part, value in getattr(self, name).figures().items()}
        return flat

    def summary(self) -> str:
        """One line for people."""
        if not self.frames:
            return "no frame was shown"
        parts = [f"{self.frames} frames, {self.tokens} tokens said in {self.replies} replies"]
        if self.encode_s.count:
            parts.append(f"encoding {1e3 * self.encode_s.percentile(0.5):.0f} ms a frame")
        if self.lag_s.count:
            parts.append(
                f"seen after {1e3 * self.lag_s.percentile(0.5):.0f} ms "
                f"({1e3 * self.lag_s.percentile(0.95):.0f} ms at the 95th percentile)"
            )
        if self.first_token_s.count:
            parts.append(f"first token {1e3 * self.first_token_s.percentile(0.5):.0f} ms after what it speaks about")
        if self.between_tokens_s.count:
            parts.append(f"{1e3 * self.between_tokens_s.percentile(0.5):.0f} ms between tokens")
        if self.dropped:
            parts.append(f"{self.dropped} frames were dropped, since others came faster than they could be seen")
        if self.held_dropped:
            parts.append(
                f"{self.held_dropped} frames were dropped that had waited for the end of a reply (held_frames)"
            )
        return "; ".join(parts)
