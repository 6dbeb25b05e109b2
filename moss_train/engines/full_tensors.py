"""Whole tensors under canonical names, from processes that each hold parts of some of them."""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist

from moss_train.errors import MossTrainError
from moss_train.parallel.groups import ParallelState
from moss_train.parallel.slices import joined

#: canonical name, the parameter it belongs to, and what gives this tensor-parallel rank's part of it (collective over
#: the processes that hold the same part)
Entry = tuple[str, torch.nn.Parameter, Callable[[], torch.Tensor]]


@torch.no_grad()
def stream_to_main(
    entries: Iterable[Entry], state: ParallelState, names: Iterable[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every entry of every process as a whole tensor on the main process, one after another; nothing elsewhere.
    Collective: every process must go through it to its end. No process holds more than one tensor of it at a time.

    The processes of one pipeline stage must give the same names in the same order. What several stages hold (an encoder
    that is copied to all) is taken from the first. On a single process tensors are not copied; else they are on the
    CPU. MossTrainError, at the end, unless they were those that `names` lists: what was lost on the way must not pass
    for given.
    """
    # Only the first of the processes that hold the same parameters need join them.
    joins = state.data_rank == 0 and state.frame_rank == 0
    given: set[str] = set()
    for name, parameter, part in entries:
        tensor = part()
        if not joins:
            continue
        whole = joined(parameter, tensor.detach(), state.tensor_group)
        if state.is_main:
            given.add(name)
            yield name, whole if state.world_size == 1 else whole.cpu()
        elif state.tensor_rank == 0:
            _send(name, whole, state)
    if state.is_main:
        for stage in range(1, state.pipeline_ranks):
            for name, whole in _received(stage, state):
                if name not in given:
                    given.add(name)
                    yield name, whole
        _require(given, set(names))
    elif joins and state.tensor_rank == 0:
        _send(None, None, state)


def _send(name: str | None, whole: torch.Tensor | None, state: ParallelState) -> None:
    """One tensor of this pipeline stage to the main process; None, None when there are no more."""
    header = None if whole is None else (name, whole.shape, whole.dtype)
    dist.send_object_list([header], group=state.pipeline_group, group_dst=0, device=state.device)
    if whole is not None:
        dist.send(whole.to(state.device).contiguous(), group=state.pipeline_group, group_dst=0)


def _received(stage: int, state: ParallelState) -> Iterator[tuple[str, torch.Tensor]]:
    """What a stage sends."""
    while True:
        header: list = [None]
        dist.recv_object_list(header, group=state.pipeline_group, group_src=stage, device=state.device)
        if header[0] is None:
            return
        name, shape, dtype = header[0]
        buffer = torch.empty(shape, dtype=dtype, device=state.device)
        dist.recv(buffer, group=state.pipeline_group, group_src=stage)
        yield name, buffer.cpu()


def _require(given: set[str], expected: set[str]) -> None:
    if given != expected:
        missing, extra = sorted(expected - given), sorted(given - expected)
        raise MossTrainError(f"collected tensors lack {missing[:5]} and have {extra[:5]} beyond what the model has")
