"""Overlapped communication goes bucket by bucket. Models of this size fit in one bucket; here there are many."""

from functools import partial
from unittest import mock

import pytest

from moss_train.bench.equivalence.cases import Case, Problem
from moss_train.bench.equivalence.training import train_case
from moss_train.engines import megatron
from moss_train.parallel.config import LayoutConfig

BUCKET_ELEMENTS = 4000  #: a tenth of the model's largest matrix


def train_in_small_buckets(rank, ranks, case, path):
    small = partial(megatron.DistributedDataParallelConfig, bucket_size=BUCKET_ELEMENTS)
    with mock.patch.object(megatron, "DistributedDataParallelConfig", small):
        return train_case(rank, ranks, case, path)


@pytest.mark.parametrize("streams", ["mixed", "text"])
@pytest.mark.parametrize("gathers", [False, True], ids=["gradients", "gradients and weights"])
@pytest.mark.parametrize(
    "layout", [LayoutConfig(dp=2, zero=1), LayoutConfig(dp=2, pp=2, zero=1)], ids=["one stage", "two stages"]
)
def test_many_buckets(comparer, layout, gathers, streams):
    case = Case(
        Problem(optimizer="adamw", streams=streams),
        layout,
        overlap_grad_reduce=True,
        overlap_param_gather=gathers,
    )
    case.check()
    comparison = comparer.compare(case, train_in_small_buckets)
    assert not comparison.failures
