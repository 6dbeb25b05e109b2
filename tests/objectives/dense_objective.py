"""The whole objective written out label by label in float64, from its formulas alone: what the product is held to."""

from collections import Counter

import torch
from objective_batches import ANCHOR

from moss_train.data.batch import Batch
from moss_train.objectives.config import ObjectiveConfig
from moss_train.streams.compiled import IGNORED_LABEL, Kind


def _described(batch: Batch) -> list[dict]:
    """Every trained label: place, class of state ("silence", "start" or None), what its anchor decides."""
    found = []
    rows, length = batch.ids_RT.shape
    for row in range(rows):
        before = None  # kind and stream of the last label, masked or not, and its place
        for t in range(length):
            kind, segment = Kind(int(batch.kinds_RT[row, t])), int(batch.segments_RT[row, t])
            if kind == Kind.IGNORED:
                continue
            goes_on = kind == Kind.REVISION and before is not None and before[:2] == (Kind.REVISION, segment)
            # a label is the token behind its place; inside a reply only anchors stand between two of them
            goes_on = goes_on and all(int(batch.ids_RT[row, u]) == ANCHOR for u in range(before[2] + 2, t + 1))
            before = (kind, segment, t)
            if batch.labels_RT[row, t] == IGNORED_LABEL or batch.weights_RT[row, t] <= 0:
                continue
            starts = kind == Kind.ONSET or (kind == Kind.REVISION and not goes_on)
            at_anchor = int(batch.ids_RT[row, t]) == ANCHOR
            found.append(
                {
                    "place": (t, row),
                    "kind": kind.name.lower(),
                    "state": "start" if starts else "silence" if kind.name.endswith("_SILENCE") else None,
                    "at_anchor": at_anchor,
                    "decides": starts if at_anchor and (starts or kind == Kind.IDLE_SILENCE) else None,
                    "label": int(batch.labels_RT[row, t]),
                    "contrast": int(batch.contrasts_RT[row, t]),
                    "factor": float(batch.weights_RT[row, t]),
                }
            )
    return found


def dense_objective(
    logits_TRV: torch.Tensor, decisions_TR: torch.Tensor | None, batch: Batch, config: ObjectiveConfig
) -> torch.Tensor:
    """What is trained on, a float64 scalar with a graph; `config.weights` must name every kind."""
    labels = _described(batch)
    zero = torch.zeros((), dtype=torch.float64)
    for one in labels:
        one["w"] = one["factor"] * config.weights[one["kind"]]
        if one["at_anchor"] and config.frame_position_weight is not None:
            one["w"] *= config.frame_position_weight
    if config.balance == "state":
        counts = Counter(one["state"] for one in labels if one["w"] > 0 and one["state"])
        for one in labels:
            if one["w"] > 0 and one["state"]:
                one["w"] *= sum(counts.values()) / (2 * counts[one["state"]])

    log_p = {one["place"]: logits_TRV[one["place"]].double().log_softmax(0) for one in labels}
    total = zero
    for one in labels:
        log_one = log_p[one["place"]][one["label"]]
        focal = (1 - log_one.exp()) ** config.focal_gamma if one["state"] else 1.0
        total = total - one["w"] * focal * log_one
    z = len(labels) if config.normaliser == "valid" else sum(one["w"] for one in labels)
    total = total / z if z else total

    if decisions_TR is not None:
        decisions = [one for one in labels if one["decides"] is not None]
        speaking = sum(one["decides"] for one in decisions)
        silent = len(decisions) - speaking
        factors = {True: silent / speaking if speaking and silent else 1.0, False: 1.0}
        mean = sum(factors[one["decides"]] for one in decisions) / len(decisions) if decisions else 1.0
        for one in decisions:
            logit = decisions_TR[one["place"]].double()
            p = 1 / (1 + (-logit if one["decides"] else logit).exp())
            weight = 1.0 if config.decision_head_weight is None else config.decision_head_weight
            total = total - weight * factors[one["decides"]] / mean * p.log() / len(decisions)

    if config.margin is not None:
        pairs = [one for one in labels if one["contrast"] >= 0]
        for one in pairs:
            ahead = log_p[one["place"]][one["label"]] - log_p[one["place"]][one["contrast"]]
            missing = config.margin - ahead
            total = total + config.margin_weight * (missing if missing > 0 else zero) / len(pairs)
    return total
