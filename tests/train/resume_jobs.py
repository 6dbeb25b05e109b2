"""Jobs of forked ranks that choose where a stage goes on."""

import os
from pathlib import Path

from moss_train.errors import CheckpointError
from moss_train.parallel import groups
from moss_train.train import handoff
from moss_train.train.resume import resume_points
from moss_train.train.weights import find_origin_together


def choose(rank: int, ranks: int, directory: str, resume: str) -> tuple[str, int] | str:
    """The checkpoint and its step, or the refusal."""
    groups.initialize()
    try:
        point = resume_points({"sft": Path(directory)}, resume)["sft"]
    except CheckpointError as error:
        return str(error)
    return str(point.checkpoint), point.step


def choose_where_one_sees_less(rank: int, ranks: int, directory: str, resume: str) -> tuple[str, int] | str:
    """As `choose`, but the second rank's file system shows nothing."""
    return choose(rank, ranks, directory if rank == 0 else f"{directory}/not-mounted", resume)


def find_where_one_sees_less(rank: int, ranks: int, directory: str, seen_by_others: str) -> str:
    """The weights found in a folder of which the second rank's file system shows another state; or the refusal."""
    groups.initialize()
    try:
        return str(find_origin_together(directory if rank == 0 else seen_by_others).path)
    except CheckpointError as error:
        return str(error)


def restarted_on_one_node(rank: int, ranks: int) -> bool:
    """What a process knows of a restart after which only the second rank's node counts one."""
    groups.initialize()
    if rank == 1:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    try:
        return handoff._restarted()
    finally:
        os.environ.pop("TORCHELASTIC_RESTART_COUNT", None)
