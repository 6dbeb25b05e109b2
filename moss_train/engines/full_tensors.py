"""Whole tensors under canonical names, from processes that each hold parts of some of them."""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist

from moss_train.errors import MossTrainError
from moss_train.parallel.agreement import gather_lists
from moss_train.parallel.groups import ParallelState
from moss_train.parallel.slices import joined

#: canonical name, the parameter it belongs to, and what gives this tensor-parallel rank's part of it (collective over
#: the processes that hold the same part)
Entry = tuple[str, torch.nn.Parameter, Callable[[], torch.Tensor]]


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HEADER = 8  #: numbers before a tensor: its data type, how many dimensions it has, these


@torch.no_grad()
def stream_to_main(
    entries: Iterable[Entry], state: ParallelState, names: Iterable[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every entry of every process as a whole tensor on the main process, one after another; nothing elsewhere.
    Collective: every process must go through it to its end. No process holds more than one tensor of it at a time.

    The processes of one pipeline stage must give the same names in the same order. What several stages hold (an encoder
    that is copied to all) is taken from the first. On a single process tensors are not copied; else they are on the
    CPU. MossTrainError unless they are those that `names` lists: what was lost on the way must not pass for given.
    """
    entries = list(entries)
    # Only the first of the processes that hold the same parameters need join them.
    joins = state.data_rank == 0 and state.frame_rank == 0
    sends = joins and state.tensor_rank == 0
    told = gather_lists([[state.pipeline_rank, [name for name, _, _ in entries]]] if sends else [])
    held = {stage: found for names_of_rank in told for stage, found in names_of_rank}
    _require({name for found in held.values() for name in found}, set(names))
    earlier = {name for stage in range(state.pipeline_rank) for name in held[stage]}
    for name, parameter, part in entries:
        if name in earlier:
            continue
        tensor = part()
        if not joins:
            continue
        whole = joined(parameter, tensor.detach(), state.tensor_group)
        if state.is_main:
            yield name, whole if state.world_size == 1 else whole.cpu()
        elif sends:
            _send(whole, state)
    if state.is_main:
        given = set(held[0])
        for stage in range(1, state.pipeline_ranks):
            for name in held[stage]:
                if name not in given:
                    given.add(name)
                    yield name, _received(stage, state)


def _send(whole: torch.Tensor, state: ParallelState) -> None:
    """One tensor of this pipeline stage to the main process, after its data type and its shape."""
    header = torch.zeros(_HEADER, dtype=torch.int64)
    header[: 2 + whole.dim()] = torch.tensor([_DTYPES.index(whole.dtype), whole.dim(), *whole.shape])
    dist.send(header.to(state.device), group=state.pipeline_group, group_dst=0)
    dist.send(whole.to(state.device).contiguous(), group=state.pipeline_group, group_dst=0)


def _received(stage: int, state: ParallelState) -> torch.Tensor:
    """The next tensor that a stage sends."""
    header = torch.empty(_HEADER, dtype=torch.int64, device=state.device)
    dist.recv(header, group=state.pipeline_group, group_src=stage)
    dtype, dimensions, *shape = header.tolist()
    buffer = torch.empty(shape[:dimensions], dtype=_DTYPES[dtype], device=state.device)
    dist.recv(buffer, group=state.pipeline_group, group_src=stage)
    return buffer.cpu()


def _require(given: set[str], expected: set[str]) -> None:
    if given != expected:
        missing, extra = sorted(expected - given), sorted(given - expected)
        raise MossTrainError(f"collected tensors lack {missing[:5]} and have {extra[:5]} beyond what the model has")
