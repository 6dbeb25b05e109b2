"""Figures of hand-made transcripts against values worked out by hand. One slot a second; notation as in `made`."""

import json
import math
from dataclasses import replace

import pytest
from made import figures, make

from moss_train.errors import ConfigError
from moss_train.evaluate.judges import TextJudge, check_judge, lexical_score, load_judge, score_of
from moss_train.evaluate.metrics import figure_names, streaming_figures, teacher_forced_figures
from moss_train.evaluate.metrics.benchmarks import (
    ProbeAnswer,
    contains,
    count_in,
    letter_in,
    ovo_figures,
    pauc,
    proactive_figures,
)
from moss_train.evaluate.metrics.decisions import matched_onsets
from moss_train.evaluate.metrics.language import frames_to_roll, language_figures, turns_of
from moss_train.evaluate.metrics.replies import StreamReplies
from moss_train.evaluate.metrics.timing import lag_figures
from moss_train.evaluate.transcript import Question, Revision, RolledForward, StreamTranscript

# ---- triggers and stops


@pytest.mark.parametrize(
    ("said", "reference", "pairs"),
    [
        ([1.0, 5.0], [1.0, 5.0], [(0, 0), (1, 1)]),
        ([2.0], [1.0, 3.0], [(0, 0)]),  # one reply matches one onset
        ([1.0, 1.5], [1.0], [(0, 0)]),  # two replies, one onset: the second is surplus
        ([1.5, 2.5], [0.5, 1.5], [(0, 0), (1, 1)]),  # nearest first would match one pair only
        ([3.1], [2.0], []),
        ([], [1.0], []),
    ],
)
def test_onsets_are_matched_one_to_one(said, reference, pairs):
    assert matched_onsets(said, reference, tolerance_s=1.0) == pairs


def test_trigger_f1_and_stop_error():
    reference = "?. | A b c. | . | . | . | D. | . | E. | ."
    model = "?. | . | A b. | . | D. | . | D e f. | . | ."
    # onsets 1, 5, 7 against 2, 4, 6: all within a second; lengths 2-3, 1-1, 3-1 words
    result = figures(make(reference, model))
    assert (result["trigger_precision"], result["trigger_recall"], result["trigger_f1"]) == (1.0, 1.0, 1.0)
    assert result["stop_error_tokens"] == pytest.approx((-1 + 0 + 2) / 3)
    assert result["stop_error_abs_tokens"] == pytest.approx((1 + 0 + 2) / 3)
    strict = streaming_figures([make(reference, model)], TextJudge(), tolerance_s=0.5)
    assert strict["trigger_f1"] == 0.0 and math.isnan(strict["stop_error_tokens"])
    half = figures(make("?. | A. | . | . | . | B. | .", "?. | A. | . | B. | . | . | ."))
    assert (half["trigger_precision"], half["trigger_recall"], half["trigger_f1"]) == (0.5, 0.5, 0.5)


# ---- LiveStar, MMDuet: segments [1, 4) and [4, 8); the stream ends at 8 s

SEGMENTS = "?. | A b. | . | . | C d. | . | . | ."


@pytest.mark.parametrize(
    ("model", "tim_diff", "redundancy", "coverage"),
    [
        (SEGMENTS, 0.0, 0.0, 1.0),
        ("?. | . | A b. | . | . | C d. | . | .", (1 + 1) / 2, 0.0, 1.0),
        ("?. | . | . | . | . | . | . | .", (3 + 4) / 2, 1.0, 0.0),  # the segments' own lengths
        ("?. | A b. | A b. | A b. | . | . | . | .", (0 + 4) / 2, (2 + 1) / 2, 0.5),
        ("?x. | . | . | . | C d. | . | . | .", (3 + 0) / 2, (1 + 0) / 2, 0.5),  # the first is in no segment
    ],
)
def test_segments(model, tim_diff, redundancy, coverage):
    result = figures(replace(make(SEGMENTS, model), end_s=7.0))
    # seven frames, 0 to 6 s, after the header's slot: onsets at 0 s and 3 s, the end at 7 s
    assert result["tim_diff_s"] == pytest.approx(tim_diff)
    assert result["redundancy"] == pytest.approx(redundancy)
    assert result["coverage"] == pytest.approx(coverage)


def test_in_span_score_and_pauc():
    # "A b." for "A b." is 5; "A x." shares one of two words: F1 = 2·1/(2+2) = 0.5, so 1 + 4·0.5 = 3
    transcript = replace(make(SEGMENTS, "?x. | . | A x. | A b. | . | . | . | ."), end_s=7.0)
    result = figures(transcript)
    assert result["in_span_score"] == pytest.approx(((3 + 5) / 2 + 1) / 2)
    # first span, 3 s: 0.5 for a second, then 3 - 1 = 2, then 5 - 1 = 4: 6.5 of 3·4; second: 0.5 throughout, 1/8
    assert result["pauc"] == pytest.approx((6.5 / 12 + 0.5 / 4) / 2)
    assert result["out_of_span_rate"] == pytest.approx(1 / 3)


