"""Batches that lack something (frames everywhere, frames on some ranks, rows on some ranks) end, and end right.

A rank that skips a collective because it has nothing to bring leaves the others waiting. With `overlap_grad_reduce` the
gradient sums themselves start in the backward pass, which a rank without frames must enter too.
"""

import pytest

from moss_train.bench.equivalence.cases import Case, Problem
from moss_train.model.config import RecomputeConfig
from moss_train.parallel.config import LayoutConfig

LAYOUTS = [
    LayoutConfig(tp=2, pp=2, cp=2, sp=True),
    LayoutConfig(pp=4, dp=2, zero=1, pipeline_split=[0, 4, 4, 0]),
    LayoutConfig(pp=2, vpp=2, dp=2, frame_shard="tp"),
    LayoutConfig(cp=2, dp=4),
]
DEADLINE_S = 180.0  #: two cores may be shared with other tests


@pytest.mark.parametrize("layout", LAYOUTS, ids=["tp-pp-cp", "pp-dp-zero", "pp-vpp-dp", "cp-dp"])
@pytest.mark.parametrize("streams", ["text", "images", "sparse"])
def test_a_batch_that_lacks_something_ends_and_ends_right(comparer, layout, streams):
    case = Case(
        problem=Problem(optimizer="adamw", streams=streams),
        layout=layout,
        recompute=RecomputeConfig("selective", "full", tower=True),
        overlap_grad_reduce=True,
    )
    case.check()
    comparison = comparer.compare(case, deadline_s=DEADLINE_S)
    assert comparison.ok, "\n".join(comparison.failures)
