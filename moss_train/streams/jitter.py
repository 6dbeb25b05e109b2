"""Arrival jitter: inside a reply a frame may arrive one token earlier than the layout says.

The rule is that of the reference's collator (model_facts C.4; OpenMOSS/MOSS-Video-Preview,
`src/LF/data/collator.py`, lines 300-320), but the decisions come from the sample's own generator, so that a
resumed run meets the same rows.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np


def draw_decisions(frames: int, probability: float, rng: np.random.Generator | None) -> list[bool]:
    """One decision a frame; all false without a generator or with probability 0 (then nothing is drawn)."""
    if rng is None or probability == 0.0:
        return [False] * frames
    return (rng.random(frames) < probability).tolist()


def swap_anchors(
    ids: Sequence[int],
    decisions: Sequence[bool],
    anchor: int,
    silence: int,
    deciding: Collection[int],
    swap: Callable[[int, int], None],
) -> None:
    """Calls `swap(i - 1, i)` for every anchor at i that may and is decided to move one token earlier.

    It may when token i-1 is not silence and token i-2 is none of `deciding` (a header's end, an anchor, the end of a
    think unit), whose prediction is whether to speak: a frame never overtakes that decision. `decisions[f]` belongs to
    the f-th anchor. `swap` must exchange the two tokens in `ids` itself (and in whatever runs beside it), since a later
    anchor is judged on the result.
    """
    anchors = [index for index, token in enumerate(ids) if token == anchor]
    for decided, index in zip(decisions, anchors, strict=True):
        if decided and index >= 2 and ids[index - 1] != silence and ids[index - 2] not in deciding:
            swap(index - 1, index)
