"""The margin objective (experimental): a revision's first new token should beat the superseded reply's by a margin.

At each of the global batch's N trained labels with a contrast c (`Batch.contrasts_RT`):

    L_m = 1/N Σ max(0, m − (log p(label) − log p(c))) = 1/N Σ max(0, m + CE(label) − CE(c))

Two cross-entropies of the same logits, so it works on a vocabulary that is split over processes. No published precedent
is known.

Shape suffixes: K trained positions of the microbatch, P those with a contrast, V rows of the head on this rank.
"""

import torch
import torch.nn.functional as F


def shortfalls(ce_P: torch.Tensor, contrast_ce_P: torch.Tensor, margin: float) -> torch.Tensor:
    """float32 [P]: by how much each margin is missed, in nats."""
    return F.relu(margin + ce_P - contrast_ce_P)


def margin_sums(ce_P: torch.Tensor, contrast_ce_P: torch.Tensor, short_P: torch.Tensor) -> torch.Tensor:
    """float64 [3]: pairs, Σ shortfall, pairs whose label is more probable than its contrast."""
    with torch.no_grad():
        kept = (ce_P < contrast_ce_P).sum().double()
        return torch.stack([torch.full_like(kept, len(short_P)), short_P.sum(dtype=torch.float64), kept])
