"""Cross-attention whose frames lie on several processes: each attends over its own, the results are merged.

Every process holds all queries and the keys and values of its part of the frames. With s the scores of a token over the
frames of process c, o_c its softmax-weighted values there and l_c = logsumexp(s), the whole result is

    l = logsumexp_c(l_c),   o = Σ_c exp(l_c − l) · o_c                  (log-sum-exp merge; Milakov & Gimelshein 2018)

One all-gather of l_c and one all-reduce of o per layer; keys and values never travel. In the backward pass, with
p = exp(s − l) and Δ = Σ_d (dL/do · o) as in FlashAttention (Dao et al. 2022, algorithm 4), each process needs nothing
but its own scores, so one all-reduce of dL/do suffices.

Gradients follow one rule, on which the engine relies: every process of the group differentiates 1/size of the loss, and
what belongs to all of them is the *sum* of their gradients. A process's dL/dq is its frames' part; it is not summed
here, because everything upstream of the queries is linear in it and the parameters' gradients are summed at the end of
the step.

Scores exist for a block of keys at a time, in float32. Shape suffixes: as in `attention.py`, and X = T·R tokens, K keys
of a block, C key/value heads' query groups (A = B·C).
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from moss_train.model.visibility import AttentionPlan, Group

KEYS_A_BLOCK = 2048


def frames_of(group: Group, x_NPBD: torch.Tensor) -> torch.Tensor:
    """Keys or values of the frames that each run of a group sees, [G, K, P, B, D]."""
    if group.first_frame is not None:
        return x_NPBD.narrow(0, group.first_frame, group.keys_GK.shape[1])[None]
    return x_NPBD.index_select(0, group.keys_GK.flatten()).unflatten(0, group.keys_GK.shape)


def frame_parallel_attention(q_TRAD, k_NPBD, v_NPBD, plan: AttentionPlan, frame_group: dist.ProcessGroup):
    """Attention of each token over the frames that all processes of `frame_group` hold together, [T, R, AD].

    `plan` is over this process's frames. Zero where a token sees no frame anywhere.
    """
    mixed_XAD = _MergedAttention.apply(q_TRAD.flatten(0, 1), k_NPBD, v_NPBD, plan, frame_group)
    return mixed_XAD.view(*q_TRAD.shape[:2], -1)


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_XAD, k_NPBD, v_NPBD, plan, frame_group):
        partial_XAD, log_sum_XA = _attend_held(q_XAD, k_NPBD, v_NPBD, plan)
        parts = [torch.empty_like(log_sum_XA) for _ in range(frame_group.size())]
        dist.all_gather(parts, log_sum_XA, group=frame_group)
        whole_XA = torch.logsumexp(torch.stack(parts), dim=0)
        # A token that sees nothing anywhere has -inf on both sides, and weight zero.
        weight_XA = torch.exp(log_sum_XA - whole_XA.masked_fill(whole_XA.isinf(), 0.0))
        merged_XAD = partial_XAD * weight_XA[..., None]
        dist.all_reduce(merged_XAD, group=frame_group)
        ctx.save_for_backward(q_XAD, k_NPBD, v_NPBD, merged_XAD, whole_XA)
        ctx.plan, ctx.frame_group = plan, frame_group
        return merged_XAD.to(q_XAD.dtype)

    @staticmethod
    def backward(ctx, grad_XAD):
        q_XAD, k_NPBD, v_NPBD, merged_XAD, whole_XA = ctx.saved_tensors
        grad_XAD = grad_XAD.float().contiguous()
        dist.all_reduce(grad_XAD, group=ctx.frame_group)
        delta_XA = (grad_XAD * merged_XAD).sum(-1)
        grads = _backward_held(q_XAD, k_NPBD, v_NPBD, grad_XAD, delta_XA, whole_XA, ctx.plan)
        return *(grad.to(x.dtype) for grad, x in zip(grads, (q_XAD, k_NPBD, v_NPBD), strict=True)), None, None


def _attend_held(q_XAD, k_NPBD, v_NPBD, plan: AttentionPlan):
    """Attention over the held frames: float32 [X, A, D], and the log-sum-exp of the scores [X, A], -inf without any."""
    heads, tokens = k_NPBD.shape[2], q_XAD.shape[0]
    mixed_XAD = q_XAD.new_zeros(q_XAD.shape, dtype=torch.float32)
    log_sum_XA = q_XAD.new_full(q_XAD.shape[:2], float("-inf"), dtype=torch.float32)
    for group, tokens_of_run in _groups(plan, tokens):
        q_GBCLD = _grouped(q_XAD, group, heads)
        largest = q_GBCLD.new_full(q_GBCLD.shape[:-1], float("-inf"), dtype=torch.float32)
        total, mixed = torch.zeros_like(largest), torch.zeros_like(q_GBCLD, dtype=torch.float32)
        for keys, values, _ in _blocks(group, k_NPBD, v_NPBD):
            scores = _scores(q_GBCLD, keys)
            new_largest = torch.maximum(largest, scores.amax(-1))
            shrink = torch.exp(largest - new_largest)
            weights = torch.exp(scores - new_largest[..., None])
            total = total * shrink + weights.sum(-1)
            mixed = mixed * shrink[..., None] + weights @ values[:, :, None].float()
            largest = new_largest
        _put(mixed_XAD, mixed / total[..., None], group, tokens_of_run)
        _put(log_sum_XA[..., None], (largest + total.log())[..., None], group, tokens_of_run)
    return mixed_XAD, log_sum_XA


def _backward_held(q_XAD, k_NPBD, v_NPBD, grad_XAD, delta_XA, whole_XA, plan: AttentionPlan):
    """Gradients of queries (from the held frames alone), keys and values, float32."""
    heads, tokens = k_NPBD.shape[2], q_XAD.shape[0]
    grad_q, grad_k, grad_v = (
        torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q_XAD, k_NPBD, v_NPBD)
    )
    for group, tokens_of_run in _groups(plan, tokens):
        q_GBCLD = _grouped(q_XAD, group, heads)
        # Padding queries repeat token 0 and must not contribute.
        real = tokens_of_run.to(torch.float32)[:, None, None, :, None]
        out_grad = _grouped(grad_XAD, group, heads) * real
        delta = _grouped(delta_XA[..., None], group, heads) * real
        log_sum = _grouped(whole_XA[..., None], group, heads).masked_fill(real == 0, 0.0)
        query_grad = torch.zeros_like(q_GBCLD, dtype=torch.float32)
        scale = q_GBCLD.shape[-1] ** -0.5
        for keys, values, (first, end) in _blocks(group, k_NPBD, v_NPBD):
            weights = torch.exp(_scores(q_GBCLD, keys) - log_sum) * real
            weight_grad = out_grad @ values[:, :, None].float().transpose(-1, -2)
            score_grad = weights * (weight_grad - delta) * scale
            query_grad += score_grad @ keys[:, :, None].float()
            key_grad = (score_grad.transpose(-1, -2) @ q_GBCLD.float()).sum(2)
            value_grad = (weights.transpose(-1, -2) @ out_grad).sum(2)
            _add_frames(grad_k, key_grad, group, first, end)
            _add_frames(grad_v, value_grad, group, first, end)
        _put(grad_q, query_grad, group, tokens_of_run)
    return grad_q, grad_k, grad_v


def _groups(plan: AttentionPlan, tokens: int) -> Iterator[tuple[Group, torch.Tensor]]:
    """Each group with a mask bool [G, L] of the queries that are real."""
    place, start = plan.result_of_token, 0
    for group in plan.groups:
        count = group.queries_GL.numel()
        numbers = torch.arange(start, start + count, device=place.device).view_as(group.queries_GL)
        yield group, place[group.queries_GL] == numbers
        start += count


def _grouped(x_XAD: torch.Tensor, group: Group, heads: int) -> torch.Tensor:
    """Rows of a group's tokens with heads before tokens, [G, B, C, L, D]."""
    taken_GLAD = x_XAD.index_select(0, group.queries_GL.flatten()).unflatten(0, group.queries_GL.shape)
    return taken_GLAD.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)


