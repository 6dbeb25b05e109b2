"""Projected frames from the processes that encoded them to those that attend to them, and their gradients back.

Sent per microbatch, with n the frames of one frame-parallel process's part, m the most frames that one tensor-parallel
process brings, t tensor-parallel processes, and [P, H] one frame's features:

* `to_first_stage`: each later stage's process sends its frames to the first stage's (one send, exact size);
* `gather_over_tensor`: all-gather of t × m frames, and in the backward pass a reduce-scatter of t × m frames, which
  also sums what the tensor-parallel processes' heads contributed (`model.modules.unsummed_linear` does not);
* `from_first_stage`: the gradients of `to_first_stage`, sent back.

Pixels are never sent. Shape suffixes: N frames, P vision tokens of a frame, H decoder width.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from moss_train.parallel.groups import ParallelState


@dataclass(frozen=True)
class SharePlan:
    """Which frames of one microbatch lie where, for one frame-parallel process's part of them."""

    counts: tuple[tuple[int, ...], ...]  #: frames by stage that encodes, then by tensor-parallel process
    first: int  #: of the part, in the batch's flat order
    end: int

    @property
    def frames(self) -> int:
        """Frames of the part."""
        return self.end - self.first

    def by_tensor_rank(self) -> list[int]:
        """Frames that each tensor-parallel process of the first stage holds after `to_first_stage`."""
        return [sum(stage[rank] for stage in self.counts) for rank in range(len(self.counts[0]))]

    def flat_order(self) -> list[int]:
        """Where each frame of the part, in flat order, lies after `gather_over_tensor`'s concatenation."""
        start_of_rank = [0]
        for count in self.by_tensor_rank():
            start_of_rank.append(start_of_rank[-1] + count)
        next_of_rank, order = start_of_rank[:-1], []
        for stage in self.counts:
            for rank, count in enumerate(stage):
                order += range(next_of_rank[rank], next_of_rank[rank] + count)
                next_of_rank[rank] += count
        return order


def plan_shares(bounds: tuple[int, ...], state: ParallelState) -> SharePlan:
    """The plan of this process's part. `bounds` as in `data.batch.Batch.frame_bounds`: shares by frame rank, then by
    encoding stage, then by tensor rank."""
    sizes = [end - first for first, end in zip(bounds, bounds[1:], strict=False)]
    per_part = len(sizes) // state.frame_ranks
    begin = state.frame_rank * per_part
    part, ranks = sizes[begin : begin + per_part], state.tensor_ranks
    counts = tuple(tuple(part[start : start + ranks]) for start in range(0, per_part, ranks))
    return SharePlan(counts, bounds[begin], bounds[begin + per_part])


def gather_over_tensor(own_NPH: torch.Tensor, plan: SharePlan, group: dist.ProcessGroup) -> torch.Tensor:
    """All frames of the part in flat order, on every process of `group`, from each one's own.

    Its backward pass sums the processes' gradients of a frame and gives them to the process that brought it.
    """
    if group.size() == 1 or not plan.frames:
        return own_NPH
    gathered = _Gather.apply(own_NPH, tuple(plan.by_tensor_rank()), group)
    order = plan.flat_order()
    if order == list(range(len(order))):
        return gathered
    return gathered.index_select(0, torch.tensor(order, device=gathered.device))


def to_first_stage(own_NPH: torch.Tensor, plan: SharePlan, state: ParallelState) -> torch.Tensor | None:
    """On the first stage: its own frames and those of the later stages' same tensor rank, by stage. None elsewhere."""
    counts = [stage[state.tensor_rank] for stage in plan.counts]
    if not state.first_stage:
        if counts[state.pipeline_rank]:
            _run([dist.P2POp(dist.isend, own_NPH.contiguous(), _peer(0, state), state.pipeline_group)])
        return None
    received = [own_NPH.new_empty(count, *own_NPH.shape[1:]) for count in counts[1:]]
    _run(
        [
            dist.P2POp(dist.irecv, buffer, _peer(stage, state), state.pipeline_group)
            for stage, buffer in enumerate(received, start=1)
            if len(buffer)
        ]
    )
    return torch.cat([own_NPH, *received])


def from_first_stage(
    grad_NPH: torch.Tensor | None, plan: SharePlan, state: ParallelState, like: torch.Tensor
) -> torch.Tensor:
    """The gradient [N, P, H] of this process's own frames; `grad_NPH` is that of `to_first_stage`'s result on the first
    stage, None elsewhere. `like` has the result's shape and dtype."""
    counts = [stage[state.tensor_rank] for stage in plan.counts]
    if not state.first_stage:
        own = torch.empty_like(like)
        if counts[state.pipeline_rank]:
            _run([dist.P2POp(dist.irecv, own, _peer(0, state), state.pipeline_group)])
        return own
    assert grad_NPH is not None
    parts = grad_NPH.split(counts)
    _run(
        [
            dist.P2POp(dist.isend, part.contiguous(), _peer(stage, state), state.pipeline_group)
            for stage, part in enumerate(parts)
            if stage and len(part)
        ]
    )
    return parts[0]


def _peer(stage: int, state: ParallelState) -> int:
    return dist.get_global_rank(state.pipeline_group, stage)


def _run(operations: list[dist.P2POp]) -> None:
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


class _Gather(torch.autograd.Function):
    """All-gather of unequal counts along the first dimension; backward: reduce-scatter."""

    @staticmethod
    def forward(ctx, own, counts, group):
        ctx.counts, ctx.group = counts, group
        most = max(counts)
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own
        gathered = own.new_empty(len(counts) * most, *own.shape[1:])
        dist.all_gather_into_tensor(gathered, padded, group=group)
        return torch.cat([gathered[rank * most : rank * most + count] for rank, count in enumerate(counts)])

    @staticmethod
    def backward(ctx, grad):
        most = max(ctx.counts)
        padded = grad.new_zeros(len(ctx.counts) * most, *grad.shape[1:])
        for rank, part in enumerate(grad.split(list(ctx.counts))):
            padded[rank * most : rank * most + len(part)] = part
        own = grad.new_empty(most, *grad.shape[1:])
        dist.reduce_scatter_tensor(own, padded, group=ctx.group)
        return own[: ctx.counts[ctx.group.rank()]], None, None
