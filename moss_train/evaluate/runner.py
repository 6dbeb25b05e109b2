"""All streams of a corpus: free-running and teacher-forced, batched, with figures of both.

Shape suffixes: F frames of a stream, C colour channels, H, W pixels.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from moss_train.data.collate import collate
from moss_train.errors import DataError, SampleError
from moss_train.evaluate.config import DecodeConfig, EvaluationConfig
from moss_train.evaluate.decoder import SlotOutput, StreamingDecoder, most_tokens
from moss_train.evaluate.judges import Judge
from moss_train.evaluate.metrics import streaming_figures
from moss_train.evaluate.schedule import Schedule, read_stream
from moss_train.evaluate.teacher_forced import teacher_forced_transcripts
from moss_train.evaluate.transcript import StreamTranscript
from moss_train.parallel.phases import beat
from moss_train.streams.compiled import CompiledStream, FrameRequest
from moss_train.streams.compiler import compile_sample
from moss_train.streams.config import CompilerConfig
from moss_train.streams.media import MediaInfo
from moss_train.streams.schema import Sample, StreamSample
from moss_train.streams.tokenizer import StreamTokenizer

_LOGIT_BYTES = 512 * 2**20  #: bound of the float32 logits of one teacher-forced pass


class Corpus(Protocol):
    """What evaluation reads of a packed source, sample by sample; `moss_train.data.corpus` has the real one."""

    def __len__(self) -> int: ...

    def key(self, number: int) -> str: ...

    def sample(self, number: int) -> Sample: ...

    def media_info(self, number: int) -> dict[str, MediaInfo]: ...

    def frames(self, number: int, requests: Sequence[FrameRequest]) -> torch.Tensor: ...


@dataclass(frozen=True)
class EvaluationResult:
    """Figures by the names of design §7, and what they were made from."""

    figures: dict[str, float]  #: free-running
    teacher_forced: dict[str, float]
    transcripts: list[StreamTranscript]  #: free-running, in the order of the corpus
    teacher_forced_transcripts: list[StreamTranscript]
    skipped: dict[str, str]  #: key → why the sample could not be evaluated; also counted in `n_skipped`


@dataclass(frozen=True)
class _Loaded:
    """One stream, ready to be run."""

    compiled: CompiledStream
    schedule: Schedule
    transcript: StreamTranscript
    frames_FCHW: torch.Tensor


def evaluate_streams(
    model: Any,
    corpus: Corpus,
    tokenizer: StreamTokenizer,
    compiler: CompilerConfig,
    judge: Judge,
    config: EvaluationConfig | None = None,
    decode: DecodeConfig | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Run every stream of `corpus` through `model`; samples of other kinds are left out.

    The model is put into evaluation mode and back. Nothing is drawn at random (jitter, windows, augmentations),
    whatever `compiler` says: every model is asked the same. A sample that does not compile or decode is left out and
    listed in the result.
    `on_progress(done, total)` is called after each batch.
    Raises DataError when the corpus holds no stream that can be evaluated.
    """
    config, decode = config or EvaluationConfig(), decode or DecodeConfig()
    config.validate()
    decode.validate()
    compiler = compiler.plain()
    skipped: dict[str, str] = {}
    prepared = _prepare(corpus, tokenizer, compiler, config.limit, skipped)
    was_training = model.training
    model.eval()
    free: dict[str, StreamTranscript] = {}
    forced: dict[str, StreamTranscript] = {}
    seconds = {"free_running": 0.0, "teacher_forced": 0.0}
    try:
        for streams in _batches(prepared, corpus, config.batch_streams, skipped):
            started = time.perf_counter()
            for transcript in free_running(model, streams, tokenizer, compiler, decode):
                free[transcript.key] = transcript
            seconds["free_running"] += time.perf_counter() - started
            started = time.perf_counter()
            for transcript in _teacher_forced(model, streams, tokenizer):
                forced[transcript.key] = transcript
            seconds["teacher_forced"] += time.perf_counter() - started
            if on_progress is not None:
                on_progress(len(free), len(prepared))
    finally:
        model.train(was_training)
    if not free:
        key, reason = next(iter(skipped.items()))
        raise DataError(f"not one stream can be evaluated; the first, {key!r}: {reason}")
    order = [stream.compiled.key for stream in prepared if stream.compiled.key in free]
    transcripts, forced_transcripts = [free[key] for key in order], [forced[key] for key in order]

    def figures(of: list[StreamTranscript], part: str) -> dict[str, float]:
        more = {"n_skipped": len(skipped), "evaluation_seconds": seconds[part]}
        return streaming_figures(of, judge, config.window_frames) | more

    return EvaluationResult(
        figures=figures(transcripts, "free_running"),
        teacher_forced=figures(forced_transcripts, "teacher_forced"),
        transcripts=transcripts,
        teacher_forced_transcripts=forced_transcripts,
        skipped=skipped,
    )


