"""One question about media that are there as a whole, answered token by token: the offline way to use a model.

The row is the stream compiler's row of a conversation: begin, system, user turn with the anchors where the media stand,
header of the answer. All frames are encoded first, a number of them at a time.

Shape suffixes: N frames, C colour channels, H, W pixels, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from moss_train.evaluate.decoder import forbidden_tokens
from moss_train.evaluate.feeding import Waiting, feed
from moss_train.streams.config import CompilerConfig
from moss_train.streams.sight import Sight
from moss_train.streams.template import TurnTemplate
from moss_train.streams.tokenizer import StreamTokenizer


class Query:
    """A row that holds a question, and the answer as it comes."""

    def __init__(
        self,
        model: Any,
        tokenizer: StreamTokenizer,
        compiler: CompilerConfig,
        parts: Sequence[str | torch.Tensor],
        system: str | None = None,
    ):
        """`parts`: stretches of text, and between them media, uint8 [N, C, H, W]."""
        self._model, self._tokenizer = model, tokenizer
        self._sight = Sight.whole(compiler)
        self._state = model.start_streams(1, sight=self._sight)
        self._device = next(model.parameters()).device
        self._length = self._frames = 0
        template, special = TurnTemplate(tokenizer), tokenizer.special
        parts = parts if parts and isinstance(parts[0], str) else ["", *parts]
        self._ids = [*template.system_prefix(system), *template.open_user(parts[0])]
        media = [part for part in parts[1:] if not isinstance(part, str)]
        for part in parts[1:]:
            if isinstance(part, str):
                self._ids += tokenizer.encode(part) if part else []
            else:
                self._ids += [special.anchor] * len(part)
        self._ids += template.end_user()
        self._pictures_NCHW = torch.cat(media) if media else None
        self._ends = {
            token for token in (special.end_of_turn, special.end_of_text, special.silence) if token is not None
        }
        forbidden = [token for token in forbidden_tokens(tokenizer) if token not in self._ends]
        self._forbidden = torch.tensor(forbidden, device=self._device)

    def read(self, frames_at_once: int = 64) -> torch.Tensor:
        """Encode the media and feed the question; logits [V] of the answer's first token."""
        if self._pictures_NCHW is not None:
            features = [
                self._model.encode_new_frames(self._state, part.to(self._device))
                for part in self._pictures_NCHW.split(frames_at_once)
            ]
            is_anchor = np.array(self._ids) == self._tokenizer.special.anchor
            positions = torch.from_numpy(self._sight.places(is_anchor).frame_positions.astype(np.int64))
            rows = torch.zeros(len(positions), dtype=torch.int64)
            self._model.add_features(self._state, torch.cat(features), rows, positions)
        return self._feed(self._ids)

    def answer(
        self,
        choose: Callable[[torch.Tensor], torch.Tensor],
        most_tokens: int,
        frames_at_once: int = 64,
    ) -> Iterator[int]:
        """The answer's tokens as they come, until the model ends its turn (or is silent) or has said `most_tokens`."""
        logits_V = self.read(frames_at_once)
        for number in range(most_tokens):
            logits_1V = logits_V[None, : self._tokenizer.vocabulary_size].float()
            token = int(choose(logits_1V.index_fill(1, self._forbidden, -torch.inf)))
            if token in self._ends:
                return
            yield token
            if number + 1 < most_tokens:
                logits_V = self._feed([token])

    def _feed(self, ids: Sequence[int]) -> torch.Tensor:
        anchor = self._tokenizer.special.anchor
        frames = self._frames + list(ids).count(anchor)
        waiting = {0: Waiting(ids, self._length, frames)}
        logits_1V = feed(self._model, self._state, self._sight, anchor, waiting, 1, self._device)
        self._length, self._frames = self._length + len(ids), frames
        return logits_1V[0]
