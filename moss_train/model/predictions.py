"""What the model says of every token: the next one, and, with a decision head, whether now is the time to speak.

Shape suffixes: T tokens, R rows, V rows of the head (this process's columns when matrices are split).
"""

from typing import NamedTuple

import torch


class Predictions(NamedTuple):
    """The model's outputs for one microbatch."""

    logits_TRV: torch.Tensor  #: of the next token
    #: float32 [T, R], logit of "speak now"; meant at frames' anchors alone. None without a decision head.
    decisions_TR: torch.Tensor | None = None