def test_pauc_keeps_the_best_score():
    assert pauc([], 10.0) == pytest.approx(0.125)
    assert pauc([(0.0, 5.0)], 10.0) == 1.0
    assert pauc([(5.0, 5.0), (7.0, 1.0)], 10.0) == pytest.approx((5 * 0.5 + 5 * 4) / 40)
    assert pauc([(0.0, 1.0)], 10.0) == pytest.approx(0.125)  # the worst score is below the start


def test_scores():
    assert lexical_score("A b.", "a B") == 5.0 and lexical_score("", "a") == lexical_score("", "") == 1.0
    assert lexical_score("red red", "red") == pytest.approx(1 + 4 * 2 / 3)  # one of the two counts

    class Strict(TextJudge):
        def score(self, said, reference):
            return 2.0

    assert score_of(Strict(), "x", "x") == 2.0 and score_of(TextJudge(), "x", "X!") == 5.0


# ---- answers in seconds, restatements

ASKED = Question("q1", 0, "Red.", "a1", answer_slot=3, evidence_slot=2, evidence_after=True)


def test_latencies_count_from_the_evidence():
    reference = "?. | . | . | Red. | . | . | Blue. | . | ."
    model = "?. | . | . | . | Red. | . | . | Blue. | ."
    revision = Revision("a2", "Red.", "Blue.", 3, 5)
    result = figures(make(reference, model, [ASKED], [revision]))
    assert result["answer_latency_s"] == 2.0  # evidence at slot 2, said in slot 4
    assert result["revision_latency_s"] == 2.0 and result["revision_delay_frames"] == 2
    asked_late = replace(ASKED, asked_slot=3, evidence_slot=1, evidence_after=False)
    late = figures(make("?. | . | . | ?Red. | . | . | .", "?. | . | . | ?. | Red. | . | .", [asked_late]))
    assert late["answer_latency_s"] == 1.0  # from the question, since its evidence was before


def test_restated_answers():
    reference = "?. | Red. | . | . | ?. | . | ."
    result = figures(make(reference, "?. | Red. | Red. | Blue. | ?. | Blue. | ."))
    assert result["restate_rate"] == pytest.approx(1 / 4)  # the second Red; Blue answers another turn
    assert math.isnan(figures(make(reference, "?. | . | . | . | ?. | . | ."))["restate_rate"])


# ---- StreamingBench: the ground truth speaks at frame 4, which is second 4


@pytest.mark.parametrize(
    ("model", "time", "right"),
    [
        ("?. | . | . | . | . | Red. | . | . | . | . | .", 1, 1),
        ("?. | . | . | . | . | . | . | It is red. | . | . | .", 1, 1),  # two seconds late, says more
        ("?. | . | . | . | . | . | . | . | Red. | . | .", 0, 0),  # three late
        ("?. | . | . | Red. | . | . | . | . | . | . | .", 1, 1),  # two early
        ("?. | . | Red. | . | . | Red. | . | . | . | . | .", 0, 0),  # the first one counts
        ("?. | . | . | . | . | Blue. | . | . | . | . | .", 1, 0),
        ("?. | . | . | . | . | . | . | . | . | . | .", 0, 0),
    ],
)
def test_proactive_output(model, time, right):
    question = Question("q", 0, "Red.", "a1", answer_slot=5, evidence_slot=5, evidence_after=True)
    result = figures(make("?. | . | . | . | . | Red. | . | . | . | . | .", model, [question]))
    assert (result["proactive_time_accuracy"], result["proactive_accuracy"]) == (time, right)


def test_polls_find_a_reply_at_the_next_whole_second():
    question = Question("q", 0, "Red.", "a1", answer_slot=3, evidence_slot=3, evidence_after=True)
    transcript = make("?. | . | . | Red. | . | . | .", "?. | . | . | . | . | . | Red.", [question])
    times = [0.0, 0.0, 0.5, 1.0, 1.5, 2.5, 3.5]  # the answer is due at 1 s, said at 3.5 s, found at 4 s
    slots = tuple(replace(slot, time_s=time) for slot, time in zip(transcript.slots, times, strict=True))
    stream = StreamReplies.of(replace(transcript, slots=slots))
    assert proactive_figures([stream], poll_s=1.0)["proactive_time_accuracy"] == 0.0
    slots = tuple(replace(slot, time_s=min(slot.time_s, 2.6)) for slot in slots)  # said at 2.6 s, found at 3 s
    stream = StreamReplies.of(replace(transcript, slots=slots))
    assert proactive_figures([stream], poll_s=1.0)["proactive_time_accuracy"] == 1.0


