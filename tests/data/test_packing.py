"""Rows within their budgets, every stream once, ranks balanced, microbatches equal in number."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_train.data.config import CostConfig
from moss_train.data.packing import (
    Deal,
    RowLimits,
    cut_runs,
    deal_rows,
    deal_streams,
    microbatch_count,
    pack_rows,
    padding_of,
    plan_rows,
    spread_rows,
    stream_costs,
)

lengths = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 30)), min_size=0, max_size=60)


def realtime_like(count: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Lengths as of the published real-time mixture: 11 % text, 29 % stills, 60 % videos of 8 to 256 frames."""
    draw = np.random.default_rng(seed)
    kinds = draw.choice(3, count, p=[0.11, 0.29, 0.60])
    video = np.clip(draw.lognormal(4.2, 0.8, count), 8, 256).astype(int)
    frames = np.select([kinds == 0, kinds == 1], [0, draw.integers(1, 4, count)], video)
    tokens = np.minimum(4096, 20 + draw.lognormal(5.3, 0.8, count) + 2 * frames).astype(int)
    return tokens.tolist(), frames.tolist()


@given(lengths, st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_plan_holds_every_stream_once_within_the_budgets_in_equally_many_microbatches(
    streams, ranks, micro_batch_rows, multiple, pack
):
    tokens, frames = [t for t, _ in streams], [f for _, f in streams]
    limits = RowLimits(100, 30, micro_batch_rows, pack)
    plan = plan_rows(tokens, frames, limits, CostConfig(), ranks, multiple)
    assert len(plan) == ranks
    assert sorted(s for own in plan for rows in own for row in rows for s in row) == list(range(len(streams)))
    counts = {len(own) for own in plan}
    assert len(counts) == 1 and min(counts) >= 1 and min(counts) % multiple == 0
    for own in plan:
        for rows in own:
            assert len(rows) <= micro_batch_rows
            for row in rows:
                assert row and row == sorted(row) and (pack or len(row) == 1)
                assert sum(tokens[s] for s in row) <= 100 and sum(frames[s] for s in row) <= 30
    for rank in range(ranks):
        assert Deal(tokens, frames, limits, CostConfig(), ranks, multiple).microbatches(rank) == plan[rank]


@given(lengths)
@settings(max_examples=100, deadline=None)
def test_rows_keep_both_budgets_and_lose_nothing(streams):
    tokens, frames = [t for t, _ in streams], [f for _, f in streams]
    rows = pack_rows(tokens, frames, 100, 30)
    assert sorted(stream for row in rows for stream in row) == list(range(len(streams)))
    for row in rows:
        assert row == sorted(row)
        assert sum(tokens[s] for s in row) <= 100 and sum(frames[s] for s in row) <= 30


def test_rows_are_well_filled():
    draw = np.random.default_rng(0)
    tokens = np.minimum(draw.lognormal(4, 0.7, 400).astype(int) + 1, 1024).tolist()
    rows = pack_rows(tokens, [1] * 400, 1024, 10_000)
    assert sum(tokens) / (len(rows) * 1024) > 0.97


def test_streams_are_spread_evenly_in_both_lengths():
    tokens, frames = [30, 30, 1, 1, 30, 30], [1, 1, 20, 20, 1, 1]
    rows = spread_rows(tokens, frames, 2, 100, 100)
    assert [sum(tokens[s] for s in row) for row in rows] == [61, 61]
    assert [sum(frames[s] for s in row) for row in rows] == [22, 22]
    assert spread_rows([60, 60, 60], [0, 0, 0], 2, 100, 100) is None


def test_a_stream_over_budget_is_the_callers_error():
    with pytest.raises(ValueError, match="over the budget"):
        pack_rows([101], [0], 100, 30)


@given(st.lists(st.floats(0.1, 100), max_size=50), st.integers(1, 9), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_every_row_goes_to_one_rank_and_microbatches_agree(costs, ranks, micro_batch_rows):
    dealt = deal_rows(costs, ranks)
    assert sorted(row for rows in dealt for row in rows) == list(range(len(costs)))
    assert sorted(s for own in deal_streams(costs, ranks) for s in own) == list(range(len(costs)))
    count = microbatch_count(len(costs), ranks, micro_batch_rows)
    assert count >= 1
    for rows in dealt:
        runs = cut_runs(rows, count)
        assert len(runs) == count and [row for run in runs for row in run] == rows
        assert all(len(run) <= micro_batch_rows for run in runs)
        assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_64_ranks_are_balanced_and_rows_of_one_microbatch_waste_nothing():
    for seed in range(3):
        tokens, frames = realtime_like(1024, seed)
        plan = plan_rows(tokens, frames, RowLimits(4096, 256, 1, True), CostConfig(), 64)
        assert Deal(tokens, frames, RowLimits(4096, 256, 1, True), CostConfig(), 64, 1).imbalance < 1.01
        costs = stream_costs(CostConfig(), tokens, frames)
        loads = [sum(costs[s] for rows in own for row in rows for s in row) for own in plan]
        assert max(loads) / (sum(loads) / 64) < 1.01
        padding = padding_of(plan, tokens, frames)
        assert (padding.text, padding.frame) == (0.0, 0.0)
        assert (padding.tokens, padding.frames) == (sum(tokens), sum(frames))


def test_padding_counts_what_the_longest_row_costs():
    plan = [[[[0], [1]]], [[[2]]]]
    padding = padding_of(plan, [10, 4, 6], [2, 2, 0])
    assert (padding.token_places, padding.frame_places) == (26, 4)
    assert padding.text == pytest.approx(6 / 26)


def test_costs_follow_the_formula():
    cost = CostConfig(token=2.0, token_squared=0.5, token_frame=0.25, frame=7.0)
    assert stream_costs(cost, [4, 0], [2, 3]) == [2 * 4 + 0.5 * 16 + 0.25 * 8 + 7 * 2, 21.0]