@dataclass(frozen=True)
class _Prepared:
    """One stream before its pictures are read."""

    number: int
    compiled: CompiledStream
    schedule: Schedule
    transcript: StreamTranscript


def _prepare(
    corpus: Corpus, tokenizer: StreamTokenizer, compiler: CompilerConfig, limit: int | None, skipped: dict[str, str]
) -> list[_Prepared]:
    prepared: list[_Prepared] = []
    for number in range(len(corpus)):
        if limit is not None and len(prepared) == limit:
            break
        beat()
        try:
            sample = corpus.sample(number)
            if isinstance(sample, StreamSample):
                compiled = compile_sample(sample, corpus.media_info(number), tokenizer, compiler)
                prepared.append(_Prepared(number, compiled, *read_stream(sample, compiled, compiler, tokenizer)))
        except SampleError as error:
            skipped[corpus.key(number)] = error.reason
    if not prepared and not skipped:
        raise DataError("the source holds no stream to evaluate: name one with samples of schema moss_train/stream@1")
    return prepared


def _batches(
    prepared: Sequence[_Prepared], corpus: Corpus, size: int, skipped: dict[str, str]
) -> Iterator[list[_Loaded]]:
    """Streams of similar length together, the longest first, so that memory runs out at once or never."""
    ordered = sorted(prepared, key=lambda stream: (-len(stream.schedule.steps), -len(stream.compiled.ids)))
    for start in range(0, len(ordered), size):
        batch = []
        for stream in ordered[start : start + size]:
            compiled = stream.compiled
            beat()
            try:
                frames_FCHW = corpus.frames(stream.number, compiled.frames)
                batch.append(_Loaded(compiled, stream.schedule, stream.transcript, frames_FCHW))
            except SampleError as error:
                skipped[compiled.key] = error.reason
        if batch:
            yield batch


def free_running(
    model: Any,
    streams: Sequence[_Loaded],
    tokenizer: StreamTokenizer,
    compiler: CompilerConfig,
    decode: DecodeConfig,
) -> list[StreamTranscript]:
    """The streams side by side, the model hearing itself; their transcripts in the same order."""
    decoder = StreamingDecoder(
        model,
        tokenizer,
        compiler,
        [stream.schedule.system for stream in streams],
        max(most_tokens(stream.schedule, tokenizer, compiler, decode) for stream in streams),
        max(stream.schedule.frames for stream in streams),
        decode,
    )
    outputs: list[list[SlotOutput]] = [[] for _ in streams]
    shown = [0] * len(streams)
    for index in range(max(len(stream.schedule.steps) for stream in streams)):
        beat()
        steps = {
            row: stream.schedule.steps[index]
            for row, stream in enumerate(streams)
            if index < len(stream.schedule.steps)
        }
        pictures = {}
        for row, step in steps.items():
            if step.user is None:
                pictures[row] = streams[row].frames_FCHW[shown[row]]
                shown[row] += 1
        for row, output in decoder.step(steps, pictures).items():
            outputs[row].append(output)
    return [fill_transcript(stream.transcript, said, tokenizer) for stream, said in zip(streams, outputs, strict=True)]


def fill_transcript(
    transcript: StreamTranscript, outputs: Sequence[SlotOutput], tokenizer: StreamTokenizer
) -> StreamTranscript:
    """The transcript with the model's side as it was decoded."""
    slots = tuple(
        replace(
            slot,
            state=output.state,
            text=tokenizer.decode(output.ids) if output.ids else "",
            ends=output.ends,
            silence_probability=output.silence_probability,
        )
        for slot, output in zip(transcript.slots, outputs, strict=True)
    )
    return replace(transcript, slots=slots, notes={"tokens": sum(len(output.ids) for output in outputs)})


def _teacher_forced(model: Any, streams: Sequence[_Loaded], tokenizer: StreamTokenizer) -> list[StreamTranscript]:
    longest = max(len(stream.compiled.ids) for stream in streams)
    rows = max(1, _LOGIT_BYTES // (4 * longest * tokenizer.vocabulary_size))
    finished = []
    for start in range(0, len(streams), rows):
        beat()
        part = streams[start : start + rows]
        batch = collate([[(stream.compiled, stream.frames_FCHW)] for stream in part])
        compiled = [stream.compiled for stream in part]
        finished += teacher_forced_transcripts(model, batch, compiled, [s.transcript for s in part], tokenizer)
    return finished
