"""From visibility ranges to work lists: which tokens attend to which frames, without a mask.

Neighbouring tokens of a row that see the same frames form a *run*. Runs that see equally many frames are stacked
into one unmasked attention call, so the score matrix holds only what is visible. The same is done for
self-attention with the streams of packed rows. A plan is made once per batch on the CPU and shared by all layers.

Where all frames of the batch are held, they lie in a rectangle of rows, frame f of row r at r · F + f. With
frame-parallel attention each process plans over the frames it holds alone, in the order of the batch, without padding.

Shape suffixes: R rows, T tokens of a row, F frames of the longest row, G runs in a group, L tokens of the
longest run of the group, K frames each run of the group sees.
"""

from dataclasses import dataclass

import numpy as np
import torch

from moss_train.data.batch import Batch


@dataclass(frozen=True)
class Group:
    """Runs that are attended in one call. Padding queries repeat token 0; their results are never read."""

    queries_GL: torch.Tensor  #: int64, flat token index t * R + r
    keys_GK: torch.Tensor | None  #: int64, places of frames among those held; None for self-attention
    first_frame: int | None  #: where the frames lie when G == 1 and they are adjacent: no copy is needed


@dataclass(frozen=True)
class AttentionPlan:
    """Groups, and where each token finds its result among the concatenated results of the groups."""

    groups: tuple[Group, ...]
    result_of_token: torch.Tensor  #: int64 [T * R], index into the concatenated [sum of G*L] results
    #: results in all; the index `results` stands for "attends to nothing", whose result is exactly zero
    results: int


