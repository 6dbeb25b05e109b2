"""Process groups: made once, by megatron-core, and read everywhere else from `ParallelState`."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from moss_train.parallel.config import LayoutConfig


@dataclass(frozen=True)
class ParallelState:
    """This process's place in the layout and the groups it belongs to."""

    rank: int
    world_size: int
    data_rank: int
    data_ranks: int
    device: torch.device
    tensor_group: dist.ProcessGroup
    data_group: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes reports."""
        return self.rank == 0


_state: ParallelState | None = None


def initialize(layout: LayoutConfig | None = None, seed: int = 0) -> ParallelState:
    """Start torch.distributed (from torchrun's environment, or alone) and build megatron-core's groups.

    Calling it again returns the state already built. `seed` seeds megatron's random-state tracker, which keeps
    dropout different across tensor-parallel ranks and equal across data-parallel replicas of one shard.
    """
    global _state
    if _state is not None:
        return _state
    layout = layout or LayoutConfig()
    use_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = layout.backend or ("nccl" if use_cuda else "gloo")
        timeout = timedelta(minutes=layout.timeout_minutes)
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    layout.validate(dist.get_world_size())
    parallel_state.initialize_model_parallel(layout.tp, layout.pp)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    _state = ParallelState(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_ranks=parallel_state.get_data_parallel_world_size(),
        device=device,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
    )
    return _state


def state() -> ParallelState:
    """The state built by `initialize`; RuntimeError when it was not called."""
    if _state is None:
        raise RuntimeError("moss_train.parallel.groups.initialize() has not been called in this process")
    return _state


def shutdown() -> None:
    """Leave every process group; `initialize` may be called again afterwards."""
    global _state
    if _state is None:
        return
    _state = None
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
