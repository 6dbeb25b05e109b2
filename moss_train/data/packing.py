"""From a global batch's lengths to rows, ranks, microbatches and shares of their frames. No pixel is touched.

Pure functions of lengths: every rank computes the same plan from the same lengths and takes its own part of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CostModel:
    """Cost of a stream in units of one text token's forward pass, of t tokens and f frames.

    The defaults are counts of floating-point operations of the 11B model (2 per weight and token, 4·width per
    attended pair and layer): a frame costs the tower's 0.86e9 weights times 1,601 patches; a causal token pair 32 self
    layers of width 4096; a token-frame pair 101 keys in 8 cross layers.
    """

    token: float = 1.0
    token_squared: float = 1.3e-5
    token_frame: float = 6.6e-4
    frame: float = 140.0

    def stream(self, tokens: int, frames: int) -> float:
        return (
            self.token * tokens
            + self.token_squared * tokens * tokens
            + self.token_frame * tokens * frames
            + self.frame * frames
        )


def pack_rows(tokens: list[int], frames: list[int], max_tokens: int, max_frames: int) -> list[list[int]]:
    """Streams 0 … n-1 in rows of at most `max_tokens` text tokens and `max_frames` frames (best fit, longest first).

    Within a row streams keep their order; rows are ordered by their first stream. Every stream must fit alone.
    """
    tokens_n, frames_n = np.asarray(tokens, np.int64), np.asarray(frames, np.int64)
    size = np.maximum(tokens_n / max_tokens, frames_n / max_frames)
    free_tokens, free_frames = np.zeros(len(tokens), np.int64), np.zeros(len(tokens), np.int64)
    rows: list[list[int]] = []
    for stream in np.argsort(-size, kind="stable").tolist():
        need_tokens, need_frames = tokens_n[stream], frames_n[stream]
        if need_tokens > max_tokens or need_frames > max_frames:
            raise ValueError(
                f"stream {stream} ({need_tokens} tokens, {need_frames} frames) is over the budget of a row"
            )
        open_tokens, open_frames = free_tokens[: len(rows)], free_frames[: len(rows)]
        fits = np.flatnonzero((open_tokens >= need_tokens) & (open_frames >= need_frames))
        if len(fits):
            left = (open_tokens[fits] - need_tokens) / max_tokens + (open_frames[fits] - need_frames) / max_frames
            row = int(fits[np.argmin(left)])
        else:
            row = len(rows)
            rows.append([])
            free_tokens[row], free_frames[row] = max_tokens, max_frames
        rows[row].append(stream)
        free_tokens[row] -= need_tokens
        free_frames[row] -= need_frames
    return sorted(sorted(row) for row in rows)


def deal_rows(costs: list[float], ranks: int) -> list[list[int]]:
    """Rows 0 … n-1 for each of `ranks`: dearest first to the cheapest rank that still has a place.

    No rank gets more than ceil(n / ranks) rows, so that the ranks need the same number of microbatches. Each rank's
    rows come dearest first, so that the ranks' microbatches of one number cost about the same.
    """
    places = _ceil_div(len(costs), ranks)
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for row in sorted(range(len(costs)), key=lambda r: (-costs[r], r)):
        rank = min((r for r in range(ranks) if len(dealt[r]) < places), key=lambda r: (load[r], r))
        dealt[rank].append(row)
        load[rank] += costs[row]
    return dealt


def microbatch_count(rows: int, ranks: int, micro_batch_rows: int, multiple: int = 1) -> int:
    """Microbatches every rank runs for `rows` rows; at least one, so that no rank skips a collective.

    It is a multiple of `multiple`, which some pipeline schedules need.
    """
    needed = max(1, _ceil_div(_ceil_div(rows, ranks), micro_batch_rows))
    return _ceil_div(needed, multiple) * multiple


def cut_microbatches(rows: list[int], count: int) -> list[list[int]]:
    """`rows` in `count` runs whose lengths differ by at most one; the last are empty when there are too few rows."""
    short, longer = divmod(len(rows), count)
    ends = [(number + 1) * short + min(number + 1, longer) for number in range(count)]
    return [rows[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def cut_frames(counts: Sequence[int], first: int, end: int) -> list[range]:
    """Of streams with `counts` frames, laid end to end: which frames of each lie in [first, end), counted from its own
    first one."""
    parts, start = [], 0
    for count in counts:
        low = min(max(first - start, 0), count)
        parts.append(range(low, min(max(end - start, low), count)))
        start += count
    return parts


def bounds_of_kept(bounds: Sequence[int], counts: Sequence[int], kept: Sequence[bool]) -> tuple[int, ...]:
    """The bounds between shares of frames once streams are taken out; every frame that stays stays in its share."""
    befores = [cut_frames(counts, 0, bound) for bound in bounds]
    return tuple(sum(len(part) for part, keep in zip(before, kept, strict=True) if keep) for before in befores)


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)
