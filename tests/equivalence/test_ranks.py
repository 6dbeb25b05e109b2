"""The harness itself: what ranks return, and what becomes of a job that fails or hangs."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from moss_train.bench.equivalence.ranks import JobError


def sum_of_ranks(rank, ranks, factor):
    total = torch.tensor([float(rank * factor)])
    dist.all_reduce(total)
    return total.item(), ranks


def fail_on_the_last(rank, ranks):
    if rank == ranks - 1:
        raise ValueError(f"rank {rank} cannot")
    dist.barrier()


def hang_on_the_first(rank, ranks):
    if rank == 0:
        time.sleep(600)
    dist.barrier()


def end_on_the_first(rank, ranks):
    if rank == 0:
        os._exit(3)
    dist.barrier()


def process_number(rank, ranks):
    return os.getpid()


def test_results_come_by_rank_and_processes_stay(ranks):
    assert ranks.run(3, sum_of_ranks, 2) == [(6.0, 3)] * 3
    first, second = ranks.run(2, process_number), ranks.run(2, process_number)
    assert first == second


def test_a_failure_names_the_rank_and_ends_the_others(ranks):
    began = time.monotonic()
    with pytest.raises(JobError, match=r"(?s)failed on rank 2\n.*ValueError: rank 2 cannot"):
        ranks.run(3, fail_on_the_last, deadline_s=600.0)
    assert time.monotonic() - began < 300.0  # it did not wait for the others
    assert ranks.run(3, sum_of_ranks, 1) == [(3.0, 3)] * 3


def test_a_hang_is_ended_and_tells_where_it_was(ranks):
    with pytest.raises(JobError, match=r"(?s)longer than 3 s; still running: rank 0, 1\nrank 0:.*hang_on_the_first"):
        ranks.run(2, hang_on_the_first, deadline_s=3.0)
    assert ranks.run(2, sum_of_ranks, 1) == [(1.0, 2)] * 2


def test_a_rank_that_ends_is_a_failure(ranks):
    with pytest.raises(JobError, match="failed on rank 0\nrank 0:\nthe process ended"):
        ranks.run(2, end_on_the_first)


def test_more_ranks_than_there_are_is_refused(ranks):
    with pytest.raises(ValueError, match="ranks=9"):
        ranks.run(9, process_number)
