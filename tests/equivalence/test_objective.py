"""Every optional piece of the objective and the decision head, in layouts of both engines, against a plain process."""

from functools import partial
from unittest import mock

import pytest

from moss_train.bench.equivalence.cases import Case, Problem
from moss_train.bench.equivalence.training import train_case
from moss_train.engines import megatron
from moss_train.model import decision_head
from moss_train.model.config import RecomputeConfig
from moss_train.objectives.labels import Total
from moss_train.parallel.config import LayoutConfig

FULL = RecomputeConfig("full", "full", tower=True, tower_frames=2)
ADAMW = Problem(optimizer="adamw", clip=0.3, normaliser="weights", pieces=True)
SGD = Problem(pieces=True)
FROZEN = Problem(trainable="projector_xattn", optimizer="adamw", pieces=True)
SPARSE = Problem(optimizer="adamw", streams="sparse", normaliser="weights", pieces=True)

CASES = {
    "tp2-sp-pp2-vpp2-dp2": Case(
        ADAMW, LayoutConfig(tp=2, sp=True, pp=2, vpp=2, dp=2, zero=1), FULL,
        overlap_grad_reduce=True, overlap_param_gather=True,
    ),
    "frozen": Case(FROZEN, LayoutConfig(pp=2, dp=2, zero=1), overlap_grad_reduce=True),
    "deepspeed-zero3-tp2-sp-dp2": Case(
        ADAMW, LayoutConfig(tp=2, sp=True, dp=2, zero=3), FULL, engine_name="deepspeed"
    ),
    "deepspeed-pp2-zero1": Case(ADAMW, LayoutConfig(pp=2, zero=1), engine_name="deepspeed"),
}  # fmt: skip
MORE = {
    "deepspeed-pp2-tp2-sp-zero1": Case(ADAMW, LayoutConfig(pp=2, tp=2, sp=True, zero=1), engine_name="deepspeed"),
    "tp2-cp2-dp2": Case(SGD, LayoutConfig(tp=2, cp=2, dp=2), micro_batch_rows=2),
    "sparse": Case(SPARSE, LayoutConfig(dp=4), pack=False, overlap_grad_reduce=True),
    "deepspeed-zero2-cp2-dp2": Case(SGD, LayoutConfig(cp=2, dp=2, zero=2), engine_name="deepspeed"),
    "deepspeed-dualpipev": Case(SGD, LayoutConfig(pp=2, dp=2, pipeline_schedule="dualpipev"), engine_name="deepspeed"),
    "deepspeed-zero3-frozen": Case(FROZEN, LayoutConfig(dp=2, zero=3), engine_name="deepspeed"),
}


@pytest.mark.parametrize("name", [*CASES, *[pytest.param(name, marks=pytest.mark.slow) for name in MORE]])
def test_the_whole_objective_trains_as_one_process(comparer, name):
    case = (CASES | MORE)[name]
    case.check()
    comparison = comparer.compare(case)
    assert comparison.ok, f"{case}\n" + "\n".join(comparison.failures)


def counts_of_one_rank():
    """α of the own microbatches instead of the global batch's."""
    original = megatron.MegatronEngine._global_totals

    def of_own(self, batches):
        totals, own = original(self, batches), sum(self._objective.totals(batch) for batch in batches)
        for place in Total.SILENCES, Total.STARTS:
            totals[place] = own[place]
        return totals

    return mock.patch.object(megatron.MegatronEngine, "_global_totals", of_own)


def head_gradient_summed_twice():
    """Backwards, each process takes the sum of all gradients of the gathered logits instead of its share of one."""
    original = decision_head.gather_from_sequence_parallel_region

    def summed(x, tensor_parallel_output_grad, group):
        return original(x, tensor_parallel_output_grad=True, group=group)

    return mock.patch.object(decision_head, "gather_from_sequence_parallel_region", summed)


def train_mutated(fault, rank, ranks, case, path):
    with fault():
        return train_case(rank, ranks, case, path)


@pytest.mark.parametrize(
    ("fault", "layout", "found"),
    [
        (counts_of_one_rank, LayoutConfig(dp=2), "loss of step 0"),
        (head_gradient_summed_twice, LayoutConfig(tp=2, sp=True), "gradient of decision_head.weight"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_fault_of_the_objective_is_found(comparer, fault, layout, found):
    failures = comparer.compare(Case(SGD, layout), partial(train_mutated, fault)).failures
    assert any(failure.startswith(found) for failure in failures), failures[:5]
