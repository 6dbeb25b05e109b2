"""What the model says of every token: the next one, and, with a decision head, whether now is the time to speak.

Shape suffixes: T tokens, R rows, K positions of a microbatch, V rows of the head (this process's columns when matrices
are split).
"""

from typing import NamedTuple

import torch


class Predictions(NamedTuple):
    """The model's outputs for one microbatch."""

    logits: torch.Tensor  #: of the next token, [T, R, V] or, of the positions `places_K` alone, [K, V]
    #: float32 [T, R], logit of "speak now"; meant at frames' anchors alone. None without a decision head.
    decisions_TR: torch.Tensor | None = None
    #: int64, flat token index t * R + r of those positions whose logits there are; None: there are those of all
    places_K: torch.Tensor | None = None

    @property
    def logits_TRV(self) -> torch.Tensor:
        """Logits of every position; ValueError when only those of some were asked for."""
        if self.places_K is not None:
            raise ValueError(f"there are logits of {len(self.places_K)} positions only: ask the model for all of them")
        return self.logits

    def at(self, places_K: torch.Tensor, rows: int) -> torch.Tensor:
        """Logits [K, V] of the flat token indices `places_K`, which must be those that were asked for, if any were.

        rows: R of the microbatch.
        """
        if self.places_K is None:
            return self.logits[places_K // rows, places_K % rows]
        if self.places_K.shape != places_K.shape:
            raise ValueError(
                f"there are logits of {len(self.places_K)} positions, not of the {len(places_K)} asked for"
            )
        return self.logits