def test_contained_words():
    assert contains("It is RED, now", "red now") and contains("red", "Red.")
    assert not contains("It is redder", "red") and not contains("now red", "red now") and not contains("x", "")


# ---- OVO-Bench


def test_ovo_means_tasks_then_categories():
    said = [
        ("EPM", "B. a cat", "B"), ("EPM", "The answer is (A)", "B"), ("ASI", "C", "C"),
        ("OCR", "a b", "A"), ("REC", "There were three.", "3"), ("REC", "4", "3"), ("SSR", "No, not yet", "no"),
        ("CRR", "maybe", "yes"),
    ]  # fmt: skip
    result = ovo_figures([ProbeAnswer(str(k), *row) for k, row in enumerate(said)])
    assert result["ovo_epm"] == 0.5 and result["ovo_asi"] == 1.0 and math.isnan(result["ovo_hld"])
    assert result["ovo_backward"] == 0.75
    assert result["ovo_realtime"] == 0.0  # only OCR was asked
    assert (result["ovo_rec"], result["ovo_ssr"], result["ovo_crr"]) == (0.5, 1.0, 0.0)
    assert result["ovo_forward"] == 0.5 and result["ovo_total"] == pytest.approx((0.75 + 0.0 + 0.5) / 3)
    assert result["n_probes"] == 8 and math.isnan(ovo_figures([])["ovo_total"])


def test_letters_and_numbers_are_read_from_answers():
    assert [letter_in(said) for said in ("B", "(C) x", "Answer: D.", "a cat", "")] == ["B", "C", "D", None, None]
    assert [count_in(said) for said in ("3 times", "Twice? two", "none", "it is 12.")] == [3, 2, None, 12]


# ---- VideoLLM-online. One turn: decisions at the header and frames 0 to 3, then a reply of 3 labels; N_v = 5

TURN = "?. | . | . | . | A b. | . | . | . | ."


def forced(model: str, right: int, rolled: tuple[int, int | None] | None = None, nll: float = 3.0):
    """The turn, `right` of its 3 labels right from the first on; rolled forward: (frames, spoke after)."""
    transcript = make(TURN, model)
    slots = list(transcript.slots)
    slots[4] = replace(slots[4], labels=3, labels_right=right, labels_nll=nll)
    missed = () if rolled is None else (RolledForward(4, *rolled),)
    return replace(transcript, slots=tuple(slots), rolled=missed)


@pytest.mark.parametrize(
    ("model", "right", "rolled", "seconds", "fluency"),
    [
        (TURN, 3, None, 0.0, (5 + 3) / 8),  # on time, all right
        (TURN, 1, None, 0.0, (5 + 1) / 8),  # on time, wrong after the first word
        ("?. | . | x. | . | A b. | . | . | . | .", 3, None, 2.0, (5 - 2) / 8),  # two decisions early
        ("?x. | . | . | . | A b. | . | . | . | .", 3, None, 3.0, (5 - 4) / 8),  # in the header, at 0 s
        ("?. | . | . | . | . | . | . | . | .", 3, (4, 2), 2.0, (5 - 1) / 8),  # two frames late
        ("?. | . | . | . | . | . | . | . | .", 3, (4, None), 4.0, (5 - 1) / 8),  # not even then
        ("?. | . | . | . | . | . | . | . | .", 3, None, 0.0, (5 + 3) / 8),  # nothing left to show: as coded
    ],
)
def test_time_diff_and_fluency(model, right, rolled, seconds, fluency):
    result = language_figures([forced(model, right, rolled)])
    assert result["time_diff_s"] == seconds
    assert result["fluency"] == pytest.approx(fluency)
    assert result["lm_correctness"] == pytest.approx(right / 3)
    assert result["lm_ppl"] == pytest.approx(math.e)  # 3 nats over 3 labels
    assert result["n_turns"] == 1


def test_perplexity_pools_labels_and_correctness_means_turns():
    result = language_figures([forced(TURN, 3, nll=0.0), forced(TURN, 0, nll=6.0)])
    assert result["lm_ppl"] == pytest.approx(math.exp(6 / 6)) and result["lm_correctness"] == 0.5


