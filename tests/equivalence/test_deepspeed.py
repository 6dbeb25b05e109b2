"""The DeepSpeed engine changes no number either: every ZeRO stage in every kind of layout, against a plain process."""

import dataclasses
import re
from functools import partial
from unittest import mock

import pytest
import torch

from moss_train.bench.equivalence.cases import Case, Problem
from moss_train.bench.equivalence.training import train_case
from moss_train.engines import deepspeed, deepspeed_whole, even_work
from moss_train.model.config import RecomputeConfig
from moss_train.parallel.config import LayoutConfig

STAGES = (0, 1, 2, 3)
FULL = RecomputeConfig("full", "full", tower=True, tower_frames=2)
SELECTIVE = RecomputeConfig("selective", "selective")
SGD, ADAMW, CLIPPED = Problem(), Problem(optimizer="adamw"), Problem(optimizer="adamw", clip=0.3)


def layouts(**degrees) -> list[LayoutConfig]:
    return [LayoutConfig(zero=zero, **degrees) for zero in STAGES]


def case_of(layout: LayoutConfig, problem: Problem = SGD, **options) -> Case:
    return Case(problem, layout, engine_name="deepspeed", **options)


#: {zero 0..3} × {tp 1, 2} × {dp 1, 2}
MATRIX = [
    *[case_of(layout) for layout in layouts(dp=1)],
    *[case_of(layout, ADAMW) for layout in layouts(dp=2)],
    *[case_of(layout, SGD, recompute=SELECTIVE) for layout in layouts(tp=2, dp=1)],
    *[case_of(layout, CLIPPED, recompute=FULL) for layout in layouts(tp=2, sp=True, dp=2)],
]
OTHERS = [
    case_of(LayoutConfig(cp=2, dp=2, zero=3), ADAMW, pack=False, micro_batch_rows=2),
    case_of(LayoutConfig(tp=2, cp=2, zero=2), Problem(clip=0.3, normaliser="weights")),
    *[
        case_of(layout, Problem(optimizer="adamw", trainable="projector_xattn"), recompute=SELECTIVE)
        for layout in layouts(tp=2, dp=2)[::2]
    ],
    case_of(LayoutConfig(dp=2, zero=3), Problem(trainable="projector_only", streams="windowed")),
    *[
        case_of(layout, Problem(optimizer="adamw", rounded=True), precision="bf16")
        for layout in layouts(tp=2, sp=True, dp=2)[1:]
    ],
]
MORE = [
    *[case_of(layout, ADAMW, pack=False, micro_batch_rows=2) for layout in layouts(cp=2, dp=2)[1:3]],
    *[
        case_of(layout, Problem(optimizer="adamw", trainable="projector_xattn"), recompute=SELECTIVE)
        for layout in layouts(tp=2, dp=2)[1::2]
    ],
]


def name_of(case: Case) -> str:
    layout = case.layout
    sizes = {"tp": layout.tp, "cp": layout.cp, "dp": layout.dp or 1}
    degrees = "-".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1)
    return "-".join(filter(None, [f"zero{layout.zero}", degrees, case.problem.trainable, case.precision]))


@pytest.mark.parametrize(
    "case", [*MATRIX, *OTHERS, *[pytest.param(case, marks=pytest.mark.slow) for case in MORE]],
    ids=name_of,
)  # fmt: skip
def test_deepspeed_trains_as_one_process(comparer, case):
    case.check()
    comparison = comparer.compare(case)
    assert comparison.ok, f"{case}\n" + "\n".join(comparison.failures)


@pytest.mark.parametrize(("zero", "streams"), [(2, "sparse"), (3, "text"), (3, "images"), (3, "sparse")])
def test_deepspeed_batches_that_lack_something_end_and_end_right(comparer, zero, streams):
    """Frames nowhere, on some processes only, or more on some; buckets so small that any other order is another sum."""
    case = case_of(
        LayoutConfig(tp=2, dp=2, zero=zero), Problem(optimizer="adamw", streams=streams), recompute=FULL,
        overlap_grad_reduce=True,
    )  # fmt: skip
    comparison = comparer.compare(case, train_in_small_buckets)
    assert comparison.ok, "\n".join(comparison.failures)


