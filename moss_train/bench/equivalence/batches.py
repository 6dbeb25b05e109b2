"""A global batch as the loader deals it to one process: rows, microbatches, and the share of their frames."""

from collections.abc import Sequence

from moss_train.bench.equivalence.cases import Case, Problem
from moss_train.bench.equivalence.streams import IMAGE_SIZE, MAX_FRAMES, MAX_TOKENS, global_batch
from moss_train.data.batch import Batch, FrameShare
from moss_train.data.collate import RowStream, collate
from moss_train.data.config import CostConfig
from moss_train.data.packing import Deal, RowLimits, pack_rows
from moss_train.parallel.groups import ParallelState


def single_rows(problem: Problem, step: int) -> list[Batch]:
    """Each stream of a global batch alone, as it stands before any packing."""
    return [collate([[pair]], IMAGE_SIZE) for pair in global_batch(problem.streams, problem.seed, step)]


def packed_rows(problem: Problem, step: int) -> list[Batch]:
    """The same streams in rows as full as can be, all in one microbatch."""
    streams = global_batch(problem.streams, problem.seed, step)
    rows = pack_rows(*_lengths(streams), MAX_TOKENS, MAX_FRAMES)
    return [collate([[streams[n] for n in row] for row in rows], IMAGE_SIZE)]


def microbatches(case: Case, step: int, state: ParallelState) -> list[Batch]:
    """What process `state` trains on in step `step`."""
    streams = global_batch(case.problem.streams, case.problem.seed, step)
    limits = RowLimits(MAX_TOKENS, MAX_FRAMES, case.micro_batch_rows, case.pack)
    # The interleaved schedule runs as many microbatches at a time as there are stages.
    multiple = case.layout.pp if case.layout.vpp > 1 else 1
    deal = Deal(*_lengths(streams), limits, CostConfig(), state.data_ranks, multiple)
    plan = deal.microbatches(state.data_rank)
    share = FrameShare(state.share_rank, state.share_ranks)
    return [collate([[streams[n] for n in row] for row in rows], IMAGE_SIZE).share(share) for rows in plan]


def _lengths(streams: Sequence[RowStream]) -> tuple[list[int], list[int]]:
    return [len(stream.ids) for stream, _ in streams], [len(stream.frames) for stream, _ in streams]
