"""Does the model speak when it should? Counts of speak/silence decisions that add up over microbatches and ranks.

Shape suffixes: R rows, T tokens of a row, K selected positions, V rows of the head on this rank, 2 the silence token
and the label.

A *decision* is a position whose label either starts a reply or is silence while no reply runs:

* truth "speak": the label's kind is ONSET, or REVISION and it opens the revision (all tokens of a revision carry that
  kind), which is when the last trained label before it in the same stream is not a REVISION, or other tokens than
  frames' anchors stand between them, as where the user cuts a revision and is answered by another one;
* truth "silence": the label's kind is IDLE_SILENCE.

The model's decision is the greedy one: it is silent when no token has a larger logit than silence has. Labels
that go on with a running reply (TEXT, the rest of a REVISION) are no decisions, and the end of a reply is a
third question, *did it stop?*, counted apart at STOP_SILENCE labels. Everything is teacher-forced.
"""

from enum import IntEnum
from typing import NamedTuple

import torch

from moss_train.streams.compiled import Kind


class Decision(IntEnum):
    """Places of the counts in the vector made by `decision_counts`; truth first, then what the model did."""

    SPEAK_SPEAK = 0
    SPEAK_SILENT = 1
    SILENT_SPEAK = 2
    SILENT_SILENT = 3
    STOP_STOPPED = 4
    STOP_WENT_ON = 5


def reply_starts(
    kinds_RT: torch.Tensor, segments_RT: torch.Tensor, anchors_RT: torch.Tensor | None = None
) -> torch.Tensor:
    """bool [R, T]: the label is the first token of a reply, of a revision too.

    kinds_RT: uint8 values of `Kind`; segments_RT: int, which stream of the row a token belongs to; anchors_RT: bool,
    the token is a frame's anchor; None: not known, and whatever stands between two labels of revisions counts as one.
    """
    rows, length = kinds_RT.shape
    trained_RT = kinds_RT != Kind.IGNORED
    places_T = torch.arange(length, device=kinds_RT.device)
    last_trained_RT = torch.where(trained_RT, places_T, -1).cummax(dim=1).values
    # The last trained position strictly before t; -1 where there is none.
    nothing_R1 = torch.full((rows, 1), -1, dtype=last_trained_RT.dtype, device=kinds_RT.device)
    previous_RT = torch.cat([nothing_R1, last_trained_RT], dim=1)[:, :length]
    before_RT = previous_RT.clamp_min(0)
    continues_RT = (
        (previous_RT >= 0)
        & (kinds_RT.gather(1, before_RT) == Kind.REVISION)
        & (segments_RT.gather(1, before_RT) == segments_RT)
    )
    if anchors_RT is not None:
        # The label at p is the token p + 1; the tokens from p + 2 to t stand between the two labels.
        upto_RT = anchors_RT.long().cumsum(dim=1)
        between_RT = upto_RT - upto_RT.gather(1, (before_RT + 1).clamp_max(length - 1))
        continues_RT &= between_RT == places_T - before_RT - 1
    return (kinds_RT == Kind.ONSET) | ((kinds_RT == Kind.REVISION) & ~continues_RT)


class ChoiceLogits(NamedTuple):
    """Of K positions, float32 [K] each: what greedy decoding and P(silence) depend on."""

    largest_K: torch.Tensor  #: of all tokens
    silence_K: torch.Tensor  #: of the silence token
    label_K: torch.Tensor  #: of the label

    def chooses_silence(self) -> torch.Tensor:
        """bool [K]: greedy decoding would emit silence."""
        return self.silence_K >= self.largest_K

    def speak_probability(self, ce_K: torch.Tensor) -> torch.Tensor:
        """1 − P(silence), float32 [K], from the labels' cross-entropies: a label's is log Σ exp minus its logit."""
        return -torch.expm1((self.silence_K - self.label_K - ce_K).clamp_max(0.0))


@torch.no_grad()
def choice_logits(
    logits_KV: torch.Tensor,
    labels_K: torch.Tensor,
    silence_id: int,
    tensor_group: torch.distributed.ProcessGroup | None = None,
) -> ChoiceLogits:
    """With `tensor_group`, V is this rank's part of the vocabulary. Nothing of the result is a view of the logits."""
    largest_K = logits_KV.max(dim=-1).values
    chosen_2K = torch.stack([torch.full_like(labels_K, silence_id), labels_K])
    if tensor_group is None or tensor_group.size() == 1:
        return ChoiceLogits(largest_K, *logits_KV.gather(1, chosen_2K.T).T.unbind())
    torch.distributed.all_reduce(largest_K, op=torch.distributed.ReduceOp.MAX, group=tensor_group)
    own = logits_KV.shape[-1]
    local_2K = chosen_2K - tensor_group.rank() * own
    is_here_2K = (local_2K >= 0) & (local_2K < own)
    values_2K = logits_KV.gather(1, local_2K.clamp(0, own - 1).T).T.masked_fill(~is_here_2K, float("-inf"))
    values_2K = values_2K.contiguous()
    torch.distributed.all_reduce(values_2K, op=torch.distributed.ReduceOp.MAX, group=tensor_group)
    return ChoiceLogits(largest_K, *values_2K.unbind())


def decision_counts(silent_K: torch.Tensor, kinds_K: torch.Tensor, starts_K: torch.Tensor) -> torch.Tensor:
    """int64 [len(Decision)] counts over K trained positions; sum them over microbatches and data-parallel ranks.

    silent_K: the model chooses silence; kinds_K: `Kind` of each label; starts_K: `reply_starts` at the same positions.
    """
    idle_K, stop_K = kinds_K == Kind.IDLE_SILENCE, kinds_K == Kind.STOP_SILENCE
    cells = [
        starts_K & ~silent_K,
        starts_K & silent_K,
        idle_K & ~silent_K,
        idle_K & silent_K,
        stop_K & silent_K,
        stop_K & ~silent_K,
    ]
    return torch.stack([cell.sum() for cell in cells])


def decision_figures(counts: torch.Tensor) -> dict[str, float]:
    """Precision, recall and F1 of speaking and of silence, balanced accuracy, and recall of stopping.

    counts: [len(Decision)], summed as far as wanted. A figure whose denominator is zero is left out: it is unknown.
    """
    hit, missed, spoke_early, kept_silent, stopped, went_on = (float(count) for count in counts)
    ratios = {
        "speak_precision": (hit, hit + spoke_early),
        "speak_recall": (hit, hit + missed),
        "speak_f1": (2 * hit, 2 * hit + missed + spoke_early),
        "silence_precision": (kept_silent, kept_silent + missed),
        "silence_recall": (kept_silent, kept_silent + spoke_early),
        "silence_f1": (2 * kept_silent, 2 * kept_silent + missed + spoke_early),
        "stop_recall": (stopped, stopped + went_on),
    }
    figures = {name: numerator / denominator for name, (numerator, denominator) in ratios.items() if denominator}
    if "speak_recall" in figures and "silence_recall" in figures:
        figures["decision_accuracy"] = (figures["speak_recall"] + figures["silence_recall"]) / 2
    return figures
