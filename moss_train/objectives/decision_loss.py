"""The decision head's loss: binary cross-entropy over the decisions at frames' anchors, both truths weighing the same.

With N₋ silent and N₊ speaking decisions in the global batch, N = N₋ + N₊, and z the head's logit of "speak":

    L_d = 1/N Σ c_y BCE(z, y),   c_y = N / (k N_y),   k: how many of the two truths occur

so c₊/c₋ = N₋/N₊ and the mean weight is 1: Dispider's positive weight and its normalisation (`modeling_qwen.py`), over
the global batch instead of a microbatch.

Shape suffixes: R rows, T tokens of a row.
"""

import torch
import torch.nn.functional as F

from moss_train.objectives.calibration import calibration_sums
from moss_train.objectives.labels import Labels, Total


def decision_loss(
    decisions_TR: torch.Tensor, labels: Labels, totals: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """This microbatch's part of L_d, float32 with a graph, and its `calibration_sums`.

    decisions_TR: float32, the head's logits; what they are elsewhere than at decisions does not matter.
    totals: float64 [len(Total)] of the global batch.
    """
    counted_RT, truth_RT = labels.decisions_RT, labels.starts_RT
    # Chosen before the loss, so that a NaN elsewhere cannot come back through a gradient of zero.
    logits_RT = torch.where(counted_RT, decisions_TR.T, 0.0)
    silent, speaking = totals[Total.SILENT_DECISIONS], totals[Total.SPEAKING_DECISIONS]
    # c_y / N = 1 / (k N_y)
    present = ((silent > 0).double() + (speaking > 0).double()).clamp_min(1.0)
    share_silent, share_speaking = (1.0 / (present * count.clamp_min(1.0)) for count in (silent, speaking))
    shares_RT = torch.where(truth_RT, share_speaking.float(), share_silent.float()) * counted_RT
    loss_RT = F.binary_cross_entropy_with_logits(logits_RT, truth_RT.float(), reduction="none")
    sums = calibration_sums(logits_RT.detach().sigmoid().flatten(), truth_RT.flatten(), counted_RT.flatten())
    return (shares_RT * loss_RT).sum(), sums
