"""Answers, revisions and decisions in hand-made transcripts; notation as in `made`."""

import math

import pytest
from made import figures, make

from moss_train.evaluate.metrics import slot_errors
from moss_train.evaluate.transcript import (
    Confirmation,
    Question,
    Revision,
    StreamTranscript,
    model_utterances,
    reference_utterances,
)

# the question opens slot 0, its evidence is the frame of slot 3
ASKED_EARLY = Question("q1", 0, "Red.", "a1", answer_slot=3, evidence_slot=3, evidence_after=True)
EARLY = "?. | . | . | Red. | . | . | . | ."


@pytest.mark.parametrize(
    ("model", "right"),
    [
        ("?. | . | . | Red. | . | . | . | .", True),
        ("?. | . | . | . | Red. | . | . | .", True),  # late by one
        ("?. | . | . | . | . | Red. | . | .", True),  # late by the whole window
        ("?. | . | . | . | . | . | Red. | .", False),  # too late
        ("?. | . | . | Blue. | Red. | . | . | .", True),  # wrong, then corrected in time
        ("?. | . | . | Blue. | . | . | Red. | .", False),  # corrected too late
        ("?. | . | . | Red. | Blue. | . | . | .", False),  # right, then spoilt
        ("?. | . | . | Red. | Red. | . | . | .", True),  # repeated
        ("?. | . | Red. | . | . | . | . | .", False),  # a guess before the evidence
        ("?. | . | . | Re… | d. | . | . | .", True),  # said over two slots
        ("?. | . | . | . | . | . | . | .", False),
    ],
)
def test_answer_waits_for_its_evidence(model, right):
    result = figures(make(EARLY, model, [ASKED_EARLY]))
    assert result["answer_accuracy"] == result["answer_accuracy_evidence_after"] == float(right)
    assert (result["n_questions"], result["n_answers"]) == (1, 1)
    assert math.isnan(result["answer_accuracy_evidence_before"])


def test_question_about_what_was_seen_counts_apart():
    question = Question("q1", 4, "Red.", "a1", answer_slot=5, evidence_slot=1, evidence_after=False)
    result = figures(make("?. | . | . | . | ?. | Red. | .", "?. | Red. | . | . | ?. | Red. | .", [question]))
    assert result["answer_accuracy"] == result["answer_accuracy_evidence_before"] == 1.0
    assert (result["n_questions"], result["n_answers"]) == (1, 0)
    # what was said before the question answers nothing
    early = make("?. | . | . | . | ?. | Red. | .", "?. | Red. | . | . | ?. | . | .", [question])
    assert figures(early)["answer_accuracy"] == 0


def test_answer_in_the_slot_that_the_interrupting_turn_opens():
    question = Question("q2", 4, "Red.", "a2", answer_slot=4, evidence_slot=2, evidence_after=False)
    reference = "?. | . | It is red… | and big… | ? Red. | . | ."
    perfect = make(reference, reference, [question])
    assert [reply.text for reply in model_utterances(perfect.slots)] == ["It is redand big", "Red."]
    assert [reply.complete for reply in model_utterances(perfect.slots)] == [False, True]
    assert figures(perfect)["answer_accuracy"] == 1.0
    late = make(reference, "?. | . | It is red… | and big… | ?. | Red. | .", [question])
    assert figures(late)["answer_accuracy"] == 1.0


def test_window_closes_at_the_next_turn_and_at_the_next_reply_of_the_reference():
    reference = "?. | . | Red. | ?. | Two. | ."
    question = Question("q1", 0, "Red.", "a1", answer_slot=2, evidence_slot=2, evidence_after=True)
    assert figures(make(reference, "?. | . | . | ?. | Red. | .", [question]))["answer_accuracy"] == 0
    assert figures(make(reference, "?. | . | Red. | ?. | Two. | .", [question]))["answer_accuracy"] == 1


REVISED = Revision("a2", "Red.", "Blue.", since_slot=1, evidence_slot=4)
REVISION = "?. | Red. | . | . | Blue. | . | . | . | ."


@pytest.mark.parametrize(
    ("model", "delay", "stale"),
    [
        ("?. | Red. | . | . | Blue. | . | . | . | .", 0, False),
        ("?. | Red. | . | . | . | . | Blue. | . | .", 2, False),
        ("?. | Red. | . | . | . | . | . | Blue. | .", None, True),
        ("?. | Red. | . | . | Green. | Blue. | . | . | .", 1, False),  # wrong, then corrected
        ("?. | Red. | . | . | Green. | . | . | . | .", None, True),  # neither: the old one still stands
        ("?. | Red. | . | . | Red. | . | . | . | .", None, True),
        ("?. | Red. | . | . | Blue. | Red. | . | . | .", 0, True),  # revised, then taken back
        ("?. | . | . | . | . | . | . | . | .", None, False),  # nothing was said, so nothing is stale
        ("?. | Red. | . | Blue. | . | . | . | . | .", None, False),  # before the evidence: luck
    ],
)
def test_revision(model, delay, stale):
    result = figures(make(REVISION, model, revisions=[REVISED]))
    assert result["revision_accuracy"] == float(delay is not None)
    assert result["stale_rate"] == float(stale)
    assert result["n_revisions"] == 1
    if delay is None:
        assert math.isnan(result["revision_delay_frames"])
    else:
        assert result["revision_delay_frames"] == delay


