"""Processes that torchrun has started again meet each other, not what their predecessors left in the store."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from moss_train.parallel.rendezvous import agree_on_start

SOON = timedelta(seconds=20)


def start(store: dist.Store, delays: list[float]) -> list[str]:
    """A start in which each process comes so many seconds late."""

    def come(rank: int) -> str:
        time.sleep(delays[rank])
        return agree_on_start(store, rank, len(delays), SOON)

    with ThreadPoolExecutor(len(delays)) as processes:
        return list(processes.map(come, range(len(delays))))


def test_every_start_has_a_name_of_its_own():
    store = dist.HashStore()
    names = [start(store, delays) for delays in ([0, 0.3, 0], [0.4, 0, 0.2], [0, 0, 0.5], [0, 0.3], [0.2, 0, 0, 0.1])]
    assert all(len(set(name)) == 1 for name in names)
    assert len({name[0] for name in names}) == len(names)


def test_a_start_that_some_did_not_survive():
    """Two of three came, the third was killed before; then all are started again."""
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as processes:
        lost = [processes.submit(agree_on_start, store, rank, 3, timedelta(seconds=1)) for rank in (0, 2)]
        for one in lost:
            with pytest.raises(dist.DistError, match="not all 3 processes came"):
                one.result()
    assert len(set(start(store, [0.3, 0.0, 0.1]))) == 1
