"""What ZeRO 3 keeps on a disk changes no number, and goes into checkpoints and out of them as everything else."""

import dataclasses
from functools import partial
from unittest import mock

import pytest
from test_deepspeed_switch import load_and_finish, require_steps, ten_steps, train_and_save  # noqa: F401 (a fixture)

from moss_train.bench.equivalence.cases import Case, Problem
from moss_train.bench.equivalence.training import train_case
from moss_train.engines.deepspeed_library import disk_access_problem
from moss_train.parallel.config import LayoutConfig

pytestmark = pytest.mark.slow  # the first time async_io is compiled, for minutes

ADAMW = Problem(optimizer="adamw", clip=0.3)
ON_DISK = Case(ADAMW, LayoutConfig(dp=2, zero=3), engine_name="deepspeed")
IN_MEMORY = Case(ADAMW, LayoutConfig(tp=2, dp=2, zero=1), engine_name="deepspeed")


@pytest.fixture(autouse=True)
def needs_async_io():
    missing = disk_access_problem()
    if missing is not None:
        pytest.skip(f"DeepSpeed's async_io cannot be compiled here: {missing} is missing")


def on_disk(job, folder, rank, ranks, case, path):
    """The job with all state on the disk that is larger than a few kilobytes; DeepSpeed's limit is a megabyte."""
    from deepspeed.runtime.swap_tensor import optimizer_utils

    zero = {"offload_optimizer": {"device": "nvme", "nvme_path": folder}, "sub_group_size": 9000}
    passed = {"zero_optimization": zero, "aio": {"block_size": 4096}}
    engine = dataclasses.replace(case.engine(), deepspeed=passed)
    with (
        mock.patch.object(Case, "engine", lambda self: engine),
        mock.patch.object(optimizer_utils, "MIN_AIO_BYTES", 1024),
    ):
        return job(rank, ranks, case, path)


@pytest.mark.parametrize("trainable", ["all", "projector_xattn"])
def test_deepspeed_on_a_disk_trains_as_one_process(comparer, tmp_path, trainable):
    case = dataclasses.replace(ON_DISK, problem=dataclasses.replace(ADAMW, trainable=trainable))
    comparison = comparer.compare(case, partial(on_disk, train_case, str(tmp_path)))
    assert comparison.ok, "\n".join(comparison.failures)
    assert list(tmp_path.rglob("*.swp"))


@pytest.mark.parametrize("saved_on_disk", [True, False])
def test_deepspeed_saves_from_a_disk_and_loads_onto_it(comparer, ten_steps, tmp_path, saved_on_disk):  # noqa: F811
    problem, expected = ten_steps
    swaps, checkpoints = tmp_path / "swaps", tmp_path / "checkpoints"
    here, there = (dataclasses.replace(case, problem=problem) for case in (ON_DISK, IN_MEMORY))
    jobs = [train_and_save, load_and_finish]
    cases = [here, there] if saved_on_disk else [there, here]
    losses = []
    for job, case in zip(jobs, cases, strict=True):
        run = partial(on_disk, job, str(swaps)) if case is here else job
        losses += comparer.ranks.run(case.world_size, run, case, str(checkpoints))[0]
    require_steps(expected, losses, checkpoints / "last", there)