def _runs(changed_RT: np.ndarray, member_RT: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, first token and length of each maximal run of members in which nothing changed."""
    rows, tokens = member_RT.shape
    starts = member_RT & (changed_RT | ~np.pad(member_RT, ((0, 0), (1, 0)))[:, :tokens])
    ends = member_RT & np.pad(starts | ~member_RT, ((0, 0), (0, 1)), constant_values=True)[:, 1:]
    row, first = np.nonzero(starts)
    _, last = np.nonzero(ends)
    return row, first, last - first + 1


def _changes(*arrays_RT: np.ndarray) -> np.ndarray:
    changed = np.zeros(arrays_RT[0].shape, dtype=bool)
    changed[:, 0] = True
    for array in arrays_RT:
        changed[:, 1:] |= array[:, 1:] != array[:, :-1]
    return changed


def stack_runs(
    rows: int,
    tokens: int,
    row: np.ndarray,
    first: np.ndarray,
    length: np.ndarray,
    frames: list[np.ndarray] | None,
    device: torch.device,
) -> AttentionPlan:
    """Stack runs into groups of equal frame count and similar length (padding at most quadruples a run).

    Fewer, larger calls win over less padding: queries are few beside the keys they attend to.
    """
    seen = np.zeros(len(row), dtype=np.int64) if frames is None else np.array([len(f) for f in frames], dtype=np.int64)
    bucket = np.ceil(np.log2(np.maximum(length, 1)) / 2).astype(np.int64)
    order = np.lexsort((first, row, bucket, seen))
    result_of_token = np.full(tokens * rows, -1, dtype=np.int64)
    groups, results = [], 0
    boundaries = np.flatnonzero((np.diff(seen[order]) != 0) | (np.diff(bucket[order]) != 0)) + 1
    for members in np.split(order, boundaries) if len(order) else []:
        longest = int(length[members].max())
        offsets = np.arange(longest)
        valid = offsets[None] < length[members, None]
        queries = np.where(valid, (first[members, None] + offsets) * rows + row[members, None], 0)
        result_of_token[queries[valid]] = results + np.flatnonzero(valid)
        results += valid.size
        keys, first_frame = None, None
        if frames is not None:
            keys = np.stack([frames[m] for m in members])
            if len(members) == 1 and np.all(np.diff(keys[0]) == 1):
                first_frame = int(keys[0, 0])
            keys = torch.from_numpy(keys).to(device)
        groups.append(Group(torch.from_numpy(queries).to(device), keys, first_frame))
    result_of_token[result_of_token < 0] = results
    return AttentionPlan(tuple(groups), torch.from_numpy(result_of_token).to(device), results)


def plan_self_attention(batch: Batch, device: torch.device) -> AttentionPlan | None:
    """Causal attention inside each stream. None when every row is one stream from token 0 on: plain causal rows."""
    segments_RT = batch.segments_RT.cpu().numpy()
    if (segments_RT <= 0).all() and (segments_RT[:, :-1] >= segments_RT[:, 1:]).all():
        return None
    member = segments_RT >= 0
    row, first, length = _runs(_changes(segments_RT), member)
    return stack_runs(*segments_RT.shape, row, first, length, None, device)


def visible_ranges(batch: Batch, reference_compat: bool) -> tuple[np.ndarray, ...]:
    """`lo, hi, sink_lo, sink_hi` of each token, numpy [R, T]; empty ranges for padding.

    With `reference_compat`, a token that sees nothing sees every frame of its row in the attention branch, as in
    the reference, where the masked row is multiplied by zero (`model_facts.md` A.5).
    """
    lo, hi, sink_lo, sink_hi = (
        x.cpu().numpy().astype(np.int64)
        for x in (batch.visible_lo_RT, batch.visible_hi_RT, batch.sink_lo_RT, batch.sink_hi_RT)
    )
    member = batch.segments_RT.cpu().numpy() >= 0
    lo, hi = np.where(member, lo, 0), np.where(member, hi, 0)
    sink_lo, sink_hi = np.where(member, sink_lo, 0), np.where(member, sink_hi, 0)
    if reference_compat:
        blind = member & (hi <= lo) & (sink_hi <= sink_lo)
        lo = np.where(blind, 0, lo)
        hi = np.where(blind, batch.frame_counts_R.cpu().numpy()[:, None], hi)
    return lo, hi, sink_lo, sink_hi


def plan_cross_attention(
    batch: Batch, reference_compat: bool, device: torch.device, held: tuple[int, int] | None = None
) -> AttentionPlan:
    """Which frames each token attends to, among the flat frames [first, end) of `held`; None: all of the batch's."""
    lo, hi, sink_lo, sink_hi = visible_ranges(batch, reference_compat)
    sink_hi = np.minimum(sink_hi, lo)  # sinks inside the window are in the window already
    member = (hi > lo) | (sink_hi > sink_lo)
    row, first, length = _runs(_changes(lo, hi, sink_lo, sink_hi), member)
    place_RF = _frame_places(batch, held)
    kept, frames = [], []
    for run, (r, t) in enumerate(zip(row, first, strict=True)):
        window = np.arange(lo[r, t], hi[r, t])
        if sink_hi[r, t] > sink_lo[r, t]:
            window = np.concatenate([np.arange(sink_lo[r, t], sink_hi[r, t]), window])
        places = place_RF[r, window]
        places = places[places >= 0]
        if len(places):
            kept.append(run)
            frames.append(places)
    rows, tokens = lo.shape
    return stack_runs(rows, tokens, row[kept], first[kept], length[kept], frames, device)


def _frame_places(batch: Batch, held: tuple[int, int] | None) -> np.ndarray:
    """int64 [R, F]: where frame f of row r lies among those held; -1 where it is not."""
    rows, slots = batch.frame_positions_RF.shape
    if held is None:
        return np.arange(rows * slots).reshape(rows, slots)
    first, end = held
    places = np.full((rows, slots), -1, dtype=np.int64)
    row, slot = (x[first:end].cpu().numpy() for x in (batch.frame_rows_N, batch.frame_slots_N))
    places[row, slot] = np.arange(end - first)
    return places


def sees_frames(batch: Batch) -> torch.Tensor:
    """Bool [T, R, 1]: True where a token sees at least one frame."""
    sees = (batch.visible_hi_RT > batch.visible_lo_RT) | (batch.sink_hi_RT > batch.sink_lo_RT)
    return (sees & (batch.segments_RT >= 0)).T[..., None]


def dense_cross_mask(batch: Batch, reference_compat: bool, device: torch.device) -> torch.Tensor:
    """The visibility as a mask, bool [R, T, R · F], True = visible. For the dense backend, hence for tests."""
    lo, hi, sink_lo, sink_hi = (torch.from_numpy(x)[..., None] for x in visible_ranges(batch, reference_compat))
    rows, slots = batch.frame_positions_RF.shape
    slot, row = torch.arange(slots).repeat(rows), torch.arange(rows).repeat_interleave(slots)
    visible = ((slot >= lo) & (slot < hi)) | ((slot >= sink_lo) & (slot < sink_hi))
    return (visible & (row == torch.arange(rows)[:, None, None])).to(device)


def dense_self_mask(batch: Batch, device: torch.device) -> torch.Tensor:
    """Causal attention inside each stream's text window and sinks as a mask, bool [R, T, T], True = visible; padding
    sees itself."""
    segments = batch.segments_RT
    tokens = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    lo, sink_lo, sink_hi = (x[..., None] for x in (batch.text_lo_RT, batch.text_sink_lo_RT, batch.text_sink_hi_RT))
    key = torch.arange(tokens, device=segments.device)
    causal = key <= key[:, None]
    return (same & causal & ((key >= lo) | ((key >= sink_lo) & (key < sink_hi)))).to(device)