def _put(target_XAD: torch.Tensor, x_GBCLD: torch.Tensor, group: Group, real_GL: torch.Tensor) -> None:
    """Write a group's results to its tokens; a token is in one group at most."""
    rows_GLAD = x_GBCLD.permute(0, 3, 1, 2, 4).flatten(2, 3)
    target_XAD[group.queries_GL[real_GL]] = rows_GLAD[real_GL]


def _blocks(group: Group, k_NPBD, v_NPBD):
    """Keys and values of a group, [G, B, K, D] each, some whole frames at a time, and which of its frames those are."""
    frames, frame_tokens = group.keys_GK.shape[1], k_NPBD.shape[1]
    step = max(1, KEYS_A_BLOCK // frame_tokens)
    for first in range(0, frames, step):
        end = min(first + step, frames)
        part = Group(
            group.queries_GL,
            group.keys_GK[:, first:end],
            None if group.first_frame is None else group.first_frame + first,
        )
        yield *(frames_of(part, x).flatten(1, 2).transpose(1, 2) for x in (k_NPBD, v_NPBD)), (first, end)


def _scores(q_GBCLD: torch.Tensor, keys_GBKD: torch.Tensor) -> torch.Tensor:
    # Rounded to 16 bits, large scores would lose what tells the frames apart.
    scores = q_GBCLD.float() @ keys_GBKD[:, :, None].float().transpose(-1, -2)
    return scores * q_GBCLD.shape[-1] ** -0.5


def _add_frames(target_NPBD: torch.Tensor, x_GBKD: torch.Tensor, group: Group, first: int, end: int) -> None:
    """Add gradients of a block's keys to the frames they came from."""
    frame_tokens = target_NPBD.shape[1]
    rows = x_GBKD.transpose(1, 2).unflatten(1, (end - first, frame_tokens)).flatten(0, 1)
    target_NPBD.index_add_(0, group.keys_GK[:, first:end].flatten(), rows)
