"""Calibration curves against bins filled one decision at a time."""

import math

import pytest
import torch
from objective_batches import ANCHOR, SILENCE, batch_of, random_batch, random_decisions, random_logits

from moss_train.model.predictions import Predictions
from moss_train.objectives.calibration import calibration_figures, calibration_sums
from moss_train.objectives.config import ObjectiveConfig
from moss_train.objectives.figures import LossFigures, statistics
from moss_train.objectives.metrics import reply_starts
from moss_train.objectives.streaming_loss import StreamingLoss
from moss_train.streams.compiled import Kind


def by_hand(decisions: list[tuple[float, bool]]) -> dict[str, float]:
    """Figures of (P(speak), truth) pairs."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for p, truth in decisions:
        bins.setdefault(min(9, int(p * 10)), []).append((p, truth))
    gaps = [abs(sum(p for p, _ in held) - sum(truth for _, truth in held)) for held in bins.values()]
    figures = {"error": sum(gaps) / len(decisions)}
    for number, held in bins.items():
        figures[f"bin_{number}/count"] = len(held)
        figures[f"bin_{number}/expected"] = sum(p for p, _ in held)
        figures[f"bin_{number}/spoken"] = sum(truth for _, truth in held)
    return figures


def figures_of(batch, predictions) -> LossFigures:
    objective = StreamingLoss(ObjectiveConfig(), SILENCE, anchor_id=ANCHOR)
    return LossFigures.from_statistics(statistics([objective(predictions, batch, objective.totals(batch))]))


def test_curves_and_head_figures_by_hand():
    batch = random_batch(3, rows=8, length=40)
    logits, decisions = random_logits(3, batch).detach(), random_decisions(3, batch).detach()
    starts_RT = reply_starts(batch.kinds_RT, batch.segments_RT)
    of_tokens, of_head = [], []
    for row, t in torch.nonzero(starts_RT | (batch.kinds_RT == Kind.IDLE_SILENCE)).tolist():
        truth = bool(starts_RT[row, t])
        of_tokens.append((1 - float(logits[t, row].double().softmax(0)[SILENCE]), truth))
        if batch.ids_RT[row, t] == ANCHOR:
            of_head.append((1 / (1 + math.exp(-float(decisions[t, row]))), truth))
    figures = figures_of(batch, Predictions(logits, decisions))
    assert figures.calibration == pytest.approx(by_hand(of_tokens), rel=1e-5)
    assert 0 < len(of_head) < len(of_tokens)
    expected = {f"calibration/{name}": value for name, value in by_hand(of_head).items()}
    hits = sum(truth for p, truth in of_head if p >= 0.5)
    expected["speak_precision"] = hits / sum(p >= 0.5 for p, _ in of_head)
    expected["speak_recall"] = hits / sum(truth for _, truth in of_head)
    assert {name: figures.decision_head[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_probabilities_of_one_and_of_no_number_have_a_bin():
    speak = torch.tensor([0.0, 1.0, float("nan"), 0.5])
    sums = calibration_sums(speak, torch.tensor([False, True, True, True]), torch.tensor([True] * 4))
    assert sums[0].tolist() == [2.0, 0, 0, 0, 0, 1.0, 0, 0, 0, 1.0]
    assert calibration_figures(sums)["error"] == pytest.approx((1 + 0.5) / 4)
    assert calibration_figures(torch.zeros(3, 10)) == {}


def test_silences_share_of_the_mass_counts_both_silences():
    kinds = [Kind.IDLE_SILENCE, Kind.ONSET, Kind.TEXT, Kind.STOP_SILENCE]
    batch = batch_of(kinds=[kinds], labels=[[SILENCE, 9, 8, SILENCE]])
    figures = figures_of(batch, torch.zeros(4, 1, 24))
    assert figures.silence_share == pytest.approx(0.5)
    assert figures.decision_head == {} and figures.margin == {}


def test_margins_are_told():
    batch = batch_of(kinds=[[Kind.REVISION, Kind.REVISION]], labels=[[9, 8]])
    batch.contrasts_RT[0] = torch.tensor([7, 6])
    logits = torch.zeros(2, 1, 24)
    logits[0, 0, 9], logits[1, 0, 6] = 3.0, 1.0
    objective = StreamingLoss(ObjectiveConfig(margin=2.0, margin_weight=0.5))
    output = objective(logits, batch, objective.totals(batch))
    figures = LossFigures.from_statistics(statistics([output]))
    assert figures.margin == pytest.approx({"pairs": 2, "shortfall": 1.5, "kept": 0.5})
    plain = StreamingLoss(ObjectiveConfig())
    tokens_alone = plain(logits, batch, plain.totals(batch)).loss.item()
    assert figures.loss == pytest.approx(tokens_alone + 0.5 * 1.5)
