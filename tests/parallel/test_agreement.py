"""Ranks tell each other small lists."""

import json

import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from moss_train.parallel import groups
from moss_train.parallel.agreement import gather_lists, gather_to_main, told_by_main

RANKS = 2
#: round → what each rank tells
ROUNDS = [([], []), ([{"key": "ä", "step": 3}], []), ([], ["x" * 1000]), ([1], [2, 3]), ([], [])]
#: round → each rank's JSON value
VALUES = [(None, {"ä": [1.5]}), ("x" * 3000, []), ({"a": 0.1}, {"b": "long" * 500})]


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, init_method=f"file://{folder}/store")
    groups.initialize()
    with open(f"{folder}/rank{rank}.json", "w") as file:
        json.dump([gather_lists(told[rank]) for told in ROUNDS], file)
    with open(f"{folder}/main{rank}.json", "w") as file:
        json.dump([[gather_to_main(told[rank]), told_by_main(told[rank])] for told in VALUES], file)
    groups.shutdown()


def test_all_ranks_get_the_lists_of_all(tmp_path):
    multiprocessing.start_processes(_rank, (str(tmp_path),), nprocs=RANKS, start_method="spawn")
    for rank in range(RANKS):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == [list(told) for told in ROUNDS]

    for rank in range(RANKS):
        for told, (gathered, of_main) in zip(
            VALUES, json.loads((tmp_path / f"main{rank}.json").read_text()), strict=True
        ):
            assert of_main == told[0]
            assert gathered == (list(told) if rank == 0 else None)


def test_alone_there_is_nobody_to_ask():
    assert gather_lists([1]) == [[1]] and gather_to_main(1) == [1] and told_by_main({"a": 1}) == {"a": 1}
