"""From a global batch's lengths to rows, ranks, microbatches and shares of their frames. No pixel is touched.

Pure functions of lengths: every rank computes the same plan from the same lengths and takes its own part of it.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from moss_train.data.config import CostConfig, DataConfig

Item = TypeVar("Item")

#: rows of a microbatch; a row is the list of its streams
Microbatch = list[list[int]]


@dataclass(frozen=True)
class RowLimits:
    """What a row and a microbatch may hold."""

    tokens: int  #: most text tokens of a row
    frames: int  #: most frames of a row
    rows: int  #: most rows of a microbatch
    pack: bool  #: False: every stream has a row of its own

    @staticmethod
    def of(data: DataConfig) -> "RowLimits":
        return RowLimits(data.pack_text_tokens, data.pack_frames, data.micro_batch_rows, data.pack)


def stream_costs(cost: CostConfig, tokens: Sequence[int], frames: Sequence[int]) -> list[float]:
    """Cost of each stream by its text tokens and frames, see `CostConfig`."""
    t, f = np.asarray(tokens, np.float64), np.asarray(frames, np.float64)
    return (cost.token * t + cost.token_squared * t * t + cost.token_frame * t * f + cost.frame * f).tolist()


def plan_rows(
    tokens: Sequence[int],
    frames: Sequence[int],
    limits: RowLimits,
    cost: CostConfig,
    ranks: int = 1,
    multiple: int = 1,
) -> list[list[Microbatch]]:
    """Streams 0 … n-1 of a global batch for each of `ranks` data ranks: rank → microbatch → row → streams.

    All ranks get as many microbatches, a multiple of `multiple` and at least one, so that none skips a collective;
    their last ones may be empty. Packed, streams are dealt to ranks by cost, each rank lays its own in as few
    microbatches as the rank that needs most, and spreads them evenly over their rows, since a microbatch is padded to
    its longest row. Raises ValueError for a stream that does not fit in a row.
    """
    deal = Deal(tokens, frames, limits, cost, ranks, multiple)
    return [deal.microbatches(rank) for rank in range(ranks)]


class Deal:
    """Which streams each of `ranks` data ranks has, and how many microbatches all of them run; see `plan_rows`."""

    def __init__(
        self,
        tokens: Sequence[int],
        frames: Sequence[int],
        limits: RowLimits,
        cost: CostConfig,
        ranks: int = 1,
        multiple: int = 1,
    ):
        costs = stream_costs(cost, tokens, frames)
        self._limits = limits
        dealt = deal_streams(costs, ranks) if limits.pack else deal_rows(costs, ranks)
        loads = [sum(costs[stream] for stream in own) for own in dealt]
        #: work of the rank that has most ÷ the mean: how long the others wait for it
        self.imbalance = max(loads) * ranks / (sum(loads) or 1.0)
        if not limits.pack:
            self._rows = [[[stream] for stream in own] for own in dealt]
            self._count = microbatch_count(len(costs), ranks, limits.rows, multiple)
            return
        self._dealt = dealt
        self._lengths = [([tokens[s] for s in own], [frames[s] for s in own]) for own in dealt]
        self._rows = [pack_rows(t, f, limits.tokens, limits.frames) for t, f in self._lengths]
        self._count = microbatch_count(max(map(len, self._rows)), 1, limits.rows, multiple)

    def microbatches(self, rank: int) -> list[Microbatch]:
        """Those of one rank; the rows of the others are not worked out."""
        rows = self._rows[rank]
        if not self._limits.pack:
            return cut_runs(rows, self._count)
        tokens, frames = self._lengths[rank]
        places = self._count * _ceil_div(len(rows), self._count)
        rows = spread_rows(tokens, frames, places, self._limits.tokens, self._limits.frames) or rows
        # Rows of like length stand together.
        rows.sort(key=lambda row: (-sum(frames[s] for s in row), -sum(tokens[s] for s in row), row))
        own = self._dealt[rank]
        return [[[own[s] for s in row] for row in run] for run in cut_runs(rows, self._count)]


def deal_streams(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Streams 0 … n-1 for each of `ranks`: dearest first to the rank with least work; ascending within a rank."""
    loads = [(0.0, rank) for rank in range(ranks)]
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for stream in sorted(range(len(costs)), key=lambda s: (-costs[s], s)):
        load, rank = loads[0]
        dealt[rank].append(stream)
        heapq.heapreplace(loads, (load + costs[stream], rank))
    return [sorted(own) for own in dealt]


