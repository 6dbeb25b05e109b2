"""The model answers live: many streams at once, step by step, on the model's key-value caches.

Each step is a user turn or a frame. A frame is encoded once and joins the cross-attention cache, its anchor joins the
text, and the prediction at the anchor decides: silence, or a token of a reply. A reply goes on until the model predicts
silence (which is fed, as in training) or the slot's budget is spent; then the next anchor is fed without a silence
before it, and the prediction there goes on with the reply. A user turn cuts a running reply where it stands.

The token row that results has exactly the layout of the stream compiler, so that with the reference's replies in place
of the model's the row would be the compiled one, token by token, position by position.

Shape suffixes: R rows (streams), L tokens fed at once, V vocabulary, N frames of one step, C colour channels,
H, W pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from moss_train.evaluate.config import DecodeConfig


class Template(Protocol):
    """Token ids around the replies; `streams.template` has the one that the compiler uses."""

    def system_prefix(self, system: str | None) -> list[int]: ...

    def user_turn(self, text: str) -> list[int]: ...

    def close_turn(self) -> list[int]: ...


@dataclass
class SlotOutput:
    """What the model did in one slot."""

    state: str  #: "silence", "speak" or "continue"
    ids: list[int]  #: text tokens said, without the silence
    ends: bool  #: a reply was closed by silence in this slot
    silence_probability: float  #: of the slot's decision


@dataclass
class _Row:
    """The token row of one stream as far as it has grown."""

    length: int = 0
    frames: int = 0
    running: bool = False  #: a reply is waiting for its next slot
    pending: list[tuple[int, int]] = field(default_factory=list)  #: (token, frames it sees), not yet fed


class StreamingDecoder:
    """A batch of streams that run side by side. Rows are independent; a row may pause while others go on.

    Args:
        model: has `start_streams`, `add_frames` and `extend` (see `model`), in evaluation mode.
        tokenizer: `streams.StreamTokenizer`.
        template: the ids around the replies.
        rows: number of streams.
        max_tokens: most tokens of any row, replies included.
        max_frames: most frames of any row.
        window: how many of the last frames a token sees; None for all.
        sinks: how many of the first frames it sees besides.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: Template,
        rows: int,
        max_tokens: int,
        max_frames: int,
        config: DecodeConfig | None = None,
        window: int | None = None,
        sinks: int = 0,
    ):
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._config = config or DecodeConfig()
        self._window = window
        self._sinks = sinks
        self._rows = [_Row() for _ in range(rows)]
        self._state = model.start_streams(rows, max_tokens, max_frames)
        self._device = next(model.parameters()).device
        self._silence = tokenizer.special.silence
        self._forbidden = torch.tensor(forbidden_tokens(tokenizer), device=self._device)

    def user_turns(
        self, texts: Mapping[int, str], budgets: Mapping[int, int], systems: Mapping[int, str | None] | None = None
    ) -> dict[int, SlotOutput]:
        """The user speaks in the rows of `texts`; a row's first turn opens it with `systems[row]`.

        Cuts a running reply. Returns what the model says before the next event.
        """
        return self.step(texts, {}, budgets, systems)

    def frames(self, frames_by_row: Mapping[int, torch.Tensor], budgets: Mapping[int, int]) -> dict[int, SlotOutput]:
        """A frame (uint8 [C, H, W]) arrives in each row of `frames_by_row`; returns what the model says about it."""
        return self.step({}, frames_by_row, budgets)

    @torch.inference_mode()
    def step(
        self,
        texts: Mapping[int, str],
        frames_by_row: Mapping[int, torch.Tensor],
        budgets: Mapping[int, int],
        systems: Mapping[int, str | None] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> dict[int, SlotOutput]:
        """One event in each of some rows: user turns in the rows of `texts`, frames in those of `frames_by_row`.

        `on_token(row, token)` is called for every text token as soon as it is chosen.
        """
        if set(texts) & set(frames_by_row):
            raise ValueError("a row takes one event at a time")
        for row, text in texts.items():
            self._open_turn(row, text, None if systems is None else systems.get(row))
        if frames_by_row:
            self._add_frames(frames_by_row)
        rows = sorted([*texts, *frames_by_row])
        return self._reply(rows, budgets, on_token or (lambda row, token: None))

    def _open_turn(self, row: int, text: str, system: str | None) -> None:
        state = self._rows[row]
        opened = state.length > 0 or bool(state.pending)
        ids = self._template.close_turn() if opened else self._template.system_prefix(system)
        self._queue(row, [*ids, *self._template.user_turn(text)])
        state.running = False

    def _add_frames(self, frames_by_row: Mapping[int, torch.Tensor]) -> None:
        anchor = self._tokenizer.special.anchor
        positions = []
        for row in frames_by_row:
            state = self._rows[row]
            positions.append(state.length + len(state.pending))
            state.frames += 1
            self._queue(row, [anchor])
        self._model.add_frames(
            self._state,
            torch.stack(list(frames_by_row.values())).to(self._device),
            torch.tensor(list(frames_by_row), device=self._device),
            torch.tensor(positions, device=self._device),
        )

    def _queue(self, row: int, ids: Sequence[int]) -> None:
        state = self._rows[row]
        state.pending += [(token, state.frames) for token in ids]

    def _feed(self, rows: Sequence[int]) -> torch.Tensor:
        """Feed what waits in `rows`; returns the logits [len(rows), V] after each row's last token."""
        longest = max(len(self._rows[row].pending) for row in rows)
        shape = (len(self._rows), longest)
        ids_RL = torch.zeros(shape, dtype=torch.long)
        positions_RL = torch.zeros(shape, dtype=torch.long)
        lo_RL = torch.zeros(shape, dtype=torch.int32)
        hi_RL = torch.zeros(shape, dtype=torch.int32)
        lengths_R = torch.zeros(len(self._rows), dtype=torch.long)
        for row in rows:
            state = self._rows[row]
            count = len(state.pending)
            seen = torch.tensor([frames for _, frames in state.pending], dtype=torch.int32)
            ids_RL[row, :count] = torch.tensor([token for token, _ in state.pending])
            positions_RL[row, :count] = torch.arange(state.length, state.length + count)
            hi_RL[row, :count] = seen
            if self._window is not None:
                lo_RL[row, :count] = (seen - self._window).clamp_min(0)
            lengths_R[row] = count
            state.length += count
            state.pending = []
        logits_RLV = self._model.extend(
            self._state,
            ids_RL.to(self._device),
            positions_RL.to(self._device),
            lengths_R.to(self._device),
            visible_lo_RL=lo_RL.to(self._device),
            visible_hi_RL=hi_RL.to(self._device),
            sinks=self._sinks,
        )
        last = torch.tensor(list(rows), device=self._device)
        return logits_RLV[last, (lengths_R[list(rows)] - 1).to(self._device)]

    def _reply(
        self, rows: list[int], budgets: Mapping[int, int], on_token: Callable[[int, int], None]
    ) -> dict[int, SlotOutput]:
        outputs: dict[int, SlotOutput] = {}
        asking = rows
        while asking:
            tokens, silence_probabilities = self._choose(asking, self._feed(asking), deciding=not outputs)
            speaking = []
            for row, token, probability in zip(asking, tokens, silence_probabilities, strict=True):
                state = self._rows[row]
                output = outputs.setdefault(row, SlotOutput("silence", [], False, probability))
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
                    self._queue(row, [token])
                    on_token(row, token)
                    speaking.append(row)
            asking = speaking
        return outputs

    def _choose(self, rows: Sequence[int], logits_RV: torch.Tensor, deciding: bool) -> tuple[list[int], list[float]]:
        """The next token of each row and P(silence). With `deciding` the rows stand at the start of a slot."""
        logits_RV = logits_RV.float().index_fill(1, self._forbidden, -torch.inf)
        silence_R = logits_RV.softmax(-1)[:, self._silence]
        tokens_R = logits_RV.argmax(-1)
        threshold = self._config.speak_threshold
        if deciding and threshold is not None:
            text_R = logits_RV.index_fill(1, torch.tensor([self._silence], device=self._device), -torch.inf).argmax(-1)
            decided_R = torch.where(silence_R >= threshold, torch.full_like(text_R, self._silence), text_R)
            idle_R = torch.tensor([not self._rows[row].running for row in rows], device=self._device)
            tokens_R = torch.where(idle_R, decided_R, tokens_R)
        return tokens_R.tolist(), silence_R.tolist()


def forbidden_tokens(tokenizer: Any) -> list[int]:
    """The rows of the head that a model must never say: every special token but silence."""
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
        getattr(special, "ellipsis", None),
    )
    return sorted({token for token in roles if token is not None and token < tokenizer.vocabulary_size})


def most_tokens(prompt_tokens: int, budgets: Sequence[int]) -> int:
    """Upper bound of a row's length: its prompts, and per slot an anchor, the budget and a silence."""
    return prompt_tokens + sum(budget + 2 for budget in budgets)
