"""One stream that answers while it goes on: which tokens are fed when prompts and frames arrive at any time.

The clock is the caller's, so the same rules hold live and in a test. What happens in one *tick* is fed in one step:

    [the token just said] + prompts in order of arrival + frames by their time stamp

* A prompt closes the running turn where it stands, and opens a user turn and the header of the next answer. Keys and
  values stay.
* A frame puts its anchor where the stream stands, in a running reply too, whose later tokens see it.
* While nothing is said, every event but the last of a tick is followed by a silence: it gets no decision of its own.
  In a running reply nothing stands between two frames.
* After the last event the model decides: silence, or the reply's next token. After silence nothing is fed until an
  event comes; the silence is fed with it. A pause is not an end.

With `blocked` frames that arrive while a reply goes on are held back until it is over, and are then read in one step.
When a prompt cuts the reply they are read before it, and nothing is decided on them. Where more than `held_frames` are
held, the oldest is dropped and counted. A think unit may come first where the model decides; its tokens are fed and not
put out.

The first token after an event is due at once, a later one when the rate of speech allows it; one that is not due when
an event comes is never said, the model decides anew. When every event has a tick of its own and ticks come when tokens
are due, the row is the stream compiler's, token by token (`streams/timeline.py`).

Shape suffixes: N frames, P vision tokens of a frame, H decoder width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from moss_train.evaluate.decoder import StreamingDecoder
from moss_train.streams.growing_text import GrowingText
from moss_train.streams.tokenizer import StreamTokenizer


@dataclass(frozen=True)
class Said:
    """Something that a stream put out."""

    #: "turn" (a prompt was read), "frame" (a frame was), "token", "silence" (decided, or behind a reply); "end" and
    #: "error" come last
    kind: str
    time_s: float  #: of the session's clock; of a frame its time stamp
    frames: int  #: frames that had arrived in the stream by then
    token: int | None = None
    text: str = ""  #: letters that the token completes (a letter may take several), the prompt, or what went wrong
    starts: bool = False  #: a reply's first token
    ends: bool = False  #: the silence closes a reply
    silence_probability: float | None = None  #: of the decision after a tick's last event, with what came of it
    read_s: float | None = None  #: when a prompt or a frame was read, of the session's clock


@dataclass(frozen=True)
class ArrivedFrame:
    """A frame that is encoded."""

    time_s: float
    features_PH: torch.Tensor


class Conversation:
    """The row of one stream. Calls must not overlap."""

    def __init__(
        self,
        decoder: StreamingDecoder,
        tokenizer: StreamTokenizer,
        tokens_per_second: float | None,
        reply_tokens: int,
        slot_tokens: int,
        silence_after_prompt: bool = False,
        blocked: bool = False,
        held_frames: int | None = None,
    ):
        """`decoder` has one row. `tokens_per_second`: rate of speech, None: as fast as asked. `reply_tokens`: a reply
        is closed by silence after so many, `slot_tokens`: after so many since the latest event.
        `silence_after_prompt`: a prompt is answered at the next frame at the earliest. `blocked`: nothing is seen
        during a reply (`compiler.perceive`), and at most `held_frames` frames wait for its end, None: any number."""
        self._decoder, self._tokenizer = decoder, tokenizer
        self._rate, self._reply_tokens, self._slot_tokens_most = tokens_per_second, reply_tokens, slot_tokens
        self._silence_after_prompt, self._blocked = silence_after_prompt, blocked
        self._held_most = held_frames
        self.held_dropped = 0  #: frames that waited for the end of a reply and were never read
        self._silence = tokenizer.special.silence
        self._next: int | None = None  #: predicted and not said yet
        self._running = False  #: a reply goes on
        self._held: list[ArrivedFrame] = []  #: arrived during a reply that blocks
        self._reply_began_s = self._slot_began_s = self._now_s = 0.0
        self._said = GrowingText(tokenizer)  #: the running reply
        self._slot_tokens = 0
        self._decided: float | None = None  #: P(silence) of a decision that nothing has come of yet

    @property
    def due_s(self) -> float | None:
        """When `tick` wants to be called although nothing arrives; None while there is nothing to say."""
        if self._next is None:
            return self._now_s if self._held else None
        if self._rate is None or not self._slot_tokens:
            return self._slot_began_s
        return self._reply_began_s + (len(self._said) + 1) / self._rate

    @property
    def is_speaking(self) -> bool:
        """Whether a reply goes on."""
        return self._running

    def tick(self, now_s: float, prompts: Sequence[str] = (), frames: Sequence[ArrivedFrame] = ()) -> list[Said]:
        """Say the next token if it is due, read what has arrived, and predict; what was put out, in order.

        Frames are read by time stamp, those of the same time in the order given.
        """
        out: list[Said] = []
        self._now_s, frames = now_s, sorted(frames, key=lambda frame: frame.time_s)
        if self._blocked and self._next is not None and not prompts:
            self._hold(frames)
            frames = []
        due_s = self.due_s
        # A hair of tolerance, as where the compiler places tokens (`streams/timeline.py`).
        is_due = due_s is not None and due_s <= now_s + 1e-6 / (self._rate or 1.0)
        if is_due and self._next is not None:
            out.append(self._say(now_s))
        elif not prompts and not frames and not is_due:
            return out
        self._next = None
        began_s = now_s
        if self._held and not self._running:
            frames = [*self._held, *frames]
            self._held, began_s = [], min(now_s, frames[-1].time_s)
        if prompts or frames:
            out += self._read(now_s, prompts, frames)
            self._slot_began_s, self._slot_tokens = began_s, 0
        asked = bool(prompts) and not frames and self._silence_after_prompt
        deciding = not self._slot_tokens and not asked
        token, silence_probability = self._decoder.predict(0, self._running, deciding)
        self._decided = silence_probability if deciding else None
        enough = len(self._said) >= self._reply_tokens or self._slot_tokens >= self._slot_tokens_most
        if asked or enough or token == self._silence:
            out.append(self._be_silent(now_s))
        else:
            self._next = token
        return out

    def _hold(self, frames: Sequence[ArrivedFrame]) -> None:
        self._held += frames
        if self._held_most is not None:
            excess = max(0, len(self._held) - self._held_most)
            del self._held[:excess]
            self.held_dropped += excess

    def _say(self, now_s: float) -> Said:
        token, starts = self._next, not self._running
        if starts:
            self._running, self._said = True, GrowingText(self._tokenizer)
            self._reply_began_s = self._slot_began_s
        new = self._said.add(token)
        self._slot_tokens += 1
        self._decoder.put_tokens(0, [token])
        return self._put_out(Said("token", now_s, self._decoder.frames_of(0), token, new, starts=starts))

    def _be_silent(self, now_s: float) -> Said:
        ends, self._running, self._said = self._running, False, GrowingText(self._tokenizer)
        self._decoder.put_tokens(0, [self._silence])
        return self._put_out(Said("silence", now_s, self._decoder.frames_of(0), self._silence, ends=ends))

    def _put_out(self, said: Said) -> Said:
        decided, self._decided = self._decided, None
        return replace(said, silence_probability=decided)

    def _read(self, now_s: float, prompts: Sequence[str], frames: Sequence[ArrivedFrame]) -> list[Said]:
        out = []
        prompts = list(prompts)
        if not prompts and not self._decoder.is_open(0):
            self._put_turn("")  # a stream that nobody has spoken in yet, as in training
            self._decoder.put_tokens(0, [self._silence])
        if prompts and self._held:  # the reply is cut
            held, self._held = self._held, []
            out += self._put_frames(now_s, held, [self._silence])
            self._decoder.put_tokens(0, [self._silence])
        for number, prompt in enumerate(prompts):
            self._put_turn(prompt)
            out.append(Said("turn", now_s, self._decoder.frames_of(0), text=prompt, read_s=now_s))
            if number + 1 < len(prompts) or frames:
                self._decoder.put_tokens(0, [self._silence])
        if frames:
            out += self._put_frames(now_s, frames, [] if self._running else [self._silence])
        return out

    def _put_frames(self, now_s: float, frames: Sequence[ArrivedFrame], between: Sequence[int]) -> list[Said]:
        before = self._decoder.frames_of(0)
        self._decoder.put_frames(0, torch.stack([frame.features_PH for frame in frames]), between)
        return [Said("frame", frame.time_s, before + n, read_s=now_s) for n, frame in enumerate(frames, 1)]

    def _put_turn(self, text: str) -> None:
        self._decoder.put_turn(0, text)
        self._running, self._said = False, GrowingText(self._tokenizer)
