"""Process groups: made once, by megatron-core, and read everywhere else from `ParallelState`."""

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from moss_train.errors import ConfigError
from moss_train.parallel.config import LayoutConfig
from moss_train.parallel.rendezvous import agent_store


@dataclass(frozen=True)
class ParallelState:
    """This process's place in the layout and the groups it belongs to.

    Of each kind there is this process's number (`…_rank`), how many there are (`…_ranks`) and the group of processes
    that differ in that number alone.
    """

    layout: LayoutConfig
    rank: int
    world_size: int
    device: torch.device
    data_rank: int  #: which part of the global batch
    data_ranks: int
    tensor_rank: int
    tensor_ranks: int
    pipeline_rank: int
    pipeline_ranks: int
    frame_rank: int  #: which part of the frames in the cross layers (`layout.cp`)
    frame_ranks: int
    share_rank: int | None  #: which share of a microbatch's frames it decodes and encodes; None: none
    share_ranks: int
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    frame_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    data_frame_group: dist.ProcessGroup  #: data × frame: all that hold the same parameters and reduce their gradients
    model_group: dist.ProcessGroup  #: tensor × pipeline: one copy of the parameters
    own_group: dist.ProcessGroup  #: this process alone

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes reports."""
        return self.rank == 0

    @property
    def first_stage(self) -> bool:
        """Holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def last_stage(self) -> bool:
        """Holds the head."""
        return self.pipeline_rank == self.layout.last_stage


_state: ParallelState | None = None
_releases: list[Callable[[], None]] = []


def initialize(layout: LayoutConfig | None = None, seed: int = 0) -> ParallelState:
    """Start torch.distributed (from torchrun's environment, or alone) and build megatron-core's groups.

    Calling it again returns the state already built. `seed` seeds megatron's random-state tracker, which keeps
    dropout different across tensor-parallel ranks and equal across data-parallel replicas of one shard.
    """
    global _state
    if _state is not None:
        return _state
    layout = layout or LayoutConfig()
    backend = layout.backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if backend == "nccl" and not (torch.cuda.is_available() and dist.is_nccl_available()):
        raise ConfigError("layout.backend=nccl: needs a GPU and a PyTorch built with CUDA; set gloo, or null")
    device = _own_device(backend)
    if layout.overlap_p2p and backend == "gloo":
        raise ConfigError(
            "layout.overlap_p2p=true: gloo overwrites what is still being sent, silently; set it to false"
        )
    if not dist.is_initialized():
        timeout = timedelta(minutes=layout.timeout_minutes)
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            place = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
            store = agent_store(timeout)
            # Without a store torch.distributed makes one from the environment.
            dist.init_process_group(backend, timeout=timeout, **({"store": store, **place} if store else {}))
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    layout.validate(dist.get_world_size())
    # Megatron's context-parallel groups have the members that ours need; its own context parallelism stays off.
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    _state = _read_state(layout, device)
    if backend == "nccl":
        _connect(_state)
    return _state


def _own_device(backend: str) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number, devices = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= devices and backend == "nccl":
        raise ConfigError(
            f"process {number} of this node has no GPU of its own, there are {devices}: start {devices} processes a "
            f"node (torchrun --nproc-per-node {devices})"
        )
    device = torch.device("cuda", number % devices)
    torch.cuda.set_device(device)
    return device


def _connect(state: ParallelState) -> None:
    """One small collective in every group. NCCL connects a group at its first operation, in which all members must then
    take part; a send between two stages would otherwise wait for the others."""
    groups = (state.tensor_group, state.pipeline_group, state.frame_group, state.data_group, state.model_group)
    for group in groups:
        dist.all_reduce(torch.zeros(1, device=state.device), group=group)


def _read_state(layout: LayoutConfig, device: torch.device) -> ParallelState:
    frame_rank = parallel_state.get_context_parallel_rank()
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
    if layout.sharding == "model_parallel":
        share_rank = (frame_rank * layout.pp + pipeline_rank) * layout.tp + tensor_rank
    else:
        share_rank = frame_rank * layout.tp + tensor_rank if pipeline_rank == 0 else None
    own_group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return ParallelState(
        layout=layout,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_ranks=parallel_state.get_data_parallel_world_size(),
        tensor_rank=tensor_rank,
        tensor_ranks=layout.tp,
        pipeline_rank=pipeline_rank,
        pipeline_ranks=layout.pp,
        frame_rank=frame_rank,
        frame_ranks=layout.cp,
        share_rank=share_rank,
        share_ranks=layout.share_ranks,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        frame_group=parallel_state.get_context_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        data_frame_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        model_group=parallel_state.get_model_parallel_group(),
        own_group=own_group,
    )


def state() -> ParallelState:
    """The state built by `initialize`; RuntimeError when it was not called."""
    if _state is None:
        raise RuntimeError("moss_train.parallel.groups.initialize() has not been called in this process")
    return _state


def rank_and_ranks() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) where no process group is."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def before_shutdown(release: Callable[[], None]) -> None:
    """Have `release` called once, before the groups go: by whoever hands them to a library that remembers them."""
    _releases.append(release)


def shutdown() -> None:
    """Leave every process group; `initialize` may be called again afterwards."""
    global _state
    if _state is None:
        return
    while _releases:
        _releases.pop()()
    _state = None
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    # Engines refer to their groups in cycles, and a gloo group's three threads live as long as it does.
    gc.collect()
