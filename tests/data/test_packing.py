"""Rows within their budgets, every stream once, ranks balanced, microbatches equal in number."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_train.data.packing import CostModel, cut_microbatches, deal_rows, microbatch_count, pack_rows

lengths = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 30)), min_size=0, max_size=60)


@given(lengths)
@settings(max_examples=100, deadline=None)
def test_rows_keep_both_budgets_and_lose_nothing(streams):
    tokens, frames = [t for t, _ in streams], [f for _, f in streams]
    rows = pack_rows(tokens, frames, 100, 30)
    assert sorted(stream for row in rows for stream in row) == list(range(len(streams)))
    for row in rows:
        assert row == sorted(row)
        assert sum(tokens[s] for s in row) <= 100 and sum(frames[s] for s in row) <= 30
    assert rows == pack_rows(tokens, frames, 100, 30)


def test_rows_are_well_filled():
    draw = np.random.default_rng(0)
    tokens = np.minimum(draw.lognormal(4, 0.7, 400).astype(int) + 1, 1024).tolist()
    rows = pack_rows(tokens, [1] * 400, 1024, 10_000)
    assert sum(tokens) / (len(rows) * 1024) > 0.97


def test_a_stream_over_budget_is_the_callers_error():
    with pytest.raises(ValueError, match="over the budget"):
        pack_rows([101], [0], 100, 30)


@given(st.lists(st.floats(0.1, 100), max_size=50), st.integers(1, 9), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_every_row_goes_to_one_rank_and_microbatches_agree(costs, ranks, micro_batch_rows):
    dealt = deal_rows(costs, ranks)
    assert sorted(row for rows in dealt for row in rows) == list(range(len(costs)))
    count = microbatch_count(len(costs), ranks, micro_batch_rows)
    assert count >= 1
    for rows in dealt:
        runs = cut_microbatches(rows, count)
        assert len(runs) == count and [row for run in runs for row in run] == rows
        assert all(len(run) <= micro_batch_rows for run in runs)
        assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_ranks_are_balanced():
    draw = np.random.default_rng(1)
    cost = CostModel()
    costs = [
        cost.stream(int(t), int(f))
        for t, f in zip(draw.integers(20, 2000, 512), draw.integers(1, 200, 512), strict=True)
    ]
    loads = [sum(costs[row] for row in rows) for rows in deal_rows(costs, 16)]
    assert max(loads) / (sum(loads) / 16) < 1.02
