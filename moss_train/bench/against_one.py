"""Layouts measured one after another on forked processes, each between two timings of one process on the same work."""

import statistics
from collections.abc import Sequence

from moss_train.bench.equivalence.ranks import Ranks
from moss_train.bench.one_layout import RankFigures, Work, measure, time_only

BYTES_TOLERANCE = 1e-9  #: relative; both sides are sums of the same integers, divided
MB = 1e6
_DEADLINE_S = 300.0


class AgainstOne:
    """`one` is measured when this is made; its figures are then in `figures_of_one`."""

    def __init__(self, ranks: Ranks, one: Work, steps: int, unobserved: int = 0):
        """steps: that are timed. unobserved: that every process takes before memory and bytes are measured."""
        self._ranks, self._one, self._steps, self._unobserved = ranks, one, steps, unobserved
        self.figures_of_one = self._measured(one)
        self.seconds_of_one = _step_seconds(self.figures_of_one)  #: of the last timing

    def measure(self, work: Work) -> tuple[list[RankFigures], float]:
        """Figures of every rank, and the median step time as a part of one process's. JobError when it fails."""
        figures = self._measured(work)
        after = _slowest(self._ranks.run(1, time_only, self._one, self._steps, deadline_s=_DEADLINE_S))
        around = self.seconds_of_one + after
        self.seconds_of_one = after
        return figures, statistics.median(_step_seconds(figures)) / statistics.median(around)

    def _measured(self, work: Work) -> list[RankFigures]:
        return self._ranks.run(work.ranks, measure, work, self._steps, self._unobserved, deadline_s=_DEADLINE_S)


def bytes_error(figures: RankFigures) -> float:
    """Largest relative difference between bytes sent and predicted, over the kinds of one rank."""
    kinds = set(figures.sent) | set(figures.predicted)
    pairs = [(figures.sent.get(kind, 0.0), figures.predicted.get(kind, 0.0)) for kind in kinds]
    return max((abs(sent - told) / max(sent, told) for sent, told in pairs if sent != told), default=0.0)


def _step_seconds(ranks: list[RankFigures]) -> list[float]:
    return _slowest([one.step_seconds for one in ranks])


def _slowest(of_ranks: Sequence[Sequence[float]]) -> list[float]:
    """Each step takes as long as its slowest rank."""
    return [max(step) for step in zip(*of_ranks, strict=True)]
