"""Whole tensors under canonical names, from processes that each hold parts of some of them."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

from moss_train.errors import MossTrainError
from moss_train.parallel.agreement import gather_lists
from moss_train.parallel.groups import ParallelState
from moss_train.parallel.slices import joined

#: canonical name, the parameter it belongs to, and what gives this tensor-parallel rank's part of it (collective over
#: the processes that hold the same part)
Entry = tuple[str, torch.nn.Parameter, Callable[[], torch.Tensor]]


@torch.no_grad()
def collect_on_main(entries: Iterable[Entry], state: ParallelState) -> dict[str, torch.Tensor]:
    """Every entry of every process as a whole tensor on the main process; {} elsewhere. Collective.

    The processes of one pipeline stage must give the same names in the same order. What several stages hold (an encoder
    that is copied to all) is taken from the first. On a single process tensors are not copied; else they are on the
    CPU.
    """
    # Only the first of the processes that hold the same parameters need join them.
    joins = state.data_rank == 0 and state.frame_rank == 0
    own: dict[str, torch.Tensor] = {}
    for name, parameter, part in entries:
        tensor = part()
        if joins:
            whole = joined(parameter, tensor.detach(), state.tensor_group)
            if state.tensor_rank == 0:
                own[name] = whole if state.world_size == 1 else whole.cpu()
    sends = joins and state.tensor_rank == 0
    headers = [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in own.items()] if sends else []
    told = gather_lists([[state.pipeline_rank, headers]] if sends else [])
    by_stage = {stage: found for entries_of_rank in told for stage, found in entries_of_rank}
    if not sends:
        return {}
    held: set[str] = {name for name, _, _ in by_stage[0]}
    for stage in range(1, state.pipeline_ranks):
        for name, shape, dtype in by_stage[stage]:
            if name in held:
                continue
            held.add(name)
            if state.is_main:
                buffer = torch.empty(shape, dtype=getattr(torch, dtype), device=state.device)
                dist.recv(buffer, group=state.pipeline_group, group_src=stage)
                own[name] = buffer.cpu()
            elif stage == state.pipeline_rank:
                dist.send(own[name].to(state.device), group=state.pipeline_group, group_dst=0)
    return own if state.is_main else {}


def require_names(tensors: dict[str, torch.Tensor], names: Iterable[str]) -> None:
    """Raise unless what was collected has exactly these names: a tensor lost on the way must not pass for saved."""
    expected = set(names)
    if set(tensors) != expected:
        missing, extra = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        raise MossTrainError(f"collected tensors lack {missing[:5]} and have {extra[:5]} beyond what the model has")
