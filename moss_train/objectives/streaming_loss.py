"""The streaming loss: L = Σ wᵢ (1−pᵢ)^γ CEᵢ / Z, with Z taken over the whole global batch.

Shape suffixes: R rows, T tokens of a row, V rows of the head (this rank's share under tensor parallelism),
K trained positions of the microbatch. Per-kind vectors are indexed by the value of `Kind`,
per-source vectors by the number of the source in the blend.

wᵢ is the data's factor times the configured weight of the label's kind. γ applies to *state* labels only: idle
and stop silence, and the first token of a reply (`metrics.reply_starts`). A label is trained when it is not -100
and the data gives it a positive weight; a sample masked out by the loader (weights 0) is as if it were absent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from moss_train.data.batch import Batch
from moss_train.objectives.config import ObjectiveConfig
from moss_train.objectives.metrics import Decision, decision_counts, reply_starts
from moss_train.streams.compiled import IGNORED_LABEL, Kind

CrossEntropy = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class LossOutput:
    """One microbatch's part of the loss, and detached sums for logging that add up over microbatches and ranks."""

    loss: torch.Tensor  #: float32 scalar with a graph, already divided by Z: the parts of a global batch sum to L
    per_kind_sum: torch.Tensor  #: float64 [8], Σ CE: divide by the count for the mean CE of a kind
    per_kind_mass: torch.Tensor  #: float64 [8], Σ w (1−p)^γ CE: what each kind contributes to L before Z
    per_kind_count: torch.Tensor  #: float64 [8], trained labels
    per_source_sum: torch.Tensor  #: float64 [S], Σ CE of the labels of each source of the blend
    per_source_count: torch.Tensor  #: float64 [S], trained labels
    decisions: torch.Tensor  #: int64 [len(Decision)], zeros when the loss does not know the silence token


def detached(output: LossOutput) -> LossOutput:
    """The same, its loss without a graph."""
    return replace(output, loss=output.loss.detach())


class StreamingLoss:
    """Weighted, optionally focal cross-entropy over the labels of a microbatch.

    silence_id: the id of the silence token, only needed to count decisions.
    sources: names of the blend's S sources, by `Batch.origins_RT`; () when the loss is not to be told apart by source.
    """

    def __init__(self, config: ObjectiveConfig, silence_id: int | None = None, sources: Sequence[str] = ()):
        config.validate()
        self.config = config
        self.silence_id = silence_id
        self.sources = tuple(sources)
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

    def normaliser(self, batch: Batch) -> torch.Tensor:
        """This microbatch's part of Z, float64 scalar. Sum it over all microbatches and data-parallel ranks.

        Needs the data alone, so that Z is known before the first forward pass.
        """
        trained_RT = _trained(batch)
        if self.config.normaliser == "valid":
            return trained_RT.sum().double()
        return (self._weights(batch) * trained_RT).sum(dtype=torch.float64)

    def __call__(self, logits_TRV: torch.Tensor, batch: Batch, normaliser: torch.Tensor | float) -> LossOutput:
        """The loss of this microbatch, divided by `normaliser`, the Z of the global batch.

        logits_TRV: float, any precision; the softmax is taken in float32. A microbatch without trained labels
        gives 0 with a graph, so that every rank takes part in the backward pass.
        """
        trained_TR = _trained(batch).T
        # Only trained positions are lifted to float32: most positions are prompts and anchors, and the copy keeps a
        # vocabulary-parallel cross-entropy, which may work in place as megatron's does, away from the model's logits.
        logits_KV = logits_TRV[trained_TR].float()
        kinds_K = batch.kinds_RT.T[trained_TR].long()
        starts_K = reply_starts(batch.kinds_RT, batch.segments_RT).T[trained_TR]
        weights_K = self._weights(batch).T[trained_TR]
        decisions = self._decisions(logits_KV, kinds_K, starts_K)

        ce_K = self._cross_entropy(logits_KV, batch.labels_RT.T[trained_TR])
        mass_K = weights_K * self._focal_factor(ce_K, kinds_K, starts_K) * ce_K
        z = torch.as_tensor(normaliser, device=mass_K.device).to(torch.float32)
        loss = mass_K.sum() / torch.where(z > 0, z, torch.ones_like(z))

        with torch.no_grad():

            def per_kind(values_K: torch.Tensor) -> torch.Tensor:
                zeros = torch.zeros(len(Kind), dtype=torch.float64, device=values_K.device)
                return zeros.index_add_(0, kinds_K, values_K.detach().double())

            # The last place takes what is of no source.
            origins_K = batch.origins_RT.T[trained_TR].clamp(-1, len(self.sources))
            origins_K = torch.where(origins_K < 0, len(self.sources), origins_K)

            def per_source(values_K: torch.Tensor) -> torch.Tensor:
                zeros = torch.zeros(len(self.sources) + 1, dtype=torch.float64, device=values_K.device)
                return zeros.index_add_(0, origins_K, values_K.detach().double())[:-1]

            return LossOutput(
                loss=loss,
                per_kind_sum=per_kind(ce_K),
                per_kind_mass=per_kind(mass_K),
                per_kind_count=per_kind(torch.ones_like(ce_K)),
                per_source_sum=per_source(ce_K),
                per_source_count=per_source(torch.ones_like(ce_K)),
                decisions=decisions,
            )

    def _weights(self, batch: Batch) -> torch.Tensor:
        by_kind = self._weight_by_kind.to(batch.kinds_RT.device)
        return batch.weights_RT * by_kind[batch.kinds_RT.long()]

    def _decisions(self, logits_KV: torch.Tensor, kinds_K: torch.Tensor, starts_K: torch.Tensor) -> torch.Tensor:
        if self.silence_id is None:
            return torch.zeros(len(Decision), dtype=torch.int64, device=logits_KV.device)
        return decision_counts(logits_KV, kinds_K, starts_K, self.silence_id, self.tensor_group)

    def _focal_factor(self, ce_K: torch.Tensor, kinds_K: torch.Tensor, starts_K: torch.Tensor) -> torch.Tensor | float:
        if self.config.focal_gamma == 0.0:
            return 1.0
        state_K = starts_K | (kinds_K == Kind.IDLE_SILENCE) | (kinds_K == Kind.STOP_SILENCE)
        # 1−p = −expm1(−CE) keeps its digits when p is near 1; the floor keeps the gradient finite there for γ < 1.
        uncertainty_K = (-torch.expm1(-ce_K)).clamp_min(torch.finfo(torch.float32).tiny)
        return torch.where(state_K, uncertainty_K, torch.ones_like(uncertainty_K)) ** self.config.focal_gamma


def _trained(batch: Batch) -> torch.Tensor:
    return (batch.labels_RT != IGNORED_LABEL) & (batch.weights_RT > 0)
