"""Does the model speak as often as it says it would? Decisions sorted by the probability they were given.

Shape suffixes: K decisions or positions; B = `BINS` bins of equal width over P(speak).

With n_b decisions in bin b, c_b their mean P(speak) and r_b the share whose truth is to speak, the expected calibration
error is Σ_b n_b / n · |c_b − r_b| (Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3, for the one
probability of a decision). Sums, not means, are kept, so that they add up over microbatches, ranks and steps.
"""

from enum import IntEnum

import torch

BINS = 10


class BinSum(IntEnum):
    """Rows of the [3, B] tensor made by `calibration_sums`."""

    COUNT = 0  #: decisions
    EXPECTED = 1  #: Σ P(speak): how many replies the model expects
    SPOKEN = 2  #: how many of them truly start a reply


@torch.no_grad()
def calibration_sums(speak_K: torch.Tensor, truth_K: torch.Tensor, counted_K: torch.Tensor) -> torch.Tensor:
    """float64 [3, B] over the positions where `counted_K`.

    speak_K: P(speak), float; a NaN, as of a loss that is not finite, counts as 0. truth_K: bool.
    """
    speak_K = torch.nan_to_num(speak_K.double(), nan=0.0).clamp(0.0, 1.0)
    bin_K = (speak_K * BINS).long().clamp_max(BINS - 1)
    counted_K = counted_K.double()
    sums = torch.zeros(len(BinSum), BINS, dtype=torch.float64, device=speak_K.device)
    return sums.index_add_(1, bin_K, torch.stack([counted_K, counted_K * speak_K, counted_K * truth_K]))


def calibration_figures(sums: torch.Tensor) -> dict[str, float]:
    """`error` (the expected calibration error) and, of every bin b that is not empty, `bin_b/count`, `bin_b/expected`
    and `bin_b/spoken`; nothing without decisions.

    sums: [3, B] of `calibration_sums`, summed as far as wanted. A bin's mean P(speak) is expected ÷ count, its observed
    rate spoken ÷ count.
    """
    count, expected, spoken = sums.double().cpu()
    if not count.sum():
        return {}
    figures = {"error": float((expected - spoken).abs().sum() / count.sum())}
    for number in torch.nonzero(count)[:, 0].tolist():
        figures[f"bin_{number}/count"] = float(count[number])
        figures[f"bin_{number}/expected"] = float(expected[number])
        figures[f"bin_{number}/spoken"] = float(spoken[number])
    return figures


def decisions_at_half(sums: torch.Tensor) -> torch.Tensor:
    """[4] counts of the decisions "speak iff P(speak) ≥ ½", in the order of the first four of `metrics.Decision`."""
    count, _, spoken = sums
    silent = count - spoken
    half = BINS // 2
    return torch.stack([spoken[half:].sum(), spoken[:half].sum(), silent[half:].sum(), silent[:half].sum()])
