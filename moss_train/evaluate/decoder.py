"""The model answers live: many streams at once, step by step, on the model's key-value caches.

Each step is a user turn or a frame. A frame is encoded once and joins the cross-attention cache, its anchor joins the
text, and the prediction at the anchor decides: silence, or a token of a reply. A reply goes on until the model predicts
silence (which is fed, as in training) or the slot's budget is spent; then the next anchor is fed without a silence
before it, and the prediction there goes on with the reply. A user turn cuts a running reply where it stands.

With `compiler.perceive=blocked` a reply is said at once, for as long as the turn's slots allow; the frames that arrive
while it runs are fed after it, with silences that nobody decides on, and only at the last of them is decided anew.

A model that was trained on think units may open one where it decides. Its tokens are fed, but not said; the decision
to speak is the prediction behind the mark that closes it.

The token row that results has exactly the layout of the stream compiler, so that with the reference's replies in place
of the model's the row would be the compiled one, token by token, position by position.

Shape suffixes: R rows (streams), L tokens fed at once, V vocabulary, N frames of one step, C colour channels,
H, W pixels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moss_train.errors import ConfigError
from moss_train.evaluate.config import DecodeConfig
from moss_train.evaluate.feeding import Waiting, feed
from moss_train.evaluate.schedule import Schedule, Step
from moss_train.model.frame_cache import KeepPolicy
from moss_train.parallel import groups
from moss_train.streams.config import CompilerConfig
from moss_train.streams.sight import Sight
from moss_train.streams.template import TurnTemplate
from moss_train.streams.tokenizer import StreamTokenizer

NO_HEAD = "decode.decide_by=head: the model has no decision head; set decode.decide_by=tokens"


@dataclass
class SlotOutput:
    """What the model did in one slot."""

    state: str  #: "silence", "speak" or "continue"
    ids: list[int]  #: text tokens said, without the silence
    ends: bool  #: a reply was closed by silence in this slot
    #: of the slot's decision, by whoever made it (`DecodeConfig.decide_by`); None where nothing was decided
    silence_probability: float | None


@dataclass
class _Row:
    """The token row of one stream as far as it has grown."""

    system: str | None
    length: int = 0
    frames: int = 0
    running: bool = False  #: a reply is waiting for its next slot
    reply_start_s: float = 0.0  #: of the slot in which the last reply began
    reply_tokens: int = 0  #: tokens of it said so far
    pending: list[int] = field(default_factory=list)  #: tokens not yet fed
    missed: int = 0  #: frames to come that arrive during a reply which has been said in full by now (blocked)
    decides: bool = False  #: whether anything is decided at the last of them
    thought: int | None = None  #: tokens of the think unit that is open
    may_think: bool = False  #: a think unit may be opened now


class StreamingDecoder:
    """A batch of streams that run side by side. Rows are independent; a row may pause while others go on.

    Args:
        model: has `start_streams`, `add_frames` and `extend` (see `model/streaming.py`), in evaluation mode; what this
            process holds of it.
        tokenizer: turns texts into ids.
        compiler: how streams are compiled; gives the rate of speech, the window and the sinks.
        systems: the system prompt of each row; their number is the number of rows.
        max_tokens: most tokens of any row, replies included; see `most_tokens`. None: no bound.
        max_frames: most frames of any row. None: no bound.
        choose: logits [R, V] to tokens [R]; None takes the most probable.
        keep: which frames stay in the cache; None: those of the compiler's window and sinks.

    In a parallel layout each process of a model-parallel group runs one, all with the same calls in the same order.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: StreamTokenizer,
        compiler: CompilerConfig,
        systems: Sequence[str | None],
        max_tokens: int | None,
        max_frames: int | None,
        config: DecodeConfig | None = None,
        choose: Callable[[torch.Tensor], torch.Tensor] | None = None,
        keep: KeepPolicy | None = None,
    ):
        self._model = model
        self._tokenizer = tokenizer
        self._template = TurnTemplate(tokenizer)
        self._compiler = compiler
        self._sight = Sight.of(compiler)
        self._config = config or DecodeConfig()
        self._rows = [_Row(system) for system in systems]
        self._choose_from = choose or (lambda logits_RV: logits_RV.argmax(-1))
        self._state = model.start_streams(len(systems), max_tokens, max_frames, sight=self._sight, keep=keep)
        self._device = device_of(model)
        self._silence = tokenizer.special.silence
        self._blocked = compiler.perceive == "blocked"
        self._thinks = compiler.think == "keep" and tokenizer.special.think_start is not None
        self._forbidden = torch.tensor(forbidden_tokens(tokenizer), device=self._device)

    @torch.inference_mode()
    def step(
        self,
        steps: Mapping[int, Step],
        frames_CHW: Mapping[int, torch.Tensor],
        on_token: Callable[[int, int], None] | None = None,
    ) -> dict[int, SlotOutput]:
        """The next event of each row in `steps`, and what the model says before the event after it.

        `frames_CHW` holds the picture (uint8 [C, H, W]) of every row whose event is a frame. A user turn cuts a running
        reply; a row's first event must be a user turn, it opens the row with the system prompt.
        `on_token(row, token)` is called for every text token as soon as it is chosen.
        """
        arriving = [row for row, step in steps.items() if step.user is None]
        for row, step in steps.items():
            if step.user is not None:
                self._open_turn(row, step.user)
        if arriving:
            self._add_frames(arriving, [frames_CHW[row] for row in arriving])
        missed = [row for row in arriving if self._miss(row)]
        asking = [row for row in sorted(steps) if row not in missed]
        budgets = {row: self._budget(row, steps[row]) for row in asking}
        outputs = self._reply(asking, budgets, on_token or (lambda row, token: None))
        if self._blocked:
            for row, output in outputs.items():
                self._hold_frames_back(row, steps[row], output)
        return outputs | {row: SlotOutput("silence", [], False, None) for row in missed}

    def _miss(self, row: int) -> bool:
        """Whether the frame that has just joined the row arrived too late for a decision; its silence then follows."""
        state = self._rows[row]
        if not state.missed:
            return False
        state.missed -= 1
        if state.missed == 0 and state.decides:
            return False
        self._queue(row, [self._silence])
        return True

    def _said_by(self, step: Step) -> list[int]:
        """How many tokens of a reply that begins in the slot of `step` are said by the end of it and of each following
        slot of the turn: the compiler's rule, see `streams/timeline.py`."""
        said: list[int] = []
        for end_s in step.turn_ends_s[step.place :]:
            before = said[-1] if said else 0
            if math.isinf(end_s):
                said.append(before + self._config.last_slot_tokens)
            else:
                by_rate = int(self._compiler.tokens_per_second * (end_s - step.time_s) + 1e-6)
                said.append(max(before + 1, by_rate))
        return said

    def _hold_frames_back(self, row: int, step: Step, output: SlotOutput) -> None:
        """After a reply that was said at once: which frames arrived meanwhile."""
        state = self._rows[row]
        if output.ids:
            said = self._said_by(step)
            state.missed = next((n for n, count in enumerate(said) if count >= len(output.ids)), len(said) - 1)
            state.decides = output.ends
            if not output.ends:  # cut at the end of its turn
                state.missed, state.running = len(said) - 1, False

    # Step by step, for streams whose events are not known beforehand (`conversation`): what arrives is queued, and what
    # is queued is fed when a prediction is asked for.

    def encode(self, frames_NCHW: torch.Tensor) -> torch.Tensor:
        """Features of frames, for `put_frames`; may run in another thread than all else."""
        return self._model.encode_new_frames(self._state, frames_NCHW)

    def put_frames(self, row: int, features_NPH: torch.Tensor, between: Sequence[int] = ()) -> None:
        """Frames have arrived: their anchors are queued, with the tokens `between` two of them."""
        positions = []
        for number in range(len(features_NPH)):
            self._queue(row, between if number else ())
            positions.append(self._put_anchors([row]))
        self._model.add_features(self._state, features_NPH, torch.tensor([row] * len(positions)), torch.cat(positions))

    def put_turn(self, row: int, text: str) -> None:
        """A user turn is queued; it cuts a running reply, and opens the row when it is the first."""
        self._open_turn(row, text)

    def put_tokens(self, row: int, ids: Sequence[int]) -> None:
        """Tokens are queued: what the model says, or a silence."""
        self._queue(row, ids)

    @torch.inference_mode()
    def predict(self, row: int, running: bool, deciding: bool) -> tuple[int, float]:
        """Feed what is queued; the next token and P(silence). `running`: a reply goes on. `deciding`: at the start of a
        slot, where a think unit may come first; it is fed and not told."""
        state = self._rows[row]
        state.running, state.may_think = running, self._thinks and deciding
        while True:
            (token,), (silence,) = self._choose([row], *self._feed([row]), [deciding])
            if not self._think(row, token):
                state.may_think = False
                return token, silence

    def is_open(self, row: int) -> bool:
        """Whether a first turn was put."""
        state = self._rows[row]
        return bool(state.length or state.pending)

    def frames_of(self, row: int) -> int:
        """Frames that have arrived in a row."""
        return self._rows[row].frames

    def cache_bytes(self) -> int:
        """Bytes of the caches as they are allocated, of all rows."""
        return self._state.cache_bytes()

    def _budget(self, row: int, step: Step) -> int:
        """How many tokens may be said in the slot: what the rate of speech leaves, but at least one."""
        state = self._rows[row]
        if self._blocked:
            return self._said_by(step)[-1]
        if not state.running:
            state.reply_start_s, state.reply_tokens = step.time_s, 0
        if math.isinf(step.end_s):
            return self._config.last_slot_tokens
        elapsed_s = step.end_s - state.reply_start_s
        # the compiler's rule, see `streams/timeline.py`
        return max(1, int(self._compiler.tokens_per_second * elapsed_s + 1e-6) - state.reply_tokens)

    def _open_turn(self, row: int, text: str) -> None:
        state = self._rows[row]
        opened = state.length > 0 or bool(state.pending)
        ids = self._template.close_turn() if opened else self._template.system_prefix(state.system)
        self._queue(row, [*ids, *self._template.user_turn(text)])
        state.running, state.missed = False, 0

    def _add_frames(self, rows: Sequence[int], frames_CHW: Sequence[torch.Tensor]) -> None:
        positions_N = self._put_anchors(rows)
        pictures = torch.stack(list(frames_CHW)).to(self._device)
        self._model.add_frames(self._state, pictures, torch.tensor(list(rows)), positions_N)

    def _put_anchors(self, rows: Sequence[int]) -> torch.Tensor:
        """An anchor joins what waits in each of `rows`; the rotary positions of the frames."""
        positions = []
        for row in rows:
            state = self._rows[row]
            places = self._sight.places(np.array([True]), state.length + len(state.pending), state.frames)
            positions.append(int(places.frame_positions[0]))
            state.frames += 1
            self._queue(row, [self._tokenizer.special.anchor])
        return torch.tensor(positions)

    def _queue(self, row: int, ids: Sequence[int]) -> None:
        self._rows[row].pending += ids

    def _feed(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Feed what waits in `rows`; returns the logits [len(rows), V] after each row's last token, and where the
        decision head is asked its P(speak) [len(rows)], NaN after a token that is no frame's anchor."""
        anchor = self._tokenizer.special.anchor
        states = {row: self._rows[row] for row in rows}
        waiting = {row: Waiting(state.pending, state.length, state.frames) for row, state in states.items()}
        ends_in_anchor = [state.pending[-1] == anchor for state in states.values()]
        logits_RV = feed(self._model, self._state, self._sight, anchor, waiting, len(self._rows), self._device)
        for state in states.values():
            state.length += len(state.pending)
            state.pending = []
        asked = torch.tensor(list(rows), device=self._device)
        if self._config.decide_by == "tokens":
            return logits_RV[asked], None
        if self._state.decisions_RL is None:
            raise ConfigError(NO_HEAD)
        at_frame_R = torch.tensor(ends_in_anchor, device=self._device)
        return logits_RV[asked], self._state.decisions_RL[asked, -1].sigmoid().masked_fill(~at_frame_R, torch.nan)

    def _reply(
        self, rows: list[int], budgets: Mapping[int, int], on_token: Callable[[int, int], None]
    ) -> dict[int, SlotOutput]:
        outputs: dict[int, SlotOutput] = {row: SlotOutput("silence", [], False, None) for row in rows}
        for row in rows:
            self._rows[row].may_think = self._thinks
        asking = rows
        while asking:
            deciding = [not outputs[row].ids for row in asking]
            tokens, silence_probabilities = self._choose(asking, *self._feed(asking), deciding)
            speaking = []
            for row, token, probability in zip(asking, tokens, silence_probabilities, strict=True):
                state, output = self._rows[row], outputs[row]
                if self._think(row, token):
                    speaking.append(row)
                    continue
                if not output.ids:
                    output.silence_probability = probability
                state.may_think = False
                if token == self._silence:
                    output.ends = bool(output.ids)
                    state.running = False
                    self._queue(row, [token])
                elif len(output.ids) >= budgets[row]:
                    state.running = True
                else:
                    if not output.ids:
                        output.state = "continue" if state.running else "speak"
                    output.ids.append(token)
                    state.reply_tokens += 1
                    self._queue(row, [token])
                    on_token(row, token)
                    speaking.append(row)
            asking = speaking
        return outputs

    def _think(self, row: int, token: int) -> bool:
        """Whether `token` belongs to a think unit; it is then fed, and the row asked on."""
        state, special = self._rows[row], self._tokenizer.special
        if state.thought is None:
            if not (state.may_think and token == special.think_start):
                return False
            state.thought, state.may_think = 0, False
        elif token == special.think_end or state.thought == self._config.think_tokens:
            token, state.thought = special.think_end or token, None
        else:
            state.thought += 1
        self._queue(row, [token])
        return True

    def _choose(
        self, rows: Sequence[int], logits_RV: torch.Tensor, speak_R: torch.Tensor | None, deciding: Sequence[bool]
    ) -> tuple[list[int], list[float]]:
        """The next token of each row and P(silence); `deciding` rows have said nothing in their slot yet. `speak_R` is
        the decision head's P(speak) where it decides."""
        raw_RV = logits_RV[:, : self._tokenizer.vocabulary_size].float()
        logits_RV = raw_RV.index_fill(1, self._forbidden, -torch.inf)
        silence_R = logits_RV.softmax(-1)[:, self._silence]
        if self._thinks:
            self._allow_thoughts(rows, raw_RV, logits_RV)
        tokens_R = self._choose_from(logits_RV)
        threshold = self._config.speak_threshold
        if any(deciding) and (threshold is not None or speak_R is not None):
            idle = [
                now and not state.running and state.thought is None and token != self._tokenizer.special.think_start
                for now, state, token in zip(deciding, (self._rows[r] for r in rows), tokens_R.tolist(), strict=True)
            ]
            idle_R = torch.tensor(idle, device=self._device)
            if speak_R is None:
                is_silent_R = silence_R >= threshold
            else:
                idle_R &= ~speak_R.isnan()
                is_silent_R = speak_R < self._config.speaks_from
                silence_R = torch.where(idle_R, 1.0 - speak_R, silence_R)
            silence = torch.tensor([self._silence], device=self._device)
            text_R = self._choose_from(logits_RV.index_fill(1, silence, -torch.inf))
            tokens_R = torch.where(idle_R, text_R.masked_fill(is_silent_R, self._silence), tokens_R)
        return tokens_R.tolist(), silence_R.tolist()

    def _allow_thoughts(self, rows: Sequence[int], raw_RV: torch.Tensor, logits_RV: torch.Tensor) -> None:
        """Opens to each row, in place, the marks that it may set: of a new think unit, or of the end of its own."""
        special = self._tokenizer.special
        for place, row in enumerate(rows):
            state = self._rows[row]
            if state.thought is not None:
                logits_RV[place, self._silence] = -torch.inf
            inside = [special.think_end, special.skip] if state.thought is not None else []
            for token in inside or ([special.think_start] if state.may_think else []):
                if token is not None:
                    logits_RV[place, token] = raw_RV[place, token]


def device_of(model: Any) -> torch.device:
    """Where what this process holds of the model runs; a pipeline stage may hold nothing."""
    parameter = next(model.parameters(), None)
    return groups.state().device if parameter is None else parameter.device


def forbidden_tokens(tokenizer: StreamTokenizer) -> list[int]:
    """The rows of the head that a model must never say: every special token but silence. Think units are not said."""
    special = tokenizer.special
    roles = (
        special.begin_of_text,
        special.end_of_text,
        special.start_header,
        special.end_header,
        special.end_of_turn,
        special.video,
        special.anchor,
        special.padding,
        special.ellipsis,
        special.think_start,
        special.think_end,
        special.skip,
    )
    return sorted({token for token in roles if token is not None and token < tokenizer.vocabulary_size})


def most_tokens(schedule: Schedule, tokenizer: StreamTokenizer, compiler: CompilerConfig, config: DecodeConfig) -> int:
    """The most tokens that the row of `schedule` can come to: prompts, an anchor, a silence and the replies."""
    template = TurnTemplate(tokenizer)
    prompts = len(template.system_prefix(schedule.system))
    prompts += sum(len(template.user_turn(step.user)) + 1 for step in schedule.steps if step.user is not None)
    slots = len(schedule.steps)
    spoken = int((schedule.steps[-1].time_s - schedule.steps[0].time_s) * compiler.tokens_per_second) + slots
    thinks = compiler.think == "keep" and tokenizer.special.think_start is not None
    thought = slots * (config.think_tokens + 2) if thinks else 0
    return prompts + 2 * slots + spoken + config.last_slot_tokens + thought
