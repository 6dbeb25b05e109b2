"""Self-attention in which a token sees the latest tokens of its stream, and its first ones, alone.

Streams are cut into chunks of queries; a chunk's keys are the tokens that any of its queries may see, so the work grows
with the window and not with the stream. The mask inside a chunk is exact for any ranges. A stream whose tokens all see
all earlier ones, packed beside others that do not, is attended whole, without a mask and without copies of its keys:
its chunks would take memory by the square of its length. Plans are made once per batch on the CPU and shared by all
layers.

Shape suffixes: R rows, T tokens of a row, G chunks in a group, L queries of a chunk, K keys of the group's chunk with
most keys.
"""

from dataclasses import dataclass

import numpy as np
import torch

from moss_train.data.batch import Batch
from moss_train.model.visibility import Group, stack_runs

#: queries of one chunk; keys beyond the window that a chunk attends to in vain are at most as many
CHUNK = 128


@dataclass(frozen=True)
class WindowGroup:
    """Chunks that are attended in one call. Padding queries see token 0 alone; their results are never read."""

    queries_GL: torch.Tensor  #: int64, flat token index t * R + r
    keys_GK: torch.Tensor  #: int64, flat token index
    mask_GLK: torch.Tensor  #: bool, True = seen


@dataclass(frozen=True)
class WindowPlan:
    """Groups, and where each token finds its result among the concatenated results, those of whole streams before those
    of chunks; `results` stands for padding."""

    whole: tuple[Group, ...]  #: streams without a window, causal
    groups: tuple[WindowGroup, ...]
    result_of_token: torch.Tensor  #: int64 [T * R]
    results: int


def has_text_windows(batch: Batch) -> bool:
    """Whether any token sees less than all earlier tokens of its stream."""
    return bool(_narrow(batch).any())


def _narrow(batch: Batch) -> np.ndarray:
    """bool [R, T]: tokens that see less than all earlier ones of their stream."""
    segments_RT = batch.segments_RT.cpu().numpy()
    starts_RT = _stream_starts(segments_RT)
    lo_RT, sink_lo_RT, sink_hi_RT = _text_ranges(batch)
    return (segments_RT >= 0) & (lo_RT > starts_RT) & ((sink_lo_RT > starts_RT) | (sink_hi_RT < lo_RT))


def _stream_starts(segments_RT: np.ndarray) -> np.ndarray:
    """The first token of the stream of each token."""
    begins_RT = np.ones(segments_RT.shape, dtype=bool)
    begins_RT[:, 1:] = segments_RT[:, 1:] != segments_RT[:, :-1]
    return np.maximum.accumulate(np.where(begins_RT, np.arange(segments_RT.shape[1]), 0), axis=1)


def _text_ranges(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ranges = (batch.text_lo_RT, batch.text_sink_lo_RT, batch.text_sink_hi_RT)
    lo_RT, sink_lo_RT, sink_hi_RT = (x.cpu().numpy().astype(np.int64) for x in ranges)
    starts_RT = _stream_starts(batch.segments_RT.cpu().numpy())
    return np.maximum(lo_RT, starts_RT), np.maximum(sink_lo_RT, starts_RT), sink_hi_RT


def plan_windows(batch: Batch, device: torch.device) -> WindowPlan:
    """The chunks of all streams under a window, stacked by how many keys they have (padding at most doubles them), and
    the streams without one, stacked by their length."""
    segments_RT = batch.segments_RT.cpu().numpy()
    rows, tokens = segments_RT.shape
    lo_RT, sink_lo_RT, sink_hi_RT = _text_ranges(batch)
    starts_RT = _stream_starts(segments_RT)
    narrow_RT = _narrow(batch)
    chunks = []  # (row, queries, keys)
    whole = []  # (row, first token, length)
    for row in range(rows):
        firsts = np.flatnonzero((starts_RT[row] == np.arange(tokens)) & (segments_RT[row] >= 0))
        for first in firsts:
            end = first + int((segments_RT[row, first:] == segments_RT[row, first]).argmin() or tokens - first)
            if not narrow_RT[row, first:end].any():
                whole.append((row, first, end - first))
                continue
            for begin in range(first, end, CHUNK):
                queries = np.arange(begin, min(begin + CHUNK, end))
                lo = int(lo_RT[row, queries].min())
                sinks = np.arange(int(sink_lo_RT[row, queries].min()), min(int(sink_hi_RT[row, queries].max()), lo))
                chunks.append((row, queries, np.concatenate([sinks, np.arange(lo, queries[-1] + 1)])))
    by_size: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    for chunk in chunks:
        by_size.setdefault(int(len(chunk[2]) - 1).bit_length(), []).append(chunk)
    whole_plan = stack_runs(rows, tokens, *np.array(whole, dtype=np.int64).reshape(-1, 3).T, None, device)
    result_of_token, results = whole_plan.result_of_token.cpu().numpy().copy(), whole_plan.results
    result_of_token[result_of_token == results] = -1
    groups = []
    for members in by_size.values():
        longest = max(len(queries) for _, queries, _ in members)
        width = max(len(keys) for _, _, keys in members)
        queries_GL = np.zeros((len(members), longest), dtype=np.int64)
        keys_GK = np.zeros((len(members), width), dtype=np.int64)
        mask_GLK = np.zeros((len(members), longest, width), dtype=bool)
        for place, (row, queries, keys) in enumerate(members):
            queries_GL[place, : len(queries)] = queries * rows + row
            keys_GK[place, : len(keys)] = keys * rows + row
            lo, sink_lo, sink_hi = (x[row, queries][:, None] for x in (lo_RT, sink_lo_RT, sink_hi_RT))
            seen = (keys >= lo) & (keys <= queries[:, None]) | (keys >= sink_lo) & (keys < sink_hi)
            mask_GLK[place, : len(queries), : len(keys)] = seen
            # A row of a mask without a single True has no softmax, and its gradient none either.
            mask_GLK[place, len(queries) :, 0] = True
            result_of_token[queries * rows + row] = results + place * longest + np.arange(len(queries))
        results += len(members) * longest
        groups.append(WindowGroup(*(torch.from_numpy(x).to(device) for x in (queries_GL, keys_GK, mask_GLK))))
    result_of_token[result_of_token < 0] = results
    return WindowPlan(whole_plan.groups, tuple(groups), torch.from_numpy(result_of_token).to(device), results)
