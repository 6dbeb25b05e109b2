"""Questions, revisions and confirmations found in samples, with and without the world's notes."""

import pytest
from scripted_model import compiled_stream, shipped_tokenizer, world_stream

from moss_train.data.synthetic.judge import WorldJudge
from moss_train.errors import ConfigError, SampleError
from moss_train.evaluate.judges import TextJudge, load_judge
from moss_train.evaluate.metrics import streaming_figures
from moss_train.evaluate.schedule import read_stream
from moss_train.streams.config import CompilerConfig

TOKENIZER = shipped_tokenizer()
COMPILER = CompilerConfig(tokens_per_second=8.0)


def test_every_item_of_the_world_can_be_fulfilled():
    transcripts = []
    for seed in range(120):
        sample, compiled = world_stream(TOKENIZER, COMPILER, seed)
        transcripts.append(read_stream(sample, compiled, COMPILER, TOKENIZER)[1])
    figures = streaming_figures([transcript.as_reference() for transcript in transcripts], WorldJudge())
    for name in ("speak_f1", "silence_f1", "answer_accuracy", "answer_accuracy_evidence_after", "revision_accuracy"):
        assert figures[name] == 1.0, name
    for name in ("stale_rate", "false_revision_rate", "revision_delay_frames", "n_unscorable"):
        assert figures[name] == 0.0, name
    for name in ("n_questions", "n_answers", "n_revisions", "n_confirmations"):
        assert figures[name] > 30, name
    silent = streaming_figures(transcripts, WorldJudge())
    assert silent["answer_accuracy"] == silent["revision_accuracy"] == silent["speak_f1"] == 0.0
    assert silent["false_revision_rate"] == 0.0


SAMPLE = {
    "schema": "moss_train/stream@1",
    "id": "plain",
    "media": [{"id": "v", "kind": "video", "member": "mp4", "duration_s": 9.0}],
    "sampling": {"start_s": 0.0, "end_s": 9.0},
    "events": [
        {"id": "u1", "t": 0.0, "role": "user", "text": "What is he building?"},
        {
            "id": "b1",
            "t": 3.0,
            "role": "assistant",
            "kind": "speak",
            "text": "A tractor.",
            "reply_to": "u1",
            "evidence": [2.0, 3.0],
        },
        {"id": "u2", "t": 4.5, "role": "user", "text": "Which colour?"},
        {
            "id": "b2",
            "t": 5.0,
            "role": "assistant",
            "kind": "speak",
            "text": "Red.",
            "reply_to": "u2",
            "evidence": [1.0, 5.0],
        },
        {
            "id": "b3",
            "t": 7.0,
            "role": "assistant",
            "kind": "revise",
            "text": "Two tractors.",
            "supersedes": "b1",
            "evidence": [6.0, 7.0],
        },
        {"id": "c1", "t": 8.0, "role": "assistant", "kind": "confirm", "confirms": "b3"},
    ],
}


def test_items_of_a_sample_without_notes_come_from_its_events():
    sample, compiled = compiled_stream(SAMPLE, TOKENIZER, COMPILER)
    schedule, transcript = read_stream(sample, compiled, COMPILER, TOKENIZER)
    assert schedule.frames == 9
    # slots: the opening turn, frames 0 to 4, the second turn, frames 5 to 8
    first, second = transcript.questions
    assert (first.asked_slot, first.evidence_slot, first.answer_slot, first.evidence_after) == (0, 3, 4, True)
    assert (second.asked_slot, second.evidence_slot, second.answer_slot, second.evidence_after) == (6, 2, 7, False)
    (revision,) = transcript.revisions
    assert (revision.old, revision.new) == ("A tractor.", "Two tractors.")
    assert (revision.since_slot, revision.evidence_slot) == (4, 9)
    (confirmation,) = transcript.confirmations  # at the frame of 8 s
    assert (confirmation.slot, confirmation.answer) == (10, "Two tractors.")
    assert [(turn.text, turn.slot) for turn in transcript.turns] == [("What is he building?", 0), ("Which colour?", 6)]
    figures = streaming_figures([transcript.as_reference()], TextJudge())
    assert figures["answer_accuracy"] == figures["revision_accuracy"] == 1.0
    assert figures["false_revision_rate"] == 0.0


def test_other_kinds_and_other_configurations_are_refused():
    sample, compiled = compiled_stream(SAMPLE, TOKENIZER, COMPILER)
    talk = {
        "schema": "moss_train/conversation@1",
        "id": "talk",
        "media": [],
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],
    }
    with pytest.raises(SampleError, match="only streams"):
        read_stream(*compiled_stream(talk, TOKENIZER, COMPILER), COMPILER, TOKENIZER)
    other = {**SAMPLE, "events": SAMPLE["events"][:2]}
    with pytest.raises(SampleError, match="another configuration"):
        read_stream(compiled_stream(other, TOKENIZER, COMPILER)[0], compiled, COMPILER, TOKENIZER)


def test_judges_by_name():
    assert load_judge("text").same_answer("It is RED!", "it is red")
    assert not load_judge("text").same_answer("Now red.", "Red.")
    assert not load_judge("text").same_answer("", "")
    assert load_judge("world").same_answer("Now red.", "Red.")
    with pytest.raises(ConfigError, match="text, world"):
        load_judge("mine")
