"""Ranks tell each other small lists."""

import json

import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from moss_train.parallel import groups
from moss_train.parallel.agreement import gather_lists

RANKS = 2
#: round → what each rank tells
ROUNDS = [([], []), ([{"key": "ä", "step": 3}], []), ([], ["x" * 1000]), ([1], [2, 3]), ([], [])]


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, init_method=f"file://{folder}/store")
    groups.initialize()
    with open(f"{folder}/rank{rank}.json", "w") as file:
        json.dump([gather_lists(told[rank]) for told in ROUNDS], file)
    groups.shutdown()


def test_all_ranks_get_the_lists_of_all(tmp_path):
    multiprocessing.start_processes(_rank, (str(tmp_path),), nprocs=RANKS, start_method="spawn")
    for rank in range(RANKS):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == [list(told) for told in ROUNDS]


def test_alone_there_is_nobody_to_ask():
    assert gather_lists([1]) == [[1]]
