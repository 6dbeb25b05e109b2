"""Meeting under torchrun, also after it has started the processes again.

torchrun's agent keeps one store over its restarts, and torch.distributed uses it for every start alike: processes of
the second start read where those of the first one listened, and fail to connect (pytorch issue 135712). The restart
count in the environment does not help, since it differs between nodes. So the processes first agree on a name for this
start, below which everything else is kept.
"""

import json
import os
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

_POLL_S = 0.05
_PREFIX = "moss_train/starts"


def agent_store(timeout: timedelta) -> dist.Store | None:
    """A fresh store below torchrun's, for this start; None where no agent keeps one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
    name = agree_on_start(store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout)
    return dist.PrefixStore(f"{_PREFIX}/{name}", store)


def agree_on_start(store: dist.Store, rank: int, ranks: int, timeout: timedelta) -> str:
    """The name of a start that all `ranks` processes take part in, whatever earlier ones have left in the store.

    Each process leaves a number of its own. The first one lists the numbers it finds and gives the list a name; it does
    so again when a number changes, because what it has found may be an earlier process's. A process answers to the list
    that has its number, and the list that all have answered to is taken.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    own, answered, name, listed = uuid.uuid4().hex, "", "", None
    store.set(f"{_PREFIX}/number/{rank}", own)
    while time.monotonic() < deadline:
        if rank == 0:
            found = _numbers(store, ranks)
            if found is not None and found != listed:
                name, listed = uuid.uuid4().hex, found
                store.set(f"{_PREFIX}/list", json.dumps([name, *found]))
        if store.check([f"{_PREFIX}/list"]):
            newest, *numbers = json.loads(store.get(f"{_PREFIX}/list"))
            if len(numbers) == ranks and numbers[rank] == own:
                if answered != newest:
                    store.add(f"{_PREFIX}/{newest}/answers", 1)
                    answered = newest
                if rank == 0 and store.add(f"{_PREFIX}/{newest}/answers", 0) == ranks:
                    store.set(f"{_PREFIX}/{newest}/taken", "yes")
                if store.check([f"{_PREFIX}/{newest}/taken"]):
                    return newest
        time.sleep(_POLL_S)
    raise dist.DistStoreError(f"rank {rank}: not all {ranks} processes came within {timeout.total_seconds():.0f} s")


def _numbers(store: dist.Store, ranks: int) -> Sequence[str] | None:
    """Every process's number; None while one has left none."""
    keys = [f"{_PREFIX}/number/{rank}" for rank in range(ranks)]
    return [text.decode() for text in store.multi_get(keys)] if store.check(keys) else None
