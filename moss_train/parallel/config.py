"""The layout: over how many processes each part of the work is split."""

import math
from dataclasses import dataclass

from moss_train.errors import ConfigError

FRAME_SHARDING = ("auto", "tp", "model_parallel")
SCHEDULES = ("auto", "dualpipev")


@dataclass
class LayoutConfig:
    """Parallel degrees. Ranks are numbered as in megatron-core: tp fastest, then cp, then dp, then pp."""

    tp: int = 1
    """Tensor-parallel degree: over how many processes each weight matrix of the decoder is split."""
    pp: int = 1
    """Pipeline-parallel degree: over how many processes the layers are split."""
    vpp: int = 1
    """Chunks of layers a pipeline process holds; above 1 the schedule is interleaved, which shortens its bubble."""
    cp: int = 1
    """Over how many processes the frames of a row are shared in the cross layers. Text is the same on all of them."""
    dp: int | None = None
    """Data-parallel degree; null is what the other degrees leave of the processes."""
    sp: bool = False
    """Sequence parallel: between the matrices, tokens are split over the tensor-parallel processes."""
    zero: int = 0
    """What is shared out over the processes that hold the same parameters: 0 nothing, 1 optimizer state and float32
    weights, 2 gradients too, 3 the weights too (2 and 3: engine.name=deepspeed)."""
    frame_shard: str = "auto"
    """Who encodes frames: `tp` (the tensor-parallel processes of the first stage), `model_parallel` (the processes of
    every stage, before the schedule), or `auto`: model_parallel when pp > 1, else tp."""
    pipeline_schedule: str = "auto"
    """How microbatches take turns on the stages: `auto` is 1F1B, interleaved with vpp above 1; `dualpipev`
    (engine.name=deepspeed) has each process hold two chunks, so that microbatches go out and come back, and the first
    process holds the embedding and the head."""
    pipeline_split: list[int] | None = None
    """Layers of each of the pp × vpp chunks (pp × 2 with dualpipev), in the order they run; 0 is legal. null balances
    their cost."""
    overlap_p2p: bool = False
    """Overlap the sends between stages with computation; interleaved schedule and nccl only."""
    batch_p2p: bool | None = None
    """Send to and receive from both neighbours in one batch; null: unless the layout forbids it."""
    backend: str | None = None
    """torch.distributed backend; null chooses nccl with CUDA and gloo without."""
    timeout_minutes: int = 30
    """How long a collective may wait before the job is given up, in minutes."""

    @property
    def sharding(self) -> str:
        """`frame_shard` with `auto` resolved: tp or model_parallel."""
        if self.frame_shard != "auto":
            return self.frame_shard
        return "model_parallel" if self.pp > 1 else "tp"

    @property
    def chunks(self) -> int:
        """Chunks of layers over all stages."""
        return self.pp * self.stage_chunks

    @property
    def stage_chunks(self) -> int:
        """Chunks of layers that a pipeline process holds."""
        return 2 if self.dualpipev else self.vpp

    @property
    def dualpipev(self) -> bool:
        """Whether microbatches pass each process twice, on the way out and on the way back."""
        return self.pipeline_schedule == "dualpipev"

    @property
    def last_stage(self) -> int:
        """The stage that holds the head."""
        return 0 if self.dualpipev else self.pp - 1

    @property
    def share_ranks(self) -> int:
        """In how many shares the frames of a microbatch are encoded."""
        return self.cp * self.tp * (self.pp if self.sharding == "model_parallel" else 1)

    @property
    def batches_p2p(self) -> bool:
        """`batch_p2p` with null resolved."""
        if self.batch_p2p is not None:
            return self.batch_p2p
        return not (self.overlap_p2p or (self.vpp > 1 and self.pp == 2))

    def validate(self, world_size: int) -> None:
        """Raise ConfigError unless the degrees are legal on `world_size` processes. What depends on the model's
        sizes is checked by `model.layout_rules`."""
        for name in ("tp", "pp", "vpp", "cp", "timeout_minutes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"layout.{name}={getattr(self, name)}: must be at least 1")
        self._validate_values()
        self._validate_pipeline()
        split = self.tp * self.pp * self.cp
        if world_size % split:
            raise ConfigError(
                f"layout.tp={self.tp} × layout.cp={self.cp} × layout.pp={self.pp} = {split} does not divide the "
                f"{world_size} process{'es' if world_size > 1 else ''} started: start a multiple of {split} "
                f"(torchrun --nproc-per-node {split * math.ceil(world_size / split)}), or lower a degree"
            )
        if self.dp is not None and self.dp != world_size // split:
            raise ConfigError(
                f"layout.dp={self.dp}: {world_size} processes and tp × cp × pp = {split} leave {world_size // split}; "
                "set that, or null"
            )

    def _validate_values(self) -> None:
        if self.dp is not None and self.dp < 1:
            raise ConfigError(f"layout.dp={self.dp}: must be at least 1, or null for what the other degrees leave")
        if self.zero not in range(4):
            raise ConfigError(
                f"layout.zero={self.zero}: legal values are 0 and 1, and with engine.name=deepspeed 2 and 3"
            )
        if self.frame_shard not in FRAME_SHARDING:
            raise ConfigError(f"layout.frame_shard={self.frame_shard!r}: legal values are {', '.join(FRAME_SHARDING)}")
        if self.sp and self.tp == 1:
            raise ConfigError("layout.sp=true: splits tokens over tensor-parallel processes; set layout.tp above 1")
        if self.pipeline_schedule not in SCHEDULES:
            raise ConfigError(
                f"layout.pipeline_schedule={self.pipeline_schedule!r}: legal values are {', '.join(SCHEDULES)}"
            )
        if self.backend not in (None, "gloo", "nccl"):
            raise ConfigError(f"layout.backend={self.backend!r}: legal values are null, gloo, nccl")

    def _validate_pipeline(self) -> None:
        if self.vpp > 1 and self.pp == 1:
            raise ConfigError(f"layout.vpp={self.vpp}: interleaves pipeline stages; set layout.pp above 1, or vpp=1")
        if self.dualpipev and (self.pp == 1 or self.vpp > 1):
            raise ConfigError(
                f"layout.pipeline_schedule=dualpipev: with layout.pp={self.pp} and layout.vpp={self.vpp} there is no "
                "such schedule; set layout.pp above 1 and layout.vpp=1, or layout.pipeline_schedule=auto"
            )
        if self.pipeline_split is not None:
            if len(self.pipeline_split) != self.chunks:
                raise ConfigError(
                    f"layout.pipeline_split={list(self.pipeline_split)}: names {len(self.pipeline_split)} chunks, but "
                    f"layout.pp={self.pp} × {self.stage_chunks} a process makes {self.chunks}"
                )
            if min(self.pipeline_split) < 0:
                raise ConfigError(f"layout.pipeline_split={list(self.pipeline_split)}: must be numbers of at least 0")
        if self.overlap_p2p:
            if self.vpp == 1:
                raise ConfigError("layout.overlap_p2p=true: megatron overlaps only with vpp above 1; set it to false")
            if self.batch_p2p:
                raise ConfigError("layout.overlap_p2p=true: excludes layout.batch_p2p=true; set one of them to false")
            if self.backend == "gloo":
                raise ConfigError(
                    "layout.overlap_p2p=true: gloo overwrites what is still being sent, silently; set it to false"
                )
        if self.batch_p2p and self.vpp > 1 and self.pp == 2:
            raise ConfigError(
                "layout.batch_p2p=true: with layout.vpp above 1 and layout.pp=2 both neighbours are one process and "
                "megatron mixes up their gradients, silently; set it to false, or null"
            )
