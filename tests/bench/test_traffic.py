"""Bytes by kind, on calls whose answer is known; megatron-core's own included."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from moss_train import parallel  # noqa: F401  the CPU seam goes in before megatron is imported
from moss_train.bench.traffic import Traffic, ring_bytes

RANKS, KB = 4, 1024


@pytest.fixture
def four_processes():
    """Rank 0 of four, with a backend that sends nothing; counting stands before the backend."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield dist.group.WORLD
    dist.destroy_process_group()


def kilobytes(count: int = 1) -> torch.Tensor:
    return torch.zeros(count * 256)


def count(call) -> dict[str, float]:
    with Traffic() as traffic:
        call()
    return dict(traffic.bytes)


CALLS = {
    "all_reduce": (lambda: dist.all_reduce(kilobytes()), 2 * 3 / 4),
    "all_reduce, async": (lambda: dist.all_reduce(kilobytes(), async_op=True).wait(), 2 * 3 / 4),
    "all_reduce, 16 bit": (lambda: dist.all_reduce(kilobytes().bfloat16()), 3 / 4),
    "all_gather": (lambda: dist.all_gather([kilobytes() for _ in range(RANKS)], kilobytes()), 3),
    "all_gather_into_tensor": (lambda: dist.all_gather_into_tensor(kilobytes(4), kilobytes()), 3),
    "reduce_scatter": (lambda: dist.reduce_scatter(kilobytes(), [kilobytes() for _ in range(RANKS)]), 3),
    "reduce_scatter_tensor": (lambda: dist.reduce_scatter_tensor(kilobytes(), kilobytes(4)), 3),
    "all_to_all": (lambda: dist.all_to_all_single(kilobytes(4), kilobytes(4)), 3),
    "broadcast": (lambda: dist.broadcast(kilobytes(4), 1), 3),
    "reduce": (lambda: dist.reduce(kilobytes(4), 1), 3),
    "gather": (lambda: dist.gather(kilobytes(), None, 1), 1),
    "gather, at the root": (lambda: dist.gather(kilobytes(), [kilobytes() for _ in range(RANKS)], 0), 0),
    "scatter": (lambda: dist.scatter(kilobytes(), None, 1), 0),
    "scatter, at the root": (lambda: dist.scatter(kilobytes(), [kilobytes() for _ in range(RANKS)], 0), 3),
    "send": (lambda: dist.send(kilobytes(2), 1), 2),
    "isend": (lambda: dist.isend(kilobytes(2), 1).wait(), 2),
    "recv": (lambda: dist.recv(kilobytes(2), 1), 0),
    "barrier": (lambda: dist.barrier(), 0),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_of_torch_distributed(four_processes, name):
    call, expected = CALLS[name]
    operation = {"isend": "send", "all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}
    found = count(call)
    if expected:
        key = name.split(",")[0]
        assert found == {f"other.{operation.get(key, key)}": expected * KB}
    else:
        assert not found


def test_batches_of_sends(four_processes):
    def exchange():
        operations = [dist.P2POp(dist.isend, kilobytes(2), 1), dist.P2POp(dist.irecv, kilobytes(1), 3)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    assert count(exchange) == {"other.send": 2 * KB}


def test_coalesced_collectives(four_processes):
    def reduce():
        with dist._coalescing_manager(dist.group.WORLD):
            for _ in range(3):
                dist.all_reduce(kilobytes())

    assert count(reduce) == {"other.all_reduce": 3 * 2 * 3 / 4 * KB}


def test_groups_of_one_send_nothing(four_processes):
    alone = dist.new_group([0])
    assert not count(lambda: (dist.all_reduce(kilobytes(), group=alone), dist.broadcast(kilobytes(), 0, group=alone)))


def test_the_group_is_the_call_s(four_processes):
    pair = dist.new_group([0, 1])
    assert count(lambda: dist.all_reduce(kilobytes(), group=pair)) == {"other.all_reduce": KB}


def test_megatron_s_own_names_in_forward_and_backward(four_processes):
    """Its all-gather and reduce-scatter are bound at import; the backward pass runs from autograd."""
    from megatron.core.tensor_parallel.mappings import (
        gather_from_sequence_parallel_region,
        reduce_from_tensor_model_parallel_region,
    )

    x = torch.zeros(16, 16, requires_grad=True)  # 1 KB
    world = dist.group.WORLD
    assert count(lambda: reduce_from_tensor_model_parallel_region(x, group=world).sum().backward()) == {
        "tensor.all_reduce": 2 * 3 / 4 * KB
    }
    assert count(lambda: gather_from_sequence_parallel_region(x, group=world).sum().backward()) == {
        "tensor.all_gather": 3 * KB,
        "tensor.reduce_scatter": 3 * KB,
    }


def test_the_innermost_caller_gives_the_kind(four_processes):
    """Our frame gather may be called by megatron's schedule, which is called by our engine."""
    from moss_train.parallel import frame_gather

    own = torch.zeros(1, 4, 16, requires_grad=True)  # 256 B, of four processes' 1 KB
    plan = frame_gather.SharePlan(((1, 1, 1, 1),), 0, 4)
    found = count(lambda: frame_gather.gather_over_tensor(own, plan, dist.group.WORLD).sum().backward())
    assert found == {"frames.all_gather": 3 / 4 * KB, "frames.reduce_scatter": 3 / 4 * KB}


def test_counts_go_on(four_processes):
    traffic = Traffic()
    for _ in range(2):
        with traffic:
            dist.all_reduce(kilobytes())
    dist.all_reduce(kilobytes())
    assert traffic.bytes == {"other.all_reduce": 2 * 2 * 3 / 4 * KB}
    assert traffic.calls == {"other.all_reduce": 2}


def test_an_operator_without_a_known_size_is_refused(four_processes):
    from torch.distributed import _functional_collectives as functional

    with pytest.raises(RuntimeError, match="all_reduce.*no size"), Traffic():
        functional.all_reduce(kilobytes(), "sum", dist.group.WORLD)


def test_ring_bytes():
    assert ring_bytes("all_reduce", 100, 1) == 0
    assert ring_bytes("all_reduce", 100, 2) == 100
    assert ring_bytes("all_gather", 100, 4) == 75
    assert ring_bytes("send", 100, 2) == 100
