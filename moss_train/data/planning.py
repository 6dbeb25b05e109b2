"""One global batch planned from the tables of lengths: what is in it, in which rows, on which rank. No file is read
but the index."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moss_train.data.batch import FrameShare
from moss_train.data.config import CostConfig
from moss_train.data.order import drawn_variant
from moss_train.data.packing import Deal, Microbatch, RowLimits, cut_frames
from moss_train.data.sources import OpenBlend


@dataclass(frozen=True)
class Place:
    """Which part of every global batch is this rank's."""

    data_rank: int
    data_ranks: int
    share: FrameShare
    microbatch_multiple: int


@dataclass(frozen=True)
class SourceCounts:
    """What a global batch holds of one source."""

    streams: int
    tokens: int  #: text tokens
    frames: int


@dataclass(frozen=True)
class StepPlan:
    """One global batch of B streams, before anything of it is read. Streams go by their place in it, 0 … B-1."""

    epoch: int
    step: int  #: within the epoch
    sources: list[int]  #: B numbers of sources
    samples: list[int]  #: B numbers of samples within their source
    parts: list[int]  #: B; 0 unless the sample was split
    variants: list[int]  #: B; which augmented variant of the sample is shown, 0: itself
    tokens: list[int]  #: B
    frames: list[int]  #: B
    microbatches: list[Microbatch]  #: this rank's: microbatch → row → streams
    imbalance: float  #: work of the data rank that has most ÷ the mean

    def own(self) -> list[int]:
        """The streams of this rank, in the order of its rows."""
        return [stream for rows in self.microbatches for row in rows for stream in row]

    def shares(self, rows: Microbatch, share: FrameShare) -> tuple[list[int], list[int], tuple[int, ...]]:
        """Of one microbatch: its streams, the frames of each, and where the shares of all these frames begin."""
        streams = [stream for row in rows for stream in row]
        counts = [self.frames[stream] for stream in streams]
        return streams, counts, share.bounds(sum(counts))

    def own_frames(self, share: FrameShare) -> dict[int, range]:
        """Stream → which of its frames lie in this process's share, of the streams of which some do."""
        wanted: dict[int, range] = {}
        for rows in self.microbatches:
            streams, counts, bounds = self.shares(rows, share)
            for stream, part in zip(streams, cut_frames(counts, *share.of(bounds)), strict=True):
                # A batch that wraps may hold a sample twice; each is a stream of its own.
                if part:
                    wanted[stream] = part
        return wanted


class Planner:
    """Plans any step of a blend, always in the same way."""

    def __init__(self, opened: OpenBlend, limits: RowLimits, cost: CostConfig, place: Place):
        self._opened = opened
        self._limits = limits
        self._cost = cost
        self._place = place

    def plan(self, epoch: int, step: int) -> StepPlan:
        """Global batch `step` of an epoch, and this rank's rows of it."""
        entries = self._opened.blend.global_batch(epoch, step)
        sources, units = entries[:, 0], entries[:, 1]
        columns = np.zeros((5, len(entries)), np.int64)
        for number in range(len(self._opened.lengths)):
            here = sources == number
            columns[:, here] = self._of_source(epoch, number, units[here])
        samples, parts, variants, tokens, frames = columns.tolist()
        place = self._place
        deal = Deal(tokens, frames, self._limits, self._cost, place.data_ranks, place.microbatch_multiple)
        return StepPlan(
            epoch,
            step,
            sources.tolist(),
            samples,
            parts,
            variants,
            tokens,
            frames,
            deal.microbatches(place.data_rank),
            deal.imbalance,
        )

    def _of_source(self, epoch: int, number: int, units: np.ndarray) -> np.ndarray:
        """int64 [5, n]: sample, part, variant, tokens and frames of units of one source.

        A variant that is longer than a row gives way to the sample itself.
        """
        opened, lengths = self._opened, self._opened.lengths[number]
        samples = lengths.samples[units]
        tokens, frames = lengths.tokens[units], lengths.frames[units]
        drawn = np.zeros(len(units), np.int64)
        count = lengths.variant_tokens.shape[1]
        if count:
            key, seed = opened.corpora[number].key, opened.blend.seed
            drawn[:] = [drawn_variant(seed, epoch, key(sample), opened.varies, count) for sample in samples.tolist()]
            of_variants = [
                np.concatenate([own[:, None], varied[units]], axis=1)
                for own, varied in ((tokens, lengths.variant_tokens), (frames, lengths.variant_frames))
            ]
            places = np.arange(len(units))
            tokens, frames = (values[places, drawn] for values in of_variants)
            # never of samples that are split, whose variants were cut to fit: all parts of one are of one variant
            drawn[(tokens > self._limits.tokens) | (frames > self._limits.frames)] = 0
            tokens, frames = (values[places, drawn] for values in of_variants)
        return np.stack([samples, lengths.parts[units], drawn, tokens, frames]).astype(np.int64)

    def counts(self, plan: StepPlan, left_out: Sequence[int] = ()) -> dict[str, SourceCounts]:
        """Source → what the plan holds of it without the streams `left_out`; sources that are not in it are absent."""
        sums = np.zeros((len(self._opened.corpora), 3), np.int64)
        kept = np.ones(len(plan.sources), np.int64)
        kept[list(left_out)] = 0
        np.add.at(sums, plan.sources, np.stack([kept, kept * plan.tokens, kept * plan.frames], axis=1))
        return {
            corpus.name: SourceCounts(*own.tolist())
            for corpus, own in zip(self._opened.corpora, sums, strict=True)
            if own[0]
        }