OFFLOADED = {"device": "cpu"}
SIXTEEN = {"communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "bf16"}}
BF16 = Problem(optimizer="adamw", rounded=True)


@pytest.mark.parametrize(
    ("layout", "problem", "passed"),
    [
        (LayoutConfig(dp=2, zero=2), CLIPPED, {"zero_optimization": {"offload_optimizer": OFFLOADED}}),
        (
            LayoutConfig(tp=2, dp=2, zero=3),
            CLIPPED,
            {"zero_optimization": {"offload_optimizer": OFFLOADED, "offload_param": OFFLOADED}},
        ),
        (LayoutConfig(dp=4, zero=3), ADAMW, {"zero_optimization": {"zero_hpz_partition_size": 2}}),
        *[(LayoutConfig(dp=2, zero=zero), BF16, SIXTEEN) for zero in (1, 2, 3)],
    ],
    ids=["offloaded", "offloaded parameters", "hpz", *[f"summed in bfloat16, zero{zero}" for zero in (1, 2, 3)]],
)
def test_deepspeed_further_fields_change_no_number(comparer, layout, problem, passed):
    case = case_of(layout, problem, precision="bf16" if problem.rounded else "fp32")
    comparison = comparer.compare(case, partial(train_with, passed))
    assert comparison.ok, "\n".join(comparison.failures)


def train_with(passed, rank, ranks, case, path):
    engine = dataclasses.replace(case.engine(), deepspeed=passed)
    with mock.patch.object(Case, "engine", lambda self: engine):
        return train_case(rank, ranks, case, path)


def train_in_small_buckets(rank, ranks, case, path):
    original = deepspeed.deepspeed_settings

    def small(*arguments):
        settings = original(*arguments)
        settings["zero_optimization"] |= {"reduce_bucket_size": 4000, "allgather_bucket_size": 4000}
        if case.layout.zero == 3:
            settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 100, "sub_group_size": 9000}
        return settings

    with mock.patch.object(deepspeed, "deepspeed_settings", small):
        return train_case(rank, ranks, case, path)


def test_deepspeed_processes_may_have_unequal_numbers_of_microbatches(comparer):
    case = case_of(LayoutConfig(dp=2, zero=3), ADAMW)
    comparison = comparer.compare(case, train_unevenly)
    assert comparison.ok, "\n".join(comparison.failures)


def train_unevenly(rank, ranks, case, path):
    """The first process gets one more microbatch, which holds nothing that is trained."""
    original = deepspeed_whole.even_microbatches

    def more(batches, state):
        return original([*batches, *[even_work.blank_batch(batches[0])] * (state.rank == 0)], state)

    with mock.patch.object(deepspeed_whole, "even_microbatches", more):
        return train_case(rank, ranks, case, path)


def partial_gradients_unsummed():
    """Norms of heads, and with sequence parallelism all norms and gates, keep one tensor rank's part."""
    original = deepspeed_whole.sees_a_part

    def encoders_alone(name, parameter):
        return original(name, parameter) and not hasattr(parameter, "partial_over_tensor_group")

    return mock.patch.object(deepspeed_whole, "sees_a_part", encoders_alone)


def encoder_gradients_unsummed():
    def others_alone(name, parameter):
        return getattr(parameter, "partial_over_tensor_group", False)

    return mock.patch.object(deepspeed_whole, "sees_a_part", others_alone)


def normaliser_of_one_rank():
    """Z of the own microbatches instead of the global batch's."""

    def of_own(self, batches):
        return sum(self._objective.totals(batch) for batch in batches)

    return mock.patch.object(deepspeed.DeepSpeedEngine, "_global_totals", of_own)


def frames_left_out():
    """A process encodes a frame less and takes a zero for it."""
    original = even_work.EvenEncoder.encode

    def encode(self, frames_NCHW, chunks):
        features = original(self, frames_NCHW, chunks)
        return torch.cat([features[:-1], torch.zeros_like(features[-1:])])

    return mock.patch.object(even_work.EvenEncoder, "encode", encode)


def train_mutated(fault, rank, ranks, case, path):
    with fault():
        return train_case(rank, ranks, case, path)


TP_SP = LayoutConfig(tp=2, sp=True, zero=1)


@pytest.mark.parametrize(
    ("fault", "layout", "found", "only"),
    [
        (
            partial_gradients_unsummed,
            TP_SP,
            ["gradient of layers.4.mlp_gate", "gradient of final_norm.weight", "gradient of layers.0.mlp_norm.weight"],
            r"norm|gate",
        ),
        (
            encoder_gradients_unsummed,
            TP_SP,
            ["gradient of vision_tower.norm_post.weight", "gradient of projector.weight"],
            r"vision_tower|projector",
        ),
        (normaliser_of_one_rank, LayoutConfig(dp=2, zero=2), ["loss of step 0"], ""),
        (frames_left_out, LayoutConfig(dp=2, zero=3), ["loss of step 0"], ""),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_deepspeed_a_fault_is_found(comparer, fault, layout, found, only):
    """`only`: what the gradients that are wrong have in their names. The others show that nothing else was."""
    failures = comparer.compare(case_of(layout), partial(train_mutated, fault)).failures
    for beginning in found:
        assert any(failure.startswith(beginning) for failure in failures), failures[:5]
    wrong = [failure for failure in failures if failure.startswith("gradient of")]
    assert all(re.search(only, failure) for failure in wrong), wrong