def test_a_reply_over_several_slots_is_right_up_to_its_first_wrong_label():
    transcript = make("?. | A… | b… | c. | .", "?. | A… | b… | c. | .")
    counts = {1: (2, 2, 1.0), 2: (2, 1, 1.0), 3: (3, 3, 1.0)}
    slots = tuple(
        replace(slot, labels=counts[k][0], labels_right=counts[k][1], labels_nll=counts[k][2]) if k in counts else slot
        for k, slot in enumerate(transcript.slots)
    )
    result = language_figures([replace(transcript, slots=slots)])
    assert result["lm_correctness"] == pytest.approx(3 / 7)
    assert result["lm_ppl"] == pytest.approx(math.exp(3 / 7))
    assert result["fluency"] == pytest.approx((2 + 3) / (2 + 7))


def test_frames_that_a_late_model_is_shown():
    labelled = forced(TURN, 3)
    (turn,) = turns_of(labelled)
    assert turn.decisions == (0, 1, 2, 3, 4)
    assert frames_to_roll(labelled, turn) == 4  # as many as the turn has decisions, less one, and there are
    reference = "?. | . | . | A. | . | B. | . | ?. | C. | ."
    transcript = make(reference, reference)
    slots = tuple(replace(slot, labels=1) if slot.reference_speaks else slot for slot in transcript.slots)
    transcript = replace(transcript, slots=slots)
    first, second, third = turns_of(transcript)
    assert (first.decisions, second.decisions, third.decisions) == ((0, 1, 2, 3), (4, 5), (6, 7, 8))
    assert frames_to_roll(transcript, first) == 2  # up to where the next reply is due
    assert frames_to_roll(transcript, second) == 1  # one: a turn of two decisions
    assert frames_to_roll(transcript, third) == 1  # only one frame is left


def test_unknown_slots_are_no_decisions_and_unlearned_replies_no_turns():
    transcript = make("?. | unknown | . | A. | .", "?. | . | . | A. | .")
    assert list(turns_of(transcript)) == []
    slots = tuple(replace(slot, labels=2) if slot.reference_speaks else slot for slot in transcript.slots)
    (turn,) = turns_of(replace(transcript, slots=slots))
    assert turn.decisions == (0, 2, 3)


# ---- live


def test_emission_lag_and_its_growth():
    transcript = make("?. | A. | . | B. | .", "?. | A. | . | B. | .")
    assert all(math.isnan(value) for value in lag_figures([transcript]).values())
    slots = list(transcript.slots)
    slots[1], slots[3] = replace(slots[1], emitted_s=0.25), replace(slots[3], emitted_s=2.75)  # at 0 s and 2 s
    result = lag_figures([replace(transcript, slots=tuple(slots))])
    assert result["emission_lag_s"] == 0.5 and result["emission_lag_growth"] == 0.25


# ---- all together


def test_names_tell_what_an_evaluation_measures():
    names = figure_names()
    assert len(names) == len(set(names))
    for name in (
        "speak_f1",
        "trigger_f1",
        "pauc",
        "teacher_forced/lm_ppl",
        "teacher_forced/speak_f1",
        "offline_accuracy",
    ):
        assert name in names
    assert "lm_ppl" not in names  # free-running there is no such thing


def test_a_perfect_transcript_reaches_the_best_of_everything():
    reference = "?. | . | . | Red. | . | . | Blue. | . | . | ."
    transcript = make(reference, reference, [ASKED], [Revision("a2", "Red.", "Blue.", 3, 6)])
    slots = tuple(
        replace(slot, labels=2, labels_right=2, labels_nll=0.0) if slot.reference_speaks else slot
        for slot in transcript.slots
    )
    result = teacher_forced_figures([replace(transcript, slots=slots)], TextJudge())
    for name in "trigger_f1 coverage pauc fluency lm_correctness lm_ppl proactive_accuracy speak_f1".split():
        assert result[name] == 1.0, name
    for name in "stop_error_tokens stop_error_abs_tokens redundancy tim_diff_s time_diff_s restate_rate".split():
        assert result[name] == 0.0, name
    assert result["in_span_score"] == 5.0


def test_new_fields_survive_json():
    transcript = replace(forced(TURN, 2, (4, None)), end_s=8.0)
    assert StreamTranscript.from_json(json.loads(json.dumps(transcript.to_json()))) == transcript


class Lenient:
    def same_answer(self, said, reference):
        return True


def test_judges_of_ones_own():
    assert load_judge(f"{__name__}:Lenient").same_answer("a", "b")
    for name, message in (
        ("fair", "legal values are text, world"), ("a:", "legal values"), ("no.such:Judge", "No module named 'no'"),
        ("json:Judge", "no attribute 'Judge'"), ("json:JSONDecoder", "has no method same_answer"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            load_judge(name)
    check_judge("no.such:Judge")  # its form is right; more is seen when it is loaded
