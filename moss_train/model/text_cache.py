"""Keys and values of the tokens of running streams.

With a text window the cache is a ring: the first `sinks` tokens keep their places, token t behind them lies at
`sinks + (t - sinks) mod window`. Keys are rotated by the token's position when they are written and never again.

Shape suffixes: R rows, L new tokens, M tokens the cache holds, A query heads, B key/value heads, D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moss_train.model.attention import attend_grouped
from moss_train.model.frame_cache import grown

_FIRST_PLACES = 256  #: of a cache that grows


@dataclass
class TextPlan:
    """One step's self-attention, the same in every layer."""

    written: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  #: row, new token and place of what is kept
    run: tuple[int, int] | None  #: places of the one row's tokens, when they lie side by side and all are kept
    used: int  #: places that are read
    before: bool  #: new tokens are written before attention reads; else it reads the old cache and them beside it
    mask_RLM: torch.Tensor | None  #: None: everything that is read is seen, or `causal`
    causal: bool


class TextCache:
    """The self layers' caches of several streams."""

    def __init__(
        self,
        layers: Sequence[int],
        rows: int,
        heads: int,
        head_size: int,
        window: int | None,
        sinks: int,
        max_tokens: int | None,
        like: torch.Tensor,
    ):
        """`like`: a tensor of the dtype and on the device that the caches shall have."""
        self.window, self.sinks = window, sinks if window is not None else 0
        self.max_tokens = max_tokens
        self.tokens_R = np.zeros(rows, np.int64)  #: tokens fed so far
        ring = None if window is None else window + self.sinks
        places = ring or _FIRST_PLACES
        self._places = places if max_tokens is None else max(1, min(places, max_tokens))
        shape = (rows, heads, self._places, head_size)
        self.of_layer = {layer: tuple(like.new_zeros(shape) for _ in range(2)) for layer in layers}
        self._device = like.device

    def plan(self, lengths_R: np.ndarray, text_lo_RL: np.ndarray | None, text_sinks: int, new_tokens: int) -> TextPlan:
        """What a step of `lengths_R` tokens sees and where they are kept.

        Raises ValueError when a row would exceed `max_tokens`, or a token looks back further than the cache's window.
        """
        total_R = self.tokens_R + lengths_R
        if self.max_tokens is not None and int(total_R.max()) > self.max_tokens:
            raise ValueError(f"a row would hold {int(total_R.max())} tokens, more than max_tokens={self.max_tokens}")
        if text_lo_RL is not None and not text_lo_RL.any():
            text_lo_RL = None
        self._check(lengths_R, text_lo_RL, text_sinks)
        ring = None if self.window is None else self.window + self.sinks
        full = ring is not None and int(total_R.max()) > ring
        if not full:
            self._make_room(int(total_R.max()))
        before = not full or new_tokens == 1
        held_R = (total_R if before else self.tokens_R) if ring is None else np.minimum(
            total_R if before else self.tokens_R, ring
        )  # fmt: skip
        used = int(held_R.max())
        causal = bool(before and new_tokens > 1 and not self.tokens_R.any() and text_lo_RL is None)
        mask_RLM = None
        if not causal and not self._sees_all(lengths_R, total_R, held_R, used, text_lo_RL, text_sinks, new_tokens):
            mask_RLM = self._mask(lengths_R, used, before, text_lo_RL, text_sinks, new_tokens)
        row, token, place = self._kept(lengths_R, total_R, new_tokens)
        run = None
        if len(self.tokens_R) == 1 and len(place) == new_tokens and int(place[-1]) - int(place[0]) == new_tokens - 1:
            run = (int(place[0]), int(place[-1]) + 1)
        written = tuple(torch.from_numpy(index).to(self._device) for index in (row, token, place))
        return TextPlan(written, run, used, before, mask_RLM, causal)

    def attend(self, layer: int, q_RLAD, k_RLBD, v_RLBD, plan: TextPlan) -> torch.Tensor:
        """Keep the new tokens; attention of each over what it sees, [R, L, A, D]."""
        caches, new = self.of_layer[layer], (k_RLBD, v_RLBD)
        if plan.causal:
            mixed = attend_grouped(q_RLAD, *(x.transpose(1, 2) for x in new), causal=True)
            self._write(caches, new, plan)
            return mixed
        if plan.before:
            self._write(caches, new, plan)
            return attend_grouped(q_RLAD, *(x[:, :, : plan.used] for x in caches), mask_RLK=plan.mask_RLM)
        read = [torch.cat([x[:, :, : plan.used], y.transpose(1, 2)], 2) for x, y in zip(caches, new, strict=True)]
        mixed = attend_grouped(q_RLAD, *read, mask_RLK=plan.mask_RLM)
        self._write(caches, new, plan)
        return mixed

    def _write(self, caches: Sequence[torch.Tensor], new: Sequence[torch.Tensor], plan: TextPlan) -> None:
        row, token, place = plan.written
        for cache, x_RLBD in zip(caches, new, strict=True):
            if plan.run is not None:
                cache[0, :, slice(*plan.run)] = x_RLBD[0].transpose(0, 1)
            else:
                cache[row, :, place] = x_RLBD[row, token]

    def _place(self, number: np.ndarray) -> np.ndarray:
        if self.window is None:
            return number
        return np.where(number < self.sinks, number, self.sinks + (number - self.sinks) % self.window)

    def _kept(self, lengths_R: np.ndarray, total_R: np.ndarray, new_tokens: int) -> tuple[np.ndarray, ...]:
        """Row, new token and place of the new tokens that the cache holds after the step."""
        offset_L = np.arange(new_tokens)
        number_RL = self.tokens_R[:, None] + offset_L
        kept_RL = offset_L < lengths_R[:, None]
        if self.window is not None:
            kept_RL &= (number_RL < self.sinks) | (number_RL >= total_R[:, None] - self.window)
        row, token = np.nonzero(kept_RL)
        return row, token, self._place(number_RL[row, token])

    def _numbers(self, count_R: np.ndarray, used: int) -> np.ndarray:
        """The number of the token at each place, [R, used], after `count_R` tokens; -1 where there is none."""
        place_M = np.arange(used)
        if self.window is None:
            return np.where(place_M < count_R[:, None], place_M, -1)
        # The latest number below the count that lies at the place.
        behind_RM = (count_R[:, None] - 1 - place_M) // self.window
        number_RM = np.where(place_M < self.sinks, place_M, place_M + np.maximum(0, behind_RM) * self.window)
        return np.where(number_RM < count_R[:, None], number_RM, -1)

    def _sees_all(
        self,
        lengths_R: np.ndarray,
        total_R: np.ndarray,
        held_R: np.ndarray,
        used: int,
        text_lo_RL: np.ndarray | None,
        text_sinks: int,
        new_tokens: int,
    ) -> bool:
        """Whether each row feeds at most one token and that sees all that is read."""
        if new_tokens != 1:
            return False
        feeding_R = lengths_R > 0
        if (held_R[feeding_R] != used).any():
            return False
        if text_lo_RL is None:
            return True
        oldest_R = np.zeros_like(total_R) if self.window is None else np.maximum(0, total_R - self.window)
        return bool((text_lo_RL[feeding_R, 0] <= np.maximum(oldest_R[feeding_R], text_sinks)).all())

    def _mask(
        self,
        lengths_R: np.ndarray,
        used: int,
        before: bool,
        text_lo_RL: np.ndarray | None,
        text_sinks: int,
        new_tokens: int,
    ) -> torch.Tensor:
        number_RL = self.tokens_R[:, None] + np.arange(new_tokens)
        held_RM = self._numbers(self.tokens_R + lengths_R if before else self.tokens_R, used)
        if not before:
            new_RL = np.where(np.arange(new_tokens) < lengths_R[:, None], number_RL, -1)
            held_RM = np.concatenate([held_RM, new_RL], 1)
        seen_R1M, seer_RL1 = held_RM[:, None], number_RL[..., None]
        mask_RLM = (seen_R1M >= 0) & (seen_R1M <= seer_RL1)
        if text_lo_RL is not None:
            mask_RLM &= (seen_R1M >= text_lo_RL[..., None]) | (seen_R1M < text_sinks)
        # Tokens that are only padding see anything, or their softmax would be over nothing.
        mask_RLM |= ~mask_RLM.any(-1, keepdims=True)
        return torch.from_numpy(mask_RLM).to(self._device)

    def _check(self, lengths_R: np.ndarray, text_lo_RL: np.ndarray | None, text_sinks: int) -> None:
        if self.window is None or int((self.tokens_R + lengths_R).max()) <= self.window + self.sinks:
            return
        offset_L = np.arange(int(lengths_R.max()) if text_lo_RL is None else text_lo_RL.shape[1])
        number_RL = self.tokens_R[:, None] + offset_L
        lo_RL = np.zeros_like(number_RL) if text_lo_RL is None else text_lo_RL
        gone_RL = (lo_RL < number_RL + 1 - self.window) | (text_sinks > self.sinks)
        real_RL = (offset_L < lengths_R[:, None]) & (number_RL >= self.window + self.sinks)
        if (real_RL & gone_RL).any():
            raise ValueError(
                f"a token looks at tokens that left: the cache keeps {self.sinks} sinks and {self.window} tokens"
            )

    def _make_room(self, places: int) -> None:
        if places <= self._places:
            return
        self._places = max(places, 2 * self._places)
        if self.max_tokens is not None:
            self._places = min(self._places, self.max_tokens)
        self.of_layer = {
            layer: tuple(grown(x, 2, self._places) for x in caches) for layer, caches in self.of_layer.items()
        }
