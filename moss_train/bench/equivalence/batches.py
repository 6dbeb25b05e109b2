"""A global batch as the loader deals it to one process: rows, microbatches, and the share of their frames."""

from collections.abc import Sequence

from moss_train.bench.equivalence.cases import Case, Problem
from moss_train.bench.equivalence.streams import IMAGE_SIZE, MAX_FRAMES, MAX_TOKENS, global_batch
from moss_train.data.batch import Batch, FrameShare
from moss_train.data.collate import RowStream, collate
from moss_train.data.packing import CostModel, cut_microbatches, deal_rows, microbatch_count, pack_rows
from moss_train.parallel.groups import ParallelState


def single_rows(problem: Problem, step: int) -> list[Batch]:
    """Each stream of a global batch alone, as it stands before any packing."""
    return [collate([[pair]], IMAGE_SIZE) for pair in global_batch(problem.streams, problem.seed, step)]


def packed_rows(problem: Problem, step: int) -> list[Batch]:
    """The same streams in rows as full as can be, all in one microbatch."""
    streams = global_batch(problem.streams, problem.seed, step)
    return [collate([[streams[n] for n in row] for row in _rows(streams, pack=True)], IMAGE_SIZE)]


def microbatches(case: Case, step: int, state: ParallelState) -> list[Batch]:
    """What process `state` trains on in step `step`."""
    streams = global_batch(case.problem.streams, case.problem.seed, step)
    rows = _rows(streams, case.pack)
    cost = CostModel()
    costs = [sum(cost.stream(len(streams[n][0].ids), len(streams[n][0].frames)) for n in row) for row in rows]
    # The interleaved schedule runs as many microbatches at a time as there are stages.
    multiple = case.layout.pp if case.layout.vpp > 1 else 1
    count = microbatch_count(len(rows), state.data_ranks, case.micro_batch_rows, multiple)
    runs = cut_microbatches(deal_rows(costs, state.data_ranks)[state.data_rank], count)
    share = FrameShare(state.share_rank, state.share_ranks)
    return [collate([[streams[n] for n in rows[row]] for row in run], IMAGE_SIZE).share(share) for run in runs]


def _rows(streams: Sequence[RowStream], pack: bool) -> list[list[int]]:
    if not pack:
        return [[number] for number in range(len(streams))]
    tokens, frames = [len(stream.ids) for stream, _ in streams], [len(stream.frames) for stream, _ in streams]
    return pack_rows(tokens, frames, MAX_TOKENS, MAX_FRAMES)
