"""Tokens that wait in rows of growing streams become one call of the model.

Shape suffixes: R rows, L tokens fed at once, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moss_train.streams.sight import Sight


@dataclass(frozen=True)
class Waiting:
    """What is fed to one row."""

    tokens: Sequence[int]
    tokens_before: int  #: in the row
    frames: int  #: of the row, those whose anchors are among `tokens` included


def feed(
    model: Any,
    state: Any,
    sight: Sight,
    anchor: int,
    waiting: Mapping[int, Waiting],
    rows: int,
    device: torch.device,
) -> torch.Tensor:
    """Append to each row of `waiting` its tokens; logits [R, V] after the last of each, R being `rows`, meaningful for
    these rows alone. The places of the tokens are the compiler's (`Sight.places`)."""
    longest = max(len(one.tokens) for one in waiting.values())
    # numpy, since filling tensors element by element would cost more than a tiny model's forward
    ids_RL, positions_RL, cross_RL = (np.zeros((rows, longest), np.int64) for _ in range(3))
    lo_RL, hi_RL, text_lo_RL = (np.zeros((rows, longest), np.int32) for _ in range(3))
    lengths_R = np.zeros(rows, np.int64)
    for row, one in waiting.items():
        tokens, count = np.array(one.tokens), len(one.tokens)
        is_anchor = tokens == anchor
        places = sight.places(is_anchor, one.tokens_before, one.frames - int(is_anchor.sum()))
        ids_RL[row, :count], positions_RL[row, :count] = tokens, places.positions
        cross_RL[row, :count], text_lo_RL[row, :count] = places.cross_positions, places.text_lo
        lo_RL[row, :count], hi_RL[row, :count] = places.visible_lo, places.visible_hi
        lengths_R[row] = count
    # ranges and lengths stay on the CPU, where the caches read them
    return model.extend(
        state,
        torch.from_numpy(ids_RL).to(device),
        torch.from_numpy(positions_RL).to(device),
        torch.from_numpy(lengths_R),
        visible_lo_RL=torch.from_numpy(lo_RL),
        visible_hi_RL=torch.from_numpy(hi_RL),
        sinks=sight.sinks,
        cross_positions_RL=torch.from_numpy(cross_RL).to(device),
        text_lo_RL=torch.from_numpy(text_lo_RL),
        text_sinks=sight.text_sinks,
        only_last=True,
    )
