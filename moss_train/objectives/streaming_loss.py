"""The streaming loss: L = Σ wᵢ (1−pᵢ)^γ CEᵢ / Z, with Z taken over the whole global batch, and what is added to it.

Shape suffixes: R rows, T tokens of a row, V rows of the head (this rank's share under tensor parallelism),
K trained positions of the microbatch, P those of them with a contrast, B bins of P(speak). Per-kind vectors are indexed
by the value of `Kind`, per-source vectors by the number of the source in the blend.

wᵢ is the data's factor times the configured weight of the label's kind, times `frame_position_weight` at anchors,
times α with `balance=state`. γ and α apply to *state* labels only: idle and stop silence, and the first token of a
reply (`metrics.reply_starts`). A label is trained when it is not -100 and the data gives it a positive weight; a sample
masked out by the loader (weights 0) is as if it were absent.

What is counted of the global batch (`labels.Total`) depends on the data alone and is known before the first forward
pass; a microbatch's loss is a part of the global batch's, divided already.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from moss_train.data.batch import Batch
from moss_train.model.predictions import Predictions
from moss_train.objectives.calibration import BINS, BinSum, calibration_sums
from moss_train.objectives.config import ObjectiveConfig
from moss_train.objectives.decision_loss import decision_loss
from moss_train.objectives.labels import Labels, Total, labels_of, totals_of
from moss_train.objectives.margin import margin_sums, shortfalls
from moss_train.objectives.metrics import ChoiceLogits, Decision, choice_logits, decision_counts
from moss_train.streams.compiled import Kind

CrossEntropy = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class LossOutput:
    """One microbatch's part of the loss, and detached sums for logging that add up over microbatches and ranks."""

    loss: torch.Tensor  #: float32 scalar with a graph, divided already: the parts of a global batch sum to its loss
    per_kind_sum: torch.Tensor  #: float64 [8], Σ CE: divide by the count for the mean CE of a kind
    per_kind_mass: torch.Tensor  #: float64 [8], Σ w (1−p)^γ CE: what each kind contributes to L before Z
    per_kind_count: torch.Tensor  #: float64 [8], trained labels
    per_source_sum: torch.Tensor  #: float64 [S], Σ CE of the labels of each source of the blend
    per_source_count: torch.Tensor  #: float64 [S], trained labels
    decisions: torch.Tensor  #: int64 [len(Decision)], zeros when the loss does not know the silence token
    calibration: torch.Tensor  #: float64 [3, B], `calibration_sums` of the same decisions
    head_loss: torch.Tensor  #: float64 scalar, this microbatch's part of L_d (`decision_loss`); 0 without a head
    head_calibration: torch.Tensor  #: float64 [3, B], of the decision head; zeros without one
    margins: torch.Tensor  #: float64 [3], `margin.margin_sums`; zeros when there is no margin


def detached(output: LossOutput) -> LossOutput:
    """The same, its loss without a graph."""
    return replace(output, loss=output.loss.detach())


