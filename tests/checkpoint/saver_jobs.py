"""Jobs of forked ranks: saves that go well, and saves in which something goes wrong on one of them."""

import errno
import os
import time
from pathlib import Path

import torch

from moss_train.checkpoint import files
from moss_train.checkpoint import saver as saver_module
from moss_train.checkpoint.saver import Saver
from moss_train.checkpoint.store import open_together
from moss_train.engines.pieces import Piece
from moss_train.errors import CheckpointError
from moss_train.parallel import groups
from moss_train.parallel.config import LayoutConfig


def pieces_of(rank: int, ranks: int, value: float) -> list[Piece]:
    """This rank's rows of one tensor, and a tensor of its own."""
    rows = torch.full((2, 3), value + rank)
    return [
        Piece("model/shared", (2 * ranks, 3), (2 * rank, 0), rows),
        Piece(f"random/{rank}/own", (4,), (0,), torch.full((4,), float(rank)), constant=True),
    ]


def save_twice(rank: int, ranks: int, folder: str) -> dict:
    """Two saves, the second begun while the first is still being written, and what is read back."""
    groups.initialize(LayoutConfig())
    saver = Saver(Path(folder))
    pieces = pieces_of(rank, ranks, 10.0)
    assert saver.begin(1, pieces, {"step": 1}, {"config": {"a": 1}}) is None and saver.busy
    pieces[0].tensor.fill_(-1.0)  # training goes on; the copy is what is saved
    first = saver.begin(2, pieces_of(rank, ranks, 20.0), {"step": 2}, {})
    waited = 0
    while (second := saver.settle()) is None:
        waited += 1
        time.sleep(0.01)
    assert first is not None and not saver.busy and saver.settle() is None and saver.finish() is None
    readers = [open_together(Path(folder) / f"step_0000000{step}") for step in (1, 2)]
    return {
        "steps": [first.step, second.step],
        "bytes": [first.bytes, second.bytes],
        "shared": [reader.read("model/shared", (0, 0), (2 * ranks, 3))[:, 0].tolist() for reader in readers],
        "own": readers[1].tensors(f"random/{rank}/")[f"random/{rank}/own"].tolist(),
        "states": [reader.state for reader in readers],
    }


def save_with_a_full_disk(rank: int, ranks: int, folder: str, broken: int, how: str) -> list[str]:
    """A good save, then one in which rank `broken` finds no room, met by `how` (settle or finish); then a good one."""
    groups.initialize(LayoutConfig())
    saver = Saver(Path(folder))
    saver.begin(1, pieces_of(rank, ranks, 10.0), {"step": 1}, {})
    saver.finish()
    original = saver_module.write_part

    def no_room(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "tensors")

    if rank == broken:
        saver_module.write_part = no_room
    try:
        saver.begin(2, pieces_of(rank, ranks, 20.0), {"step": 2}, {})
        told = "nothing"
        try:
            while how == "settle" and saver.settle() is None:
                time.sleep(0.01)
            saver.finish()
        except CheckpointError as error:
            told = str(error)
    finally:
        saver_module.write_part = original
    torch.distributed.barrier()
    left = sorted(path.name for path in Path(folder).iterdir())
    torch.distributed.barrier()
    saver.begin(3, pieces_of(rank, ranks, 30.0), {"step": 3}, {})
    saver.finish()
    return [told, *left]


def save_with_a_slow_process(rank: int, ranks: int, folder: str) -> list[str]:
    """What is there after a save in which every directory is slow to be synced by the last rank."""
    groups.initialize(LayoutConfig())
    original = files.sync_directory

    def slow(path: Path) -> None:
        time.sleep(0.5)
        original(path)

    if rank == ranks - 1:
        files.sync_directory = slow
    try:
        saver = Saver(Path(folder))
        saver.begin(1, pieces_of(rank, ranks, 10.0), {"step": 1}, {})
        saver.finish()
    finally:
        files.sync_directory = original
    return sorted(path.name for path in Path(folder).iterdir())


def save_where_nothing_can_be_made(rank: int, ranks: int, folder: str) -> str:
    """The message of a save whose directory is a file."""
    groups.initialize(LayoutConfig())
    try:
        Saver(Path(folder) / "taken").begin(1, pieces_of(rank, ranks, 1.0), {}, {})
    except CheckpointError as error:
        return str(error)
    return "nothing"


def save_without_a_tensor(rank: int, ranks: int, folder: str) -> str:
    """The message of a save in which a whole tensor was forgotten."""
    groups.initialize(LayoutConfig())
    saver = Saver(Path(folder))
    expected = {"model/shared": (2 * ranks, 3), "model/other": (1,)}
    try:
        saver.begin(1, pieces_of(rank, ranks, 1.0), {}, {}, expected)
        saver.finish()
    except CheckpointError as error:
        return str(error)
    return "nothing"


def save_with_a_gap(rank: int, ranks: int, folder: str) -> str:
    """The message of a save in which one rank's part was forgotten."""
    groups.initialize(LayoutConfig())
    saver = Saver(Path(folder))
    try:
        saver.begin(1, pieces_of(rank, ranks, 1.0)[rank:], {}, {})
        saver.finish()
    except CheckpointError as error:
        return str(error)
    return "nothing"
