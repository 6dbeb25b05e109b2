"""Evaluation end to end on the real model: incremental equals teacher-forced, and a batch equals single streams."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scripted_model import shipped_tokenizer, world_stream
from small_model import SIZE, small_model
from world_corpus import WorldCorpus

from moss_train.data.collate import collate
from moss_train.errors import DataError, SampleError
from moss_train.evaluate.config import DecodeConfig, EvaluationConfig
from moss_train.evaluate.decoder import forbidden_tokens
from moss_train.evaluate.invariance import future_frame_deviation, invariance_figures
from moss_train.evaluate.judges import TextJudge
from moss_train.evaluate.metrics.language import frames_to_roll, language_figures, turns_of
from moss_train.evaluate.prepared import prepare_streams
from moss_train.evaluate.row_predictions import largest_deviation, predictions_at_once, predictions_in_lockstep
from moss_train.evaluate.runner import evaluate_streams, run_streams
from moss_train.evaluate.transcript import StreamTranscript
from moss_train.parallel import groups
from moss_train.streams.compiled import Kind
from moss_train.streams.config import CompilerConfig
from moss_train.streams.row import RowWriter
from moss_train.streams.sight import Sight

TOKENIZER = shipped_tokenizer()
COMPILER = CompilerConfig(tokens_per_second=6.0)


@pytest.fixture(scope="module")
def model():
    built = small_model(TOKENIZER)
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
    """Token by token as served, and rows of different lengths at once as several processes do it in lockstep."""
    streams, pictures = [], []
    for seed, scenario in enumerate(["before", "interruption", "two_questions", "silent"]):
        _, stream = world_stream(TOKENIZER, compiler, seed, scenario)
        frames = torch.randint(0, 256, (len(stream.frames), 3, SIZE, SIZE), dtype=torch.uint8)
        assert largest_deviation(model, collate([[(stream, frames)]]), stream, frames) <= 1e-5
        streams.append(stream)
        pictures.append(frames)
    found, expected = (predict(model, streams, pictures) for predict in (predictions_in_lockstep, predictions_at_once))
    for row, stream in enumerate(streams):
        one, other = (x.logits_TRV[: len(stream.ids), row] for x in (found, expected))
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


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


def silences_until_it_speaks(model, stream, slot, frames_FCHW, frames: int, threshold: float | None) -> int | None:
    """After how many further frames the model speaks, found frame by frame, a whole pass for each."""
    special = TOKENIZER.special
    ids = stream.ids[: stream.slots[slot].position + 1].tolist()
    never = torch.tensor(forbidden_tokens(TOKENIZER))
    for count in range(1, frames + 1):
        ids += [special.silence, special.anchor]
        writer = RowWriter(TOKENIZER)
        writer.untrained(ids)
        shown = ids.count(special.anchor)
        row = writer.compiled("k", "stream", stream.frames[:shown], COMPILER, Sight.of(COMPILER))
        with torch.no_grad():
            logits_V = model(collate([[(row, frames_FCHW[:shown])]]))[-1, 0, : TOKENIZER.vocabulary_size]
        logits_V = logits_V.index_fill(0, never, -torch.inf)
        silent = logits_V.argmax() == special.silence
        if threshold is not None:
            silent = logits_V.softmax(-1)[special.silence] >= threshold
        if not silent:
            return count
    return None


@pytest.mark.parametrize(("threshold", "silence"), [(None, 16.0), (6e-4, 4.0)])
def test_a_model_that_misses_a_turn_is_shown_further_frames(model, threshold, silence):
    model = small_model(TOKENIZER, silence).eval()
    corpus = WorldCorpus(12, SIZE)
    config, decode = EvaluationConfig(batch_streams=5), DecodeConfig(speak_threshold=threshold)
    prepared = prepare_streams(corpus, TOKENIZER, COMPILER)
    run = run_streams(model, prepared, TOKENIZER, config, decode)
    found = {transcript.key: transcript for transcript in run.forced}
    outcomes = set()
    for item in prepared.items:
        transcript = found[item.compiled.key]
        missed = {turn.reply.slot: turn for turn in turns_of(transcript) if turn.first_spoken(transcript) is None}
        rolled = {one.slot: one for one in transcript.rolled}
        assert rolled.keys() == {slot for slot, turn in missed.items() if frames_to_roll(transcript, turn)}
        for slot, one in rolled.items():
            frames = prepared.frames_of(transcript.key)
            expected = silences_until_it_speaks(model, item.compiled, slot, frames, one.frames, threshold)
            assert (one.frames, one.spoke_after) == (frames_to_roll(transcript, missed[slot]), expected)
            outcomes.add(one.spoke_after is None)
    assert outcomes == {True, False}, "some must speak then and some not"


def test_language_figures_are_those_of_the_training_loss(model):
    """Perplexity and correct prefixes from the compiled labels and one plain pass a stream."""
    prepared = prepare_streams(WorldCorpus(4, SIZE), TOKENIZER, COMPILER)
    run = run_streams(model, prepared, TOKENIZER, EvaluationConfig(), DecodeConfig())
    total, count, prefixes = 0.0, 0, []
    for item in prepared.items:
        stream = item.compiled
        with torch.no_grad():
            logits_TV = model(collate([[(stream, prepared.frames_of(stream.key))]]))[:, 0].double()
        log_TV = logits_TV.log_softmax(-1)
        reply = []
        for position, kind in enumerate(stream.kinds):
            if kind in (Kind.TEXT, Kind.ONSET, Kind.REVISION, Kind.STOP_SILENCE):
                label = int(stream.labels[position])
                total, count = total - float(log_TV[position, label]), count + 1
                reply.append(int(logits_TV[position].argmax()) == label)
            if kind == Kind.STOP_SILENCE or (reply and stream.ids[position] == TOKENIZER.special.end_of_turn):
                prefixes.append((reply.index(False) if False in reply else len(reply)) / len(reply))
                reply = []
    figures = language_figures(run.forced)
    assert figures["n_turns"] == len(prefixes) > 3
    assert figures["lm_ppl"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert figures["lm_correctness"] == pytest.approx(sum(prefixes) / len(prefixes))


def test_the_future_changes_nothing_and_a_leak_would_show(model):
    prepared = prepare_streams(WorldCorpus(3, SIZE), TOKENIZER, replace(COMPILER, window=4, sinks=1))
    figures = invariance_figures(model, prepared, 2)
    assert figures["future_frame_deviation"] == 0.0
    assert figures["incremental_deviation"] <= 1e-5
    stream, frames = prepared.items[0].compiled, prepared.frames_of(prepared.items[0].compiled.key)
    hidden = replace(stream, visible_hi=stream.visible_hi.copy())
    leaking = replace(stream, visible_hi=np.where(stream.visible_hi > 2, stream.visible_hi + 1, 0).clip(0, len(frames)))
    assert future_frame_deviation(model, hidden, frames) == 0.0

    class Leaking(torch.nn.Module):
        """Sees what `leaking` sees, whatever it is told."""

        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, batch):
            hi_RT = torch.from_numpy(leaking.visible_hi.astype(np.int32))[None]
            return self.inner(replace(batch, visible_hi_RT=hi_RT, visible_lo_RT=hi_RT.clamp(max=0)))

    assert future_frame_deviation(Leaking(), stream, frames) > 1e-4