def test_mean_delay_is_over_the_accurate_revisions():
    late = make(REVISION, "?. | Red. | . | . | . | Blue. | . | . | .", revisions=[REVISED])
    never = make(REVISION, "?. | Red. | . | . | . | . | . | . | .", revisions=[REVISED])
    result = figures(make(REVISION, REVISION, revisions=[REVISED]), late, never)
    assert result["revision_delay_frames"] == 0.5
    assert result["revision_accuracy"] == pytest.approx(2 / 3)


CONFIRMED = Confirmation(slot=4, answer="Red.")
SILENT = "?. | Red. | . | . | . | . | . | . | ."


@pytest.mark.parametrize(
    ("model", "false"),
    [
        ("?. | Red. | . | . | . | . | . | . | .", False),
        ("?. | Red. | . | . | Blue. | . | . | . | .", True),
        ("?. | Red. | . | . | . | . | Blue. | . | .", True),
        ("?. | Red. | . | . | . | . | . | Blue. | .", False),  # outside the window
        ("?. | Red. | . | . | Red. | . | . | . | .", False),  # says it again: needless, but no revision
        ("?. | Blue. | . | . | Red. | . | . | . | .", False),  # comes to the answer that holds
        ("?. | Blue. | . | . | Blue. | . | . | . | .", False),  # keeps to its own wrong answer
        ("?. | Red. | . | . | Red. | Blue. | . | . | .", True),
        ("?. | . | . | . | Blue. | . | . | . | .", True),
        ("?. | . | . | Blue… | green… | . | . | . | .", True),  # still talking when it happens
        ("?. | . | . | Re… | d. | . | . | . | .", False),  # still giving the answer that holds
    ],
)
def test_false_revision(model, false):
    result = figures(make(SILENT, model, confirmations=[CONFIRMED]))
    assert result["false_revision_rate"] == float(false)
    assert result["n_confirmations"] == 1


def test_confirmation_window_ends_where_the_reference_revises():
    reference = "?. | Red. | . | . | . | Blue. | . | . | ."
    result = figures(make(reference, reference, confirmations=[CONFIRMED]))
    assert result["false_revision_rate"] == 0.0


def test_decisions_over_all_slots():
    reference = "?. | . | It is… | red. | . | . | unknown"
    model = "?. | Red. | It… | is… | red. | . | Red."
    result = figures(make(reference, model))
    # spoken by both: 2; spoken falsely: 2; both silent: 2; missed: 0; the unknown slot is not scored
    assert result["n_slots"] == 6
    assert result["speak_precision"] == pytest.approx(0.5)
    assert result["speak_recall"] == 1.0
    assert result["speak_f1"] == pytest.approx(2 / 3)
    assert result["silence_f1"] == pytest.approx(2 / 3)
    assert result["balanced_accuracy"] == pytest.approx((1.0 + 0.5) / 2)
    assert slot_errors(make(reference, model)) == [False, True, False, False, True, False, False]


def test_figures_pool_slots_not_streams():
    silent = make("?. | .", "?. | .")
    result = figures(silent, make("?. | Red.", "?. | Red."))
    assert result["speak_f1"] == 1.0
    assert result["n_streams"] == 2
    assert math.isnan(figures(silent)["speak_f1"])


def test_what_the_reference_itself_does_not_fulfil_is_left_out():
    """The reply is cut before it names the colour, so nobody can be asked for it."""
    reference = "?. | . | It is… | ?. | . | ."
    question = Question("q1", 0, "It is red.", "a1", answer_slot=2, evidence_slot=2, evidence_after=True)
    result = figures(make(reference, reference, [question]))
    assert (result["n_questions"], result["n_unscorable"]) == (0, 1)


def test_a_perfect_transcript_has_perfect_figures():
    reference = "?. | . | . | Red. | . | . | Blue. | . | . | ."
    transcript = make(
        reference,
        reference,
        [ASKED_EARLY],
        [Revision("a2", "Red.", "Blue.", 3, 6)],
        [Confirmation(8, "Blue.")],
    )
    result = figures(transcript)
    for name in ("speak_f1", "silence_f1", "balanced_accuracy", "answer_accuracy", "revision_accuracy"):
        assert result[name] == 1.0, name
    for name in ("stale_rate", "false_revision_rate", "revision_delay_frames", "n_unscorable"):
        assert result[name] == 0.0, name


def test_replies_are_put_together_from_slots():
    transcript = make("?. | A… | b… | c. | . | D… | .", "?. | A. | b. | . | c… | . | d…")
    replies = reference_utterances(transcript.slots)
    assert [(reply.text, reply.slot, reply.last_slot, reply.complete) for reply in replies] == [
        ("Abc.", 1, 3, True),
        ("D", 5, 5, False),
    ]
    assert [(reply.text, reply.complete) for reply in model_utterances(transcript.slots)] == [
        ("A.", True),
        ("b.", True),
        ("c", False),
        ("d", False),
    ]


def test_transcript_survives_json():
    import json

    transcript = make(REVISION, REVISION, [ASKED_EARLY], [REVISED], [CONFIRMED])
    assert StreamTranscript.from_json(json.loads(json.dumps(transcript.to_json()))) == transcript
