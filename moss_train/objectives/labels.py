"""What the labels of a microbatch are to the objective, and what must be counted of them before the first forward pass.

Shape suffixes: R rows, T tokens of a row.
"""

from enum import IntEnum
from typing import NamedTuple

import torch

from moss_train.data.batch import Batch
from moss_train.objectives.metrics import reply_starts
from moss_train.streams.compiled import Kind


class Total(IntEnum):
    """Places in the vector that `StreamingLoss.totals` makes of a microbatch: sums over it, so that the vectors of all
    microbatches and data-parallel ranks add up to the global batch's."""

    LABELS = 0  #: trained labels
    WEIGHT_SILENCES = 1  #: Σ w of silences, idle and stop; w without α
    WEIGHT_STARTS = 2  #: Σ w of first tokens of replies
    WEIGHT_OTHERS = 3  #: Σ w of all other labels
    SILENCES = 4  #: silences with w > 0
    STARTS = 5  #: first tokens of replies with w > 0
    SILENT_DECISIONS = 6  #: decisions at anchors whose truth is silence (N₋)
    SPEAKING_DECISIONS = 7  #: decisions at anchors whose truth is to speak (N₊)
    CONTRASTS = 8  #: trained labels with a contrast


class Labels(NamedTuple):
    """Masks over a microbatch, bool [R, T]. All but the last lie within `trained_RT`."""

    trained_RT: torch.Tensor  #: not -100, and the data give it a positive weight
    starts_RT: torch.Tensor  #: the first token of a reply, of a revision too (`metrics.reply_starts`)
    silences_RT: torch.Tensor  #: idle or stop silence
    idle_RT: torch.Tensor  #: silence while no reply runs
    contrasts_RT: torch.Tensor  #: has a token that should be less probable
    anchors_RT: torch.Tensor  #: predicted at a frame's anchor, trained or not

    @property
    def decisions_RT(self) -> torch.Tensor:
        """Decisions at anchors: to start a reply, or to be silent while none runs."""
        return self.anchors_RT & (self.starts_RT | self.idle_RT)


def labels_of(batch: Batch, anchor_id: int | None) -> Labels:
    """The masks of `batch`. Without `anchor_id` no position counts as an anchor."""
    anchors_RT = None if anchor_id is None else batch.ids_RT == anchor_id
    trained_RT = batch.trained_RT()
    idle_RT = trained_RT & (batch.kinds_RT == Kind.IDLE_SILENCE)
    return Labels(
        trained_RT=trained_RT,
        starts_RT=trained_RT & reply_starts(batch.kinds_RT, batch.segments_RT, anchors_RT),
        silences_RT=idle_RT | (trained_RT & (batch.kinds_RT == Kind.STOP_SILENCE)),
        idle_RT=idle_RT,
        contrasts_RT=trained_RT & (batch.contrasts_RT >= 0),
        anchors_RT=torch.zeros_like(trained_RT) if anchors_RT is None else anchors_RT,
    )


def totals_of(labels: Labels, weights_RT: torch.Tensor) -> torch.Tensor:
    """float64 [len(Total)] of one microbatch. weights_RT: w of every label, without α."""
    weighted_RT = weights_RT > 0
    others_RT = labels.trained_RT & ~labels.silences_RT & ~labels.starts_RT
    sums = {
        Total.LABELS: labels.trained_RT.sum(),
        Total.WEIGHT_SILENCES: (weights_RT * labels.silences_RT).sum(dtype=torch.float64),
        Total.WEIGHT_STARTS: (weights_RT * labels.starts_RT).sum(dtype=torch.float64),
        Total.WEIGHT_OTHERS: (weights_RT * others_RT).sum(dtype=torch.float64),
        Total.SILENCES: (labels.silences_RT & weighted_RT).sum(),
        Total.STARTS: (labels.starts_RT & weighted_RT).sum(),
        Total.SILENT_DECISIONS: (labels.decisions_RT & labels.idle_RT).sum(),
        Total.SPEAKING_DECISIONS: (labels.decisions_RT & labels.starts_RT).sum(),
        Total.CONTRASTS: labels.contrasts_RT.sum(),
    }
    return torch.stack([sums[place].double() for place in Total])
