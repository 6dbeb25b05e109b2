"""What is logged of a loss: sums of `LossOutput`s that add up over microbatches and ranks, and figures made of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moss_train.objectives.metrics import Decision, decision_figures
from moss_train.objectives.streaming_loss import LossOutput
from moss_train.streams.compiled import Kind


def statistics(outputs: Sequence[LossOutput], sources: int = 0) -> torch.Tensor:
    """float64 [1 + 3·8 + 6 + 2·S]: the loss, the per-kind sums, masses and counts, the decisions, and the sums and
    counts of `sources` sources, of all `outputs`.

    Add the vectors of several ranks, then make `LossFigures.from_statistics` of the sum. No outputs give zeros.
    """
    if not outputs:
        return torch.zeros(1 + 3 * len(Kind) + len(Decision) + 2 * sources, dtype=torch.float64)
    parts = [
        torch.stack([output.loss.detach().double() for output in outputs]).sum()[None],
        *(torch.stack([getattr(output, name) for output in outputs]).sum(dim=0).double() for name in _SUMS),
    ]
    return torch.cat(parts)


_SUMS = ("per_kind_sum", "per_kind_mass", "per_kind_count", "decisions", "per_source_sum", "per_source_count")


@dataclass
class LossFigures:
    """The loss of one global batch, taken apart. Kinds by lower-case name; kinds without labels are left out."""

    loss: float  #: L of `streaming_loss`, of the whole global batch
    per_kind: dict[str, float]  #: mean cross-entropy of a kind's labels, in nats, unweighted
    per_kind_share: dict[str, float]  #: the kind's share of the weighted loss
    per_kind_count: dict[str, int]  #: trained labels of the kind
    decisions: dict[str, float]  #: `metrics.decision_figures`; empty when nothing was to be decided
    per_source: dict[str, float]  #: mean cross-entropy of a source's labels, in nats, unweighted; without absent ones
    per_source_count: dict[str, int]  #: trained labels of the source

    @property
    def labels(self) -> int:
        """Trained labels of the global batch."""
        return sum(self.per_kind_count.values())

    @classmethod
    def from_statistics(cls, summed: torch.Tensor, sources: Sequence[str] = ()) -> "LossFigures":
        """Figures of a vector made by `statistics` for `sources`, summed over every rank that holds other data."""
        sizes = [1, len(Kind), len(Kind), len(Kind), len(Decision), len(sources), len(sources)]
        loss, sums, masses, counts, decisions, source_sums, source_counts = summed.cpu().split(sizes)
        whole_mass = float(masses.sum())
        present = [kind for kind in Kind if counts[kind] > 0]
        return cls(
            loss=float(loss),
            per_kind={kind.name.lower(): float(sums[kind] / counts[kind]) for kind in present},
            per_kind_share={kind.name.lower(): float(masses[kind]) / whole_mass for kind in present if whole_mass},
            per_kind_count={kind.name.lower(): int(counts[kind]) for kind in present},
            decisions=decision_figures(decisions),
            per_source={
                name: float(total / count)
                for name, total, count in zip(sources, source_sums, source_counts, strict=True)
                if count > 0
            },
            per_source_count={
                name: int(count) for name, count in zip(sources, source_counts, strict=True) if count > 0
            },
        )
