"""Pipeline stages under DeepSpeed: 1F1B and DualPipeV, ZeRO 0 and 1, against one plain process."""

from functools import partial
from unittest import mock

import pytest

from moss_train.bench.equivalence.cases import Case, Problem
from moss_train.bench.equivalence.training import train_case
from moss_train.model.config import RecomputeConfig
from moss_train.parallel.config import LayoutConfig

FULL = RecomputeConfig("full", "full", tower=True, tower_frames=2)
SGD, ADAMW, CLIPPED = Problem(), Problem(optimizer="adamw"), Problem(optimizer="adamw", clip=0.3)
BF16 = Problem(optimizer="adamw", rounded=True)
PARTS = Problem(optimizer="adamw", trainable="projector_xattn", clip=0.3)


def case_of(problem: Problem, options: dict | None = None, **layout) -> Case:
    return Case(problem, LayoutConfig(**layout), engine_name="deepspeed", **(options or {}))


CASES = {
    "pp2": case_of(SGD, pp=2),
    "pp2-zero1": case_of(ADAMW, pp=2, zero=1),
    "pp4": case_of(CLIPPED, {"recompute": FULL}, pp=4),
    "pp4-zero1": case_of(SGD, pp=4, zero=1),
    "pp2-tp2": case_of(ADAMW, pp=2, tp=2),
    "pp2-tp2-zero1": case_of(SGD, pp=2, tp=2, zero=1),
    "pp2-tp2-sp": case_of(SGD, pp=2, tp=2, sp=True),
    "pp2-tp2-sp-zero1": case_of(CLIPPED, {"recompute": FULL}, pp=2, tp=2, sp=True, zero=1),
    "pp2-dp2": case_of(CLIPPED, pp=2, dp=2),
    "pp2-dp2-zero1": case_of(ADAMW, pp=2, dp=2, zero=1),
    "pp2-cp2-unpacked": case_of(SGD, {"pack": False, "micro_batch_rows": 2}, pp=2, cp=2),
    "frames of the first stage": case_of(ADAMW, pp=2, tp=2, frame_shard="tp", zero=1),
    "stages without a trained parameter": case_of(PARTS, pp=4, pipeline_split=[1, 3, 1, 3], zero=1),
    "the same without ZeRO": case_of(PARTS, pp=4, pipeline_split=[1, 3, 1, 3]),
    "the projector alone": case_of(Problem(trainable="projector_only", streams="windowed"), pp=4, zero=1),
    "no frames": case_of(Problem(optimizer="adamw", streams="text"), pp=2, dp=2, zero=1),
    "frames on some processes": case_of(Problem(optimizer="adamw", streams="sparse"), pp=2, dp=2, zero=1),
    "bf16": case_of(BF16, {"precision": "bf16"}, pp=2, tp=2, sp=True, dp=2, zero=1),
    "bf16, parts": case_of(
        Problem(optimizer="adamw", trainable="projector_xattn", rounded=True), {"precision": "bf16"},
        pp=4, pipeline_split=[1, 3, 1, 3], zero=1,
    ),
    "dualpipev": case_of(SGD, pp=2, pipeline_schedule="dualpipev"),
    "dualpipev-pp4": case_of(ADAMW, pp=4, pipeline_schedule="dualpipev", zero=1),
    "dualpipev-tp2-sp-dp2": case_of(
        CLIPPED, {"recompute": FULL}, pp=2, tp=2, sp=True, dp=2, pipeline_schedule="dualpipev", zero=1
    ),
    "dualpipev, parts": case_of(PARTS, pp=2, pipeline_schedule="dualpipev", frame_shard="tp", zero=1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_deepspeed_pipeline_trains_as_one_process(comparer, name):
    case = CASES[name]
    case.check()
    comparison = comparer.compare(case)
    assert comparison.ok, f"{case}\n" + "\n".join(comparison.failures)


def encoder_gradients_unsummed():
    """Each stage keeps the gradients of the frames that it encoded."""
    from moss_train.engines import deepspeed_pipeline

    original = deepspeed_pipeline.add_up

    def of_tensor_ranks_alone(tensors, group):
        if group.size() < 4:
            original(tensors, group)

    return mock.patch.object(deepspeed_pipeline, "add_up", of_tensor_ranks_alone)


def partial_gradients_unsummed():
    """Norms of heads, and with sequence parallelism all norms and gates, keep one tensor rank's part."""
    from moss_train.engines import deepspeed_pipeline

    original = deepspeed_pipeline.add_up

    def of_the_model_alone(tensors, group):
        if group.size() == 4:
            original(tensors, group)

    return mock.patch.object(deepspeed_pipeline, "add_up", of_the_model_alone)


def gradients_received_into_one_buffer():
    from moss_train.engines import deepspeed_pipeline

    return mock.patch.object(deepspeed_pipeline, "_into_new_memory", lambda instruction: instruction)


def copies_counted_in_the_norm():
    """The norm counts what every stage holds of the encoder."""
    from moss_train.engines import deepspeed

    return mock.patch.object(deepspeed.DeepSpeedEngine, "_counted", lambda self: self._trained.values())


def train_mutated(fault, rank, ranks, case, path):
    from moss_train.engines.deepspeed_library import load

    load()
    with fault():
        return train_case(rank, ranks, case, path)


TP_SP = case_of(SGD, pp=2, tp=2, sp=True, zero=1)


@pytest.mark.parametrize(
    ("fault", "case", "found"),
    [
        (encoder_gradients_unsummed, TP_SP, ["gradient of vision_tower.", "gradient of projector.weight"]),
        (partial_gradients_unsummed, TP_SP, ["gradient of layers.4.mlp_gate", "gradient of final_norm.weight"]),
        (gradients_received_into_one_buffer, CASES["the same without ZeRO"], ["gradient of projector.weight"]),
        (copies_counted_in_the_norm, case_of(CLIPPED, pp=2), ["gradient norm of step 0"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_deepspeed_pipeline_a_fault_is_found(comparer, fault, case, found):
    failures = comparer.compare(case, partial(train_mutated, fault)).failures
    for beginning in found:
        assert any(failure.startswith(beginning) for failure in failures), failures[:5]


@pytest.mark.parametrize("layout", [LayoutConfig(pp=2, zero=1), LayoutConfig(dp=2, zero=3)], ids=["pp2", "dp2"])
def test_deepspeed_makes_no_process_group(comparer, tmp_path, layout):
    case = Case(SGD, layout, engine_name="deepspeed")
    assert comparer.ranks.run(2, groups_made, case, str(tmp_path / "outcome")) == [[], []]


def groups_made(rank: int, ranks: int, case: Case, path: str) -> list[str]:
    """What was asked for while the engine was set up, after the layout's groups were made."""
    import torch.distributed as dist

    from moss_train.engines import deepspeed
    from moss_train.engines.deepspeed_library import load

    load()
    asked: list[str] = []
    new_group, setup = dist.new_group, deepspeed.initialize

    def counted(*arguments, **options):
        asked.append(f"{arguments} {options}")
        return new_group(*arguments, **options)

    def watched(*arguments):
        with mock.patch.object(dist, "new_group", counted):
            return setup(*arguments)

    with mock.patch.object(deepspeed, "initialize", watched):
        train_case(rank, ranks, case, path)
    return asked
