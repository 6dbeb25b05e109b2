"""What one rank has met and all must know: small JSON values, gathered without pickle."""

import json
from typing import Any

import torch
import torch.distributed as dist

from moss_train.parallel import groups


def gather_lists(own: list[Any]) -> list[list[Any]]:
    """Every rank's list, by rank. JSON values only; every rank must call it at the same point.

    While all lists are empty, which is the rule, the cost is one integer a rank.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks == 1:
        return [own]
    device = groups.state().device
    text = json.dumps(own).encode() if own else b""
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    dist.all_gather(lengths, torch.tensor([len(text)], device=device))
    counts = [int(length) for length in lengths]
    if not any(counts):
        return [[] for _ in range(ranks)]
    padded = torch.frombuffer(bytearray(text.ljust(max(counts), b" ")), dtype=torch.uint8).to(device)
    texts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(texts, padded)
    return [json.loads(bytes(t[:n].tolist())) if n else [] for t, n in zip(texts, counts, strict=True)]


def any_rank(flag: bool) -> bool:
    """Whether it is set on any rank; every rank must call it at the same point.

    Sums of the same numbers may differ in the last bit between groups of ranks, where that decides.
    """
    told = torch.tensor(int(flag), device=groups.state().device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told)
