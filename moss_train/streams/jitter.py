"""Arrival jitter: inside a reply a frame may arrive some tokens earlier or later than the layout says.

The rule is that of the reference's collator (model_facts C.4; OpenMOSS/MOSS-Video-Preview,
`src/LF/data/collator.py`, lines 300-320), which moves a frame by one token, earlier; but the decisions come from the
sample's own generator, so that a resumed run meets the same rows.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np


def draw_shifts(frames: int, probability: float, shifts: Sequence[int], rng: np.random.Generator | None) -> list[int]:
    """By how many tokens each frame is to move, negative earlier; all 0 without a generator or with probability 0
    (then nothing is drawn)."""
    if rng is None or probability == 0.0:
        return [0] * frames
    moved = rng.random(frames) < probability
    if len(shifts) == 1:
        return [shifts[0] if move else 0 for move in moved.tolist()]
    # one number a frame, so that later frames change nothing for earlier ones
    chosen = np.random.Generator(np.random.PCG64(int(rng.integers(2**63)))).random(frames) * len(shifts)
    return [shifts[int(place)] if move else 0 for move, place in zip(moved.tolist(), chosen.tolist(), strict=True)]


def move_anchors(
    ids: Sequence[int],
    shifts: Sequence[int],
    anchor: int,
    deciding: Collection[int],
    closing: Collection[int],
    swap: Callable[[int, int], None],
) -> None:
    """Calls `swap(i - 1, i)` for every step by which an anchor at i moves earlier, `swap(i, i + 1)` later.

    It stays among the tokens of one running reply, and apart from other anchors. `deciding` are the tokens whose
    prediction is whether to speak (a header's end, an anchor, the end of a think unit), `closing` those that end what
    is said (silence, a turn's end) or stand before it (a think unit's beginning). Earlier: token i-1 is not silence
    and token i-2 not deciding, so that a frame never overtakes the decision to speak. Later: token i-1 is text, token
    i+1 too, and token i+2 is no anchor. `shifts[f]` belongs to the f-th anchor. `swap` must exchange the two tokens in
    `ids` itself (and in whatever runs beside it), since a later anchor is judged on the result.
    """
    anchors = [index for index, token in enumerate(ids) if token == anchor]
    ends = {anchor, *closing}
    for shift, start in zip(shifts, anchors, strict=True):
        index = start
        while index > start + shift and index >= 2 and ids[index - 1] not in closing and ids[index - 2] not in deciding:
            swap(index - 1, index)
            index -= 1
        inside = index >= 1 and ids[index - 1] not in ends and ids[index - 1] not in deciding
        while inside and index < start + shift and index + 2 < len(ids) and ids[index + 1] not in ends:
            if ids[index + 2] == anchor:
                break
            swap(index, index + 1)
            index += 1
