"""Speak/silence decisions counted by hand on small rows."""

import pytest
import torch
from objective_batches import SILENCE, VOCABULARY, batch_of, random_batch, random_logits, rows_of

from moss_train.objectives.config import ObjectiveConfig
from moss_train.objectives.metrics import Decision, decision_figures, reply_starts
from moss_train.objectives.streaming_loss import StreamingLoss
from moss_train.streams.compiled import IGNORED_LABEL, Kind

SKIP, TEXT, ONSET = Kind.IGNORED, Kind.TEXT, Kind.ONSET
IDLE, STOP, REVISE = Kind.IDLE_SILENCE, Kind.STOP_SILENCE, Kind.REVISION


def starts(kinds, segments=None, anchors=None):
    segments = segments or [0] * len(kinds)
    anchors = None if anchors is None else torch.tensor([anchors], dtype=torch.bool)
    return reply_starts(torch.tensor([kinds], dtype=torch.uint8), torch.tensor([segments]), anchors).tolist()[0]


def test_a_revision_starts_once_even_when_anchors_interrupt_it():
    assert starts([IDLE, REVISE, REVISE, SKIP, REVISE, STOP, IDLE]) == [False, True, False, False, False, False, False]


def test_a_revision_that_answers_the_user_who_cut_another_one_starts_anew():
    """Ids: three tokens of a revision with an anchor after the second, four tokens of a user turn, two tokens."""
    kinds = [REVISE, REVISE, SKIP, REVISE, SKIP, SKIP, SKIP, SKIP, REVISE, REVISE, STOP]
    anchors = [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert starts(kinds, anchors=anchors) == [place in (0, 8) for place in range(11)]


def test_two_revisions_with_a_stop_between_them_start_twice():
    assert starts([REVISE, REVISE, STOP, SKIP, REVISE, REVISE]) == [True, False, False, False, True, False]


def test_a_revision_at_the_head_of_the_next_packed_stream_starts_anew():
    assert starts([ONSET, TEXT, REVISE, REVISE, REVISE], segments=[0, 0, 0, 1, 1]) == [True, False, True, True, False]


def decisions(kinds, emitted):
    """Counts when greedy decoding emits `emitted` (True: silence) at every label."""
    labels = [[IGNORED_LABEL if kind == SKIP else SILENCE if kind in (IDLE, STOP) else 9 for kind in kinds]]
    batch = batch_of([kinds], labels)
    logits = torch.zeros(len(kinds), 1, VOCABULARY)
    for t, silent in enumerate(emitted):
        logits[t, 0, SILENCE if silent else 11] = 4.0
    objective = StreamingLoss(ObjectiveConfig(), silence_id=SILENCE)
    return objective(logits, batch, objective.totals(batch)).decisions


def test_counts_by_hand():
    kinds = [IDLE, IDLE, IDLE, ONSET, TEXT, STOP, IDLE, REVISE, REVISE, STOP, SKIP]
    silent = [1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 1]
    counts = decisions(kinds, silent)
    assert counts[Decision.SPEAK_SPEAK] == 1  # the onset
    assert counts[Decision.SPEAK_SILENT] == 1  # the revision's first token
    assert counts[Decision.SILENT_SPEAK] == 1
    assert counts[Decision.SILENT_SILENT] == 3
    assert counts[Decision.STOP_STOPPED] == 1
    assert counts[Decision.STOP_WENT_ON] == 1
    figures = decision_figures(counts)
    assert figures["speak_precision"] == pytest.approx(1 / 2)
    assert figures["speak_recall"] == pytest.approx(1 / 2)
    assert figures["speak_f1"] == pytest.approx(1 / 2)
    assert figures["silence_f1"] == pytest.approx(6 / 8)
    assert figures["stop_recall"] == pytest.approx(1 / 2)
    assert figures["decision_accuracy"] == pytest.approx((1 / 2 + 3 / 4) / 2)


def test_figures_without_a_denominator_are_left_out():
    figures = decision_figures(decisions([IDLE, IDLE], [1, 1]))
    assert figures["silence_f1"] == 1.0
    assert not {"speak_f1", "speak_recall", "speak_precision", "stop_recall", "decision_accuracy"} & set(figures)


def test_never_speaking_scores_zero_not_unknown():
    assert decision_figures(decisions([IDLE, ONSET], [1, 1]))["speak_f1"] == 0.0


def test_counts_add_up_over_microbatches():
    objective, batch = StreamingLoss(ObjectiveConfig(), silence_id=SILENCE), random_batch(2, rows=6, length=40)
    logits = random_logits(2, batch)
    totals = objective.totals(batch)
    whole = objective(logits, batch, totals).decisions
    parts = (slice(0, 3), slice(3, 6))
    halves = [objective(logits[:, part], rows_of(batch, part), totals).decisions for part in parts]
    assert torch.equal(whole, halves[0] + halves[1])
    assert whole.sum() > 20
