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
    return [json.loads(_text(t[:n])) if n else [] for t, n in zip(texts, counts, strict=True)]


def gather_to_main(own: Any) -> list[Any] | None:
    """Every rank's JSON value, by rank, on the main process; None on the others. For what is too much for all; every
    rank must call it at the same point."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks == 1:
        return [own]
    device, is_main = groups.state().device, dist.get_rank() == 0
    text = json.dumps(own).encode()
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    dist.all_gather(lengths, torch.tensor([len(text)], device=device))
    longest = max(map(int, lengths))
    padded = torch.frombuffer(bytearray(text.ljust(longest, b" ")), dtype=torch.uint8).to(device)
    texts = [torch.empty_like(padded) for _ in range(ranks)] if is_main else None
    dist.gather(padded, texts, dst=0)
    return [json.loads(_text(t)) for t in texts] if texts is not None else None


def told_by_main(value: Any) -> Any:
    """The main process's JSON value, on every rank; what the others give is not looked at. Every rank must call it at
    the same point."""
    return told_by_first(value, dist.group.WORLD) if dist.is_initialized() else value


def told_by_first(value: Any, group: dist.ProcessGroup) -> Any:
    """As `told_by_main`, among the processes of `group`: the value of the first of them."""
    if group.size() == 1:
        return value
    device, is_first = groups.state().device, group.rank() == 0
    text = json.dumps(value).encode() if is_first else b""
    length = torch.tensor([len(text)], device=device)
    dist.broadcast(length, group=group, group_src=0)
    told = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device) if is_first else None
    told = torch.empty(int(length), dtype=torch.uint8, device=device) if told is None else told
    dist.broadcast(told, group=group, group_src=0)
    return json.loads(_text(told))


def _text(letters: torch.Tensor) -> bytes:
    return letters.cpu().numpy().tobytes()


def any_rank(flag: bool) -> bool:
    """Whether it is set on any rank; every rank must call it at the same point.

    Sums of the same numbers may differ in the last bit between groups of ranks, where that decides.
    """
    told = torch.tensor(int(flag), device=groups.state().device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told)