class StreamingLoss:
    """Weighted, optionally focal and balanced cross-entropy over the labels of a microbatch, the decision head's loss
    where the model has that head, and margins.

    silence_id: the id of the silence token, only needed to measure decisions.
    sources: names of the blend's S sources, by `Batch.origins_RT`; () when the loss is not to be told apart by source.
    anchor_id: the id of a frame's anchor, needed for `frame_position_weight` and for a decision head.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        silence_id: int | None = None,
        sources: Sequence[str] = (),
        anchor_id: int | None = None,
    ):
        config.validate()
        if config.frame_position_weight is not None and anchor_id is None:
            raise ValueError("objective.frame_position_weight is set, and no anchor_id was given")
        self.config = config
        self.silence_id = silence_id
        self.sources = tuple(sources)
        self.anchor_id = anchor_id
        self.tensor_group: torch.distributed.ProcessGroup | None = None
        self._cross_entropy: CrossEntropy = partial(F.cross_entropy, reduction="none")
        self._weight_by_kind = torch.tensor(config.weight_by_kind(), dtype=torch.float32)

    def split_over(self, tensor_group: torch.distributed.ProcessGroup, cross_entropy: CrossEntropy) -> None:
        """From now on the last axis of the logits is this rank's share of the vocabulary: an engine says so.

        cross_entropy: (float32 logits [K, V of this rank], labels [K] of the whole vocabulary) → float32 [K], computed
        over `tensor_group`. A group of one splits nothing, and the plain cross-entropy stays.
        """
        if tensor_group.size() > 1:
            self.tensor_group, self._cross_entropy = tensor_group, cross_entropy

    def totals(self, batch: Batch) -> torch.Tensor:
        """This microbatch's part of what is counted of the global batch, float64 [len(Total)]. Sum it over all
        microbatches and data-parallel ranks.

        Needs the data alone, so that Z and α are known before the first forward pass.
        """
        return totals_of(labels_of(batch, self.anchor_id), self._weights(batch))

    def __call__(self, predictions: Predictions | torch.Tensor, batch: Batch, totals: torch.Tensor) -> LossOutput:
        """The loss of this microbatch as a part of the global batch whose `totals` are given.

        predictions: the model's, of all positions or of `Batch.trained_places` alone; or logits [T, R, V], when it has
        no decision head. The softmax is taken in float32, whatever their precision. A microbatch without trained labels
        gives 0 with a graph, so that every rank takes part in the backward pass.
        """
        if isinstance(predictions, torch.Tensor):
            predictions = Predictions(predictions)
        labels = labels_of(batch, self.anchor_id)
        # Found once: each indexing by a mask would wait for the device.
        places_K = batch.trained_places() if predictions.places_K is None else predictions.places_K
        rows = batch.ids_RT.shape[0]

        def at(values_RT: torch.Tensor) -> torch.Tensor:
            return values_RT.T.flatten()[places_K]

        totals = totals.to(batch.ids_RT.device)
        labels_K = at(batch.labels_RT)
        kinds_K = at(batch.kinds_RT).long()
        starts_K, silences_K = at(labels.starts_RT), at(labels.silences_RT)
        weights_K = self._balanced(at(self._weights(batch)), starts_K, silences_K, totals)
        contrasts_K = None if self.config.margin is None else at(batch.contrasts_RT)
        ce_K, contrast_ce_P, *chosen = predictions.read(places_K, rows, partial(self._read, labels_K, contrasts_K))
        choice = ChoiceLogits(*chosen) if chosen else None
        mass_K = weights_K * self._focal_factor(ce_K, starts_K | silences_K) * ce_K
        z = self._normaliser(totals).to(torch.float32)
        loss = mass_K.sum() / torch.where(z > 0, z, torch.ones_like(z))
        bins = torch.zeros(len(BinSum), BINS, dtype=torch.float64, device=loss.device)
        head_loss, head_calibration, margins = bins.new_zeros(()), bins, bins.new_zeros(3)
        if predictions.decisions_TR is not None:
            part, head_calibration = self._decision_loss(predictions.decisions_TR, labels, totals)
            head_loss = part.detach().double()
            weight = self.config.decision_head_weight
            loss = loss + (1.0 if weight is None else weight) * part
        if contrasts_K is not None:
            part, margins = self._margin_loss(ce_K, contrasts_K, contrast_ce_P, totals)
            loss = loss + self.config.margin_weight * part

        with torch.no_grad():

            def per_kind(values_K: torch.Tensor) -> torch.Tensor:
                zeros = torch.zeros(len(Kind), dtype=torch.float64, device=values_K.device)
                return zeros.index_add_(0, kinds_K, values_K.detach().double())

            # The last place takes what is of no source.
            origins_K = at(batch.origins_RT).clamp(-1, len(self.sources))
            origins_K = torch.where(origins_K < 0, len(self.sources), origins_K)

            def per_source(values_K: torch.Tensor) -> torch.Tensor:
                zeros = torch.zeros(len(self.sources) + 1, dtype=torch.float64, device=values_K.device)
                return zeros.index_add_(0, origins_K, values_K.detach().double())[:-1]

            decisions = torch.zeros(len(Decision), dtype=torch.int64, device=loss.device)
            calibration = bins
            if choice is not None:
                decisions = decision_counts(choice.chooses_silence(), kinds_K, starts_K)
                decided_K = starts_K | (kinds_K == Kind.IDLE_SILENCE)
                calibration = calibration_sums(choice.speak_probability(ce_K.detach()), starts_K, decided_K)
            return LossOutput(
                loss=loss,
                per_kind_sum=per_kind(ce_K),
                per_kind_mass=per_kind(mass_K),
                per_kind_count=per_kind(torch.ones_like(ce_K)),
                per_source_sum=per_source(ce_K),
                per_source_count=per_source(torch.ones_like(ce_K)),
                decisions=decisions,
                calibration=calibration,
                head_loss=head_loss,
                head_calibration=head_calibration,
                margins=margins,
            )

    def _weights(self, batch: Batch) -> torch.Tensor:
        """w of every label, without α, float32 [R, T]."""
        by_kind = self._weight_by_kind.to(batch.kinds_RT.device)
        weights_RT = batch.weights_RT * by_kind[batch.kinds_RT.long()]
        if self.config.frame_position_weight is None:
            return weights_RT
        return torch.where(batch.ids_RT == self.anchor_id, self.config.frame_position_weight * weights_RT, weights_RT)

    def _alphas(self, totals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """α of silences and of first tokens of replies, float64 scalars: α_k = (n_s + n_r) / (2 n_k)."""
        silences, starts = totals[Total.SILENCES], totals[Total.STARTS]
        # A class without labels has no use for its α.
        return tuple((silences + starts) / (2.0 * count.clamp_min(1.0)) for count in (silences, starts))

    def _balanced(
        self, weights_K: torch.Tensor, starts_K: torch.Tensor, silences_K: torch.Tensor, totals: torch.Tensor
    ) -> torch.Tensor:
        if self.config.balance == "none":
            return weights_K
        silence, start = (alpha.float() for alpha in self._alphas(totals))
        alphas_K = torch.where(silences_K, silence, torch.ones_like(weights_K))
        return weights_K * torch.where(starts_K, start, alphas_K)

    def _normaliser(self, totals: torch.Tensor) -> torch.Tensor:
        """Z, float64 scalar."""
        if self.config.normaliser == "valid":
            return totals[Total.LABELS]
        silences, starts = totals[Total.WEIGHT_SILENCES], totals[Total.WEIGHT_STARTS]
        if self.config.balance == "state":
            silence, start = self._alphas(totals)
            silences, starts = silence * silences, start * starts
        return totals[Total.WEIGHT_OTHERS] + silences + starts

    def _read(
        self, labels_K: torch.Tensor, contrasts_K: torch.Tensor | None, logits_kV: torch.Tensor, which: slice
    ) -> tuple[torch.Tensor, ...]:
        """All that is read of the logits of some of the K positions: cross-entropies of labels and of contrasts, and
        what `ChoiceLogits` has, where silence is known."""
        # A vocabulary-parallel cross-entropy may work in place, as megatron's does: it comes last.
        logits_kV, labels_k = logits_kV.float(), labels_K[which]
        chosen = (
            ()
            if self.silence_id is None
            else choice_logits(logits_kV.detach(), labels_k, self.silence_id, self.tensor_group)
        )
        contrast_ce = logits_kV.new_zeros(0)
        if contrasts_K is not None:
            contrasts_k = contrasts_K[which]
            places = (contrasts_k >= 0).nonzero()[:, 0]
            contrast_ce = self._cross_entropy(logits_kV[places], contrasts_k[places].long())
        return self._cross_entropy(logits_kV, labels_k), contrast_ce, *chosen

    def _margin_loss(
        self, ce_K: torch.Tensor, contrasts_K: torch.Tensor, contrast_ce_P: torch.Tensor, totals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.config.margin is not None
        ce_P = ce_K[contrasts_K >= 0]
        short_P = shortfalls(ce_P, contrast_ce_P, self.config.margin)
        return short_P.sum() / totals[Total.CONTRASTS].clamp_min(1.0).float(), margin_sums(ce_P, contrast_ce_P, short_P)

    def _decision_loss(
        self, decisions_TR: torch.Tensor, labels: Labels, totals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.anchor_id is None:
            raise ValueError("the model has a decision head, and the loss was given no anchor_id")
        return decision_loss(decisions_TR, labels, totals)

    def _focal_factor(self, ce_K: torch.Tensor, state_K: torch.Tensor) -> torch.Tensor | float:
        if self.config.focal_gamma == 0.0:
            return 1.0
        # 1−p = −expm1(−CE) keeps its digits when p is near 1; the floor keeps the gradient finite there for γ < 1.
        uncertainty_K = (-torch.expm1(-ce_K)).clamp_min(torch.finfo(torch.float32).tiny)
        return torch.where(state_K, uncertainty_K, torch.ones_like(uncertainty_K)) ** self.config.focal_gamma
