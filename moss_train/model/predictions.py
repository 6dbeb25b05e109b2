"""What the model says of every token: the next one, and, with a decision head, whether now is the time to speak.

Shape suffixes: T tokens, R rows, K positions of a microbatch, V rows of the head (this process's columns when matrices
are split).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from moss_train.model.recompute import recomputed

Read = Callable[[torch.Tensor, slice], tuple[torch.Tensor, ...]]


class Predictions(NamedTuple):
    """The model's outputs for one microbatch."""

    #: of the next token, [T, R, V] or, of the positions `places_K` alone, [K, V]; None: `hidden_KH` are to be read
    logits: torch.Tensor | None
    #: float32 [T, R], logit of "speak now"; meant at frames' anchors alone. None without a decision head.
    decisions_TR: torch.Tensor | None = None
    #: int64, flat token index t * R + r of those positions whose logits there are; None: there are those of all
    places_K: torch.Tensor | None = None
    #: what the head reads of the positions, where logits shall exist for a few positions at a time
    hidden_KH: torch.Tensor | None = None
    head: Callable[[torch.Tensor], torch.Tensor] | None = None  #: hidden states [k, H] to logits [k, V]
    positions_at_once: int = 0

    @property
    def logits_TRV(self) -> torch.Tensor:
        """Logits of every position; ValueError when only those of some were asked for."""
        if self.logits is None or self.places_K is not None:
            raise ValueError("only trained positions were asked for: ask the model for the logits of all")
        return self.logits

    def read(self, places_K: torch.Tensor, rows: int, read: Read) -> tuple[torch.Tensor, ...]:
        """What `read(logits [k, V], which of the K positions)` says of the flat token indices `places_K`, which must be
        those that were asked for, if any were. Results [k, …] of several calls are joined.

        rows: R of the microbatch.
        """
        if self.places_K is None:
            return read(self.logits[places_K // rows, places_K % rows], slice(None))
        if self.places_K.shape != places_K.shape:
            raise ValueError(
                f"there are logits of {len(self.places_K)} positions, not of the {len(places_K)} asked for"
            )
        if self.hidden_KH is None:
            return read(self.logits, slice(None))
        head, count = self.head, len(places_K)

        def part(hidden_kH: torch.Tensor, first: int) -> tuple[torch.Tensor, ...]:
            return read(head(hidden_kH), slice(first, first + len(hidden_kH)))

        starts = range(0, max(count, 1), self.positions_at_once)
        parts: list[Any] = [
            recomputed(True, part, self.hidden_KH[start : start + self.positions_at_once], start) for start in starts
        ]
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
