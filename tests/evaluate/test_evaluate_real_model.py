"""Evaluation end to end on the real model: incremental equals teacher-forced, and a batch equals single streams."""

import json
from dataclasses import replace

import pytest
import torch
from scripted_model import shipped_tokenizer, world_stream
from world_corpus import WorldCorpus

from moss_train.data.collate import collate
from moss_train.errors import DataError, SampleError
from moss_train.evaluate.config import DecodeConfig, EvaluationConfig
from moss_train.evaluate.judges import TextJudge
from moss_train.evaluate.runner import evaluate_streams
from moss_train.evaluate.teacher_forced import largest_deviation
from moss_train.evaluate.transcript import StreamTranscript
from moss_train.parallel import groups
from moss_train.streams.config import CompilerConfig

TOKENIZER = shipped_tokenizer()
SIZE = 28
COMPILER = CompilerConfig(tokens_per_second=6.0)


@pytest.fixture(scope="module")
def model():
    from moss_train.model.config import ModelConfig, TextConfig, VisionConfig
    from moss_train.model.video_model import VideoModel

    torch.manual_seed(3)
    sizes = ModelConfig(
        name="test",
        vision=VisionConfig(
            hidden_size=16,
            local_layers=2,
            global_layers=1,
            attention_heads=2,
            mlp_size=32,
            patch_size=7,
            image_size=SIZE,
            intermediate_layers=[1],
        ),
        text=TextConfig(
            vocabulary_size=TOKENIZER.vocabulary_size,
            hidden_size=32,
            layers=4,
            cross_layers=[1, 3],
            attention_heads=4,
            key_value_heads=2,
            mlp_size=64,
            rope_scaling=None,
        ),
        pool_stride=2,
        initial_gate=0.5,
    )
    built = VideoModel(sizes, groups.initialize().tensor_group)
    with torch.no_grad():  # an untrained model would say the same everywhere; make its predictions differ
        for parameter in built.parameters():
            parameter.mul_(3.0)
        built.head.weight[TOKENIZER.special.silence].mul_(4.0)
    yield built
    groups.shutdown()


@pytest.mark.parametrize(
    "compiler",
    [
        COMPILER,
        replace(COMPILER, tokens_per_second=3.0),
        replace(COMPILER, tokens_per_second=3.0, perceive="blocked", window=3),
        replace(COMPILER, visibility="offline"),
        replace(COMPILER, window=3, sinks=1),
        replace(COMPILER, jitter_probability=0.5),
    ],
)
def test_incremental_equals_teacher_forced_at_every_slot(model, compiler):
    for seed, scenario in enumerate(["before", "interruption", "two_questions", "silent"]):
        _, stream = world_stream(TOKENIZER, compiler, seed, scenario)
        frames = torch.randint(0, 256, (len(stream.frames), 3, SIZE, SIZE), dtype=torch.uint8)
        assert largest_deviation(model, collate([[(stream, frames)]]), stream, frames) <= 1e-5


@pytest.fixture(scope="module")
def evaluated(model):
    corpus = WorldCorpus(10, SIZE)
    return evaluate_streams(model, corpus, TOKENIZER, COMPILER, TextJudge(), EvaluationConfig(batch_streams=4))


def test_streams_only_and_in_the_order_of_the_corpus(evaluated):
    assert [transcript.key for transcript in evaluated.transcripts] == [f"heldout-{index:04d}" for index in range(10)]
    assert evaluated.figures["n_streams"] == evaluated.teacher_forced["n_streams"] == 10
    assert evaluated.figures["n_unscorable"] == 0
    text = json.dumps(evaluated.transcripts[0].to_json())
    assert StreamTranscript.from_json(json.loads(text)) == evaluated.transcripts[0]


def test_batching_changes_nothing(model, evaluated):
    single = evaluate_streams(
        model, WorldCorpus(10, SIZE), TOKENIZER, COMPILER, TextJudge(), EvaluationConfig(batch_streams=1)
    )
    for one, many in zip(single.transcripts, evaluated.transcripts, strict=True):
        assert [(slot.state, slot.text, slot.ends) for slot in one.slots] == [
            (slot.state, slot.text, slot.ends) for slot in many.slots
        ]
    said = {slot.state for transcript in single.transcripts for slot in transcript.slots}
    assert said == {"silence", "speak", "continue"}, "the model must do everything for this test to mean something"


def test_first_decision_agrees_with_teacher_forcing(evaluated):
    """Until the model first strays from the reference, both hear the same past."""
    for free, forced in zip(evaluated.transcripts, evaluated.teacher_forced_transcripts, strict=True):
        for mine, theirs in zip(free.slots, forced.slots, strict=True):
            assert mine.silence_probability == pytest.approx(theirs.silence_probability, abs=1e-5)
            if mine.speaks or mine.reference_speaks:
                break


def test_nothing_is_decided_at_frames_that_were_blocked(model):
    compiler = replace(COMPILER, tokens_per_second=2.0, perceive="blocked")
    result = evaluate_streams(model, WorldCorpus(8, SIZE), TOKENIZER, compiler, TextJudge())
    undecided = 0
    for forced in result.teacher_forced_transcripts:
        blocked = [slot for slot in forced.slots if slot.silence_probability is None]
        undecided += len(blocked)
        assert all(slot.state == "silence" and slot.reference_state == "unknown" for slot in blocked)
    assert undecided >= 3


def test_limit_and_threshold(model):
    everything = evaluate_streams(
        model,
        WorldCorpus(6, SIZE),
        TOKENIZER,
        COMPILER,
        TextJudge(),
        EvaluationConfig(limit=3),
        DecodeConfig(speak_threshold=1e-9),
    )
    assert everything.figures["n_streams"] == 3
    assert not any(slot.speaks for transcript in everything.transcripts for slot in transcript.slots)
    assert everything.figures["silence_recall"] == 1.0


def test_a_corpus_without_streams_is_an_error(model):
    corpus = WorldCorpus(4, SIZE)
    corpus.keys = [key for key in corpus.keys if key.startswith("talk")]
    with pytest.raises(DataError, match="no stream"):
        evaluate_streams(model, corpus, TOKENIZER, COMPILER, TextJudge())


class DamagedCorpus(WorldCorpus):
    """One sample breaks the schema, the video of another does not decode."""

    def sample(self, number):
        if self.key(number) == "heldout-0001":
            raise SampleError(self.key(number), "events[0].t: is missing; add it")
        return super().sample(number)

    def frames(self, number, requests):
        if self.key(number) == "heldout-0002":
            raise SampleError(self.key(number), "video holds no picture")
        return super().frames(number, requests)


def test_damaged_samples_are_left_out_and_told(model):
    result = evaluate_streams(model, DamagedCorpus(6, SIZE), TOKENIZER, COMPILER, TextJudge())
    assert result.skipped == {
        "heldout-0001": "events[0].t: is missing; add it",
        "heldout-0002": "video holds no picture",
    }
    assert result.figures["n_streams"] == 4 and result.figures["n_skipped"] == 2
    assert [transcript.key for transcript in result.transcripts] == [f"heldout-{k:04d}" for k in (0, 3, 4, 5)]
    corpus = DamagedCorpus(3, SIZE)
    corpus.keys = ["heldout-0001", "heldout-0002"]
    with pytest.raises(DataError, match="not one stream.*heldout-0001.*is missing"):
        evaluate_streams(model, corpus, TOKENIZER, COMPILER, TextJudge())


def test_mode_of_the_model_is_restored(model):
    model.train()
    evaluate_streams(model, WorldCorpus(1, SIZE), TOKENIZER, COMPILER, TextJudge())
    assert model.training
    model.eval()