def pack_rows(tokens: Sequence[int], frames: Sequence[int], max_tokens: int, max_frames: int) -> list[list[int]]:
    """Streams 0 … n-1 in rows of at most `max_tokens` text tokens and `max_frames` frames (best fit, longest first).

    Within a row streams keep their order; rows are ordered by their first stream. Raises ValueError for a stream that
    does not fit alone.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for stream in _longest_first(tokens, frames, max_tokens, max_frames):
        need_tokens, need_frames = tokens[stream], frames[stream]
        if need_tokens > max_tokens or need_frames > max_frames:
            raise ValueError(
                f"stream {stream} ({need_tokens} tokens, {need_frames} frames) is over the budget of a row"
            )
        best, least = -1, 3.0
        for row, (free_tokens, free_frames) in enumerate(free):
            if need_tokens <= free_tokens and need_frames <= free_frames:
                left = (free_tokens - need_tokens) / max_tokens + (free_frames - need_frames) / max_frames
                if left < least:
                    best, least = row, left
        if best < 0:
            best = len(rows)
            rows.append([])
            free.append((max_tokens, max_frames))
        rows[best].append(stream)
        free[best] = (free[best][0] - need_tokens, free[best][1] - need_frames)
    return sorted(sorted(row) for row in rows)


def spread_rows(
    tokens: Sequence[int], frames: Sequence[int], count: int, max_tokens: int, max_frames: int
) -> list[list[int]] | None:
    """Streams 0 … n-1 in at most `count` rows of about equally many tokens and equally many frames, within the budgets;
    None when this way of placing them, longest first, finds no room for one. Within a row streams keep their order.
    """
    whole_tokens, whole_frames = max(1, sum(tokens)), max(1, sum(frames))
    rows: list[list[int]] = [[] for _ in range(min(count, len(tokens)))]
    held = [(0, 0)] * len(rows)
    for stream in _longest_first(tokens, frames, whole_tokens, whole_frames):
        need_tokens, need_frames = tokens[stream], frames[stream]
        share_tokens, share_frames = need_tokens / whole_tokens**2, need_frames / whole_frames**2
        best, least = -1, float("inf")
        for row, (row_tokens, row_frames) in enumerate(held):
            # How much the sum of squares of the rows' shares of all tokens and of all frames grows.
            growth = row_tokens * share_tokens + row_frames * share_frames
            if growth < least and row_tokens + need_tokens <= max_tokens and row_frames + need_frames <= max_frames:
                best, least = row, growth
        if best < 0:
            return None
        held[best] = (held[best][0] + need_tokens, held[best][1] + need_frames)
        rows[best].append(stream)
    return [sorted(row) for row in rows]


def _longest_first(tokens: Sequence[int], frames: Sequence[int], tokens_unit: int, frames_unit: int) -> list[int]:
    sizes = [max(t / tokens_unit, f / frames_unit) for t, f in zip(tokens, frames, strict=True)]
    return sorted(range(len(sizes)), key=lambda stream: -sizes[stream])


def deal_rows(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Rows 0 … n-1 for each of `ranks`: dearest first to the cheapest rank that still has a place.

    No rank gets more than ceil(n / ranks) rows, so that the ranks need the same number of microbatches. Each rank's
    rows come dearest first, so that the ranks' microbatches of one number cost about the same.
    """
    places = _ceil_div(len(costs), ranks)
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for row in sorted(range(len(costs)), key=lambda r: (-costs[r], r)):
        load, rank = heapq.heappop(loads)
        dealt[rank].append(row)
        if len(dealt[rank]) < places:
            heapq.heappush(loads, (load + costs[row], rank))
    return dealt


def microbatch_count(rows: int, ranks: int, micro_batch_rows: int, multiple: int = 1) -> int:
    """Microbatches every rank runs for `rows` rows; at least one, so that no rank skips a collective.

    It is a multiple of `multiple`, which some pipeline schedules need.
    """
    needed = max(1, _ceil_div(_ceil_div(rows, ranks), micro_batch_rows))
    return _ceil_div(needed, multiple) * multiple


def cut_runs(items: list[Item], count: int) -> list[list[Item]]:
    """`items` in `count` runs whose lengths differ by at most one; the last are empty when there are too few items."""
    short, longer = divmod(len(items), count)
    ends = [(number + 1) * short + min(number + 1, longer) for number in range(count)]
    return [items[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


@dataclass(frozen=True)
class Padding:
    """What a plan leaves empty: of all places of its microbatches, each padded to its longest row."""

    tokens: int  #: real text tokens
    token_places: int
    frames: int
    frame_places: int

    @property
    def text(self) -> float:
        return 1 - self.tokens / max(1, self.token_places)

    @property
    def frame(self) -> float:
        return 1 - self.frames / max(1, self.frame_places)


def padding_of(plan: list[list[Microbatch]], tokens: Sequence[int], frames: Sequence[int]) -> Padding:
    """How much of the batches that `plan_rows` planned is padding; empty microbatches count nothing."""
    figures = np.zeros(4, np.int64)
    for microbatch in (rows for own in plan for rows in own if rows):
        sums = np.array([[sum(tokens[s] for s in row), sum(frames[s] for s in row)] for row in microbatch])
        longest = sums.max(axis=0) * len(sums)
        figures += [sums[:, 0].sum(), longest[0], sums[:, 1].sum(), longest[1]]
    return Padding(*map(int, figures))


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
