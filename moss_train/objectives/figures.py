"""What is logged of a loss: sums of `LossOutput`s that add up over microbatches and ranks, and figures made of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moss_train.objectives.calibration import BINS, BinSum, calibration_figures, decisions_at_half
from moss_train.objectives.metrics import Decision, decision_figures
from moss_train.objectives.streaming_loss import LossOutput
from moss_train.streams.compiled import Kind


def statistics(outputs: Sequence[LossOutput], sources: int = 0) -> torch.Tensor:
    """float64 [`statistics_size(sources)`]: every field of all `outputs`, summed, one after another.

    Add the vectors of several ranks, then make `LossFigures.from_statistics` of the sum. No outputs give zeros.
    """
    if not outputs:
        return torch.zeros(statistics_size(sources), dtype=torch.float64)
    parts = [
        torch.stack([getattr(output, name).detach().double() for output in outputs]).sum(dim=0).flatten()
        for name in _sizes(sources)
    ]
    return torch.cat(parts)


def statistics_size(sources: int = 0) -> int:
    """How many numbers `statistics` has."""
    return sum(_sizes(sources).values())


def _sizes(sources: int) -> dict[str, int]:
    """The fields of `LossOutput` in the order of the vector, and how many numbers each has."""
    return {
        "loss": 1,
        "per_kind_sum": len(Kind),
        "per_kind_mass": len(Kind),
        "per_kind_count": len(Kind),
        "decisions": len(Decision),
        "calibration": len(BinSum) * BINS,
        "head_loss": 1,
        "head_calibration": len(BinSum) * BINS,
        "margins": 3,
        "per_source_sum": sources,
        "per_source_count": sources,
    }


@dataclass
class LossFigures:
    """The loss of one global batch, taken apart. Kinds by lower-case name; kinds without labels are left out."""

    loss: float  #: what is trained on: L of `streaming_loss`, with the decision head's loss and the margins' added
    per_kind: dict[str, float]  #: mean cross-entropy of a kind's labels, in nats, unweighted
    per_kind_share: dict[str, float]  #: the kind's share of the weighted loss
    per_kind_count: dict[str, int]  #: trained labels of the kind
    silence_share: float | None  #: share of the weighted loss that idle and stop silence have; None without any loss
    decisions: dict[str, float]  #: `metrics.decision_figures`; empty when nothing was to be decided
    calibration: dict[str, float]  #: `calibration_figures` of the same decisions
    #: of the decision head: `loss` (L_d), `decision_figures` at P(speak) ≥ ½, and `calibration/…`; empty without one
    decision_head: dict[str, float]
    margin: dict[str, float]  #: `pairs`, `shortfall` (mean, in nats) and `kept` (share with the label ahead); or empty
    per_source: dict[str, float]  #: mean cross-entropy of a source's labels, in nats, unweighted; without absent ones
    per_source_count: dict[str, int]  #: trained labels of the source

    @property
    def labels(self) -> int:
        """Trained labels of the global batch."""
        return sum(self.per_kind_count.values())

    @classmethod
    def from_statistics(cls, summed: torch.Tensor, sources: Sequence[str] = ()) -> "LossFigures":
        """Figures of a vector made by `statistics` for `sources`, summed over every rank that holds other data."""
        sizes = _sizes(len(sources))
        parts = dict(zip(sizes, summed.cpu().split(list(sizes.values())), strict=True))
        sums, masses, counts = parts["per_kind_sum"], parts["per_kind_mass"], parts["per_kind_count"]
        whole_mass = float(masses.sum())
        silence_mass = float(masses[Kind.IDLE_SILENCE] + masses[Kind.STOP_SILENCE])
        present = [kind for kind in Kind if counts[kind] > 0]
        calibration, head = (parts[name].view(len(BinSum), BINS) for name in ("calibration", "head_calibration"))
        source_sums, source_counts = parts["per_source_sum"], parts["per_source_count"]
        return cls(
            loss=float(parts["loss"]),
            per_kind={kind.name.lower(): float(sums[kind] / counts[kind]) for kind in present},
            per_kind_share={kind.name.lower(): float(masses[kind]) / whole_mass for kind in present if whole_mass},
            per_kind_count={kind.name.lower(): int(counts[kind]) for kind in present},
            silence_share=silence_mass / whole_mass if whole_mass else None,
            decisions=decision_figures(parts["decisions"]),
            calibration=calibration_figures(calibration),
            decision_head=_head_figures(float(parts["head_loss"]), head),
            margin=_margin_figures(*parts["margins"].tolist()),
            per_source={
                name: float(total / count)
                for name, total, count in zip(sources, source_sums, source_counts, strict=True)
                if count > 0
            },
            per_source_count={
                name: int(count) for name, count in zip(sources, source_counts, strict=True) if count > 0
            },
        )


def _head_figures(loss: float, sums: torch.Tensor) -> dict[str, float]:
    calibration = calibration_figures(sums)
    if not calibration:
        return {}
    nothing_stops = torch.zeros(len(Decision) - 4, dtype=torch.float64)
    return {
        "loss": loss,
        **decision_figures(torch.cat([decisions_at_half(sums), nothing_stops])),
        **{f"calibration/{name}": value for name, value in calibration.items()},
    }


def _margin_figures(pairs: float, shortfall: float, kept: float) -> dict[str, float]:
    return {"pairs": pairs, "shortfall": shortfall / pairs, "kept": kept / pairs} if pairs else {}
