"""All streams of a corpus: free-running and teacher-forced, batched, with figures of both.

`run_streams` runs one process's share of the streams, `result_of` makes figures of all shares; on one process
`evaluate_streams` does both. Shape suffixes: F frames of a stream, C colour channels, H, W pixels.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from moss_train.evaluate.config import DecodeConfig, EvaluationConfig
from moss_train.evaluate.decoder import SlotOutput, StreamingDecoder, most_tokens
from moss_train.evaluate.judges import Judge
from moss_train.evaluate.metrics import streaming_figures, teacher_forced_figures
from moss_train.evaluate.prepared import Corpus, PreparedCorpus, PreparedStream, Share, prepare_streams
from moss_train.evaluate.row_predictions import predictions_at_once, predictions_in_lockstep
from moss_train.evaluate.teacher_forced import missed_turns, rolled_forward, teacher_forced_transcripts
from moss_train.evaluate.transcript import StreamTranscript
from moss_train.model.predictions import Predictions
from moss_train.parallel.phases import beat
from moss_train.streams.compiled import CompiledStream
from moss_train.streams.config import CompilerConfig
from moss_train.streams.tokenizer import StreamTokenizer

_LOGIT_BYTES = 512 * 2**20  #: bound of the float32 logits of one teacher-forced pass


@dataclass(frozen=True)
class EvaluationResult:
    """Figures by the names of design §7, and what they were made from."""

    figures: dict[str, float]  #: free-running
    teacher_forced: dict[str, float]
    transcripts: list[StreamTranscript]  #: free-running, in the order of the corpus
    teacher_forced_transcripts: list[StreamTranscript]
    skipped: dict[str, str]  #: key → why the sample could not be evaluated; also counted in `n_skipped`


@dataclass
class StreamsRun:
    """What one process found about its share of the streams."""

    free: list[StreamTranscript] = field(default_factory=list)
    forced: list[StreamTranscript] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    free_seconds: float = 0.0
    forced_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        transcripts = {name: [one.to_json() for one in getattr(self, name)] for name in ("free", "forced")}
        return transcripts | {name: getattr(self, name) for name in ("skipped", "free_seconds", "forced_seconds")}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "StreamsRun":
        transcripts = {name: list(map(StreamTranscript.from_json, data[name])) for name in ("free", "forced")}
        return cls(**(data | transcripts))


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
    """Run every stream of `corpus` through `model` on this process; samples of other kinds are left out.

    The model is put into evaluation mode and back. A sample that does not compile or decode is left out and listed in
    the result. `on_progress(done, total)` is called after each batch.
    Raises DataError when the corpus holds no stream that can be evaluated.
    """
    config, decode = config or EvaluationConfig(), decode or DecodeConfig()
    config.validate()
    decode.validate()
    prepared = prepare_streams(corpus, tokenizer, compiler, config.limit)
    run = run_streams(model, prepared, tokenizer, config, decode, on_progress=on_progress)
    return result_of(prepared, [run], judge, config)


def run_streams(
    model: Any,
    prepared: PreparedCorpus[PreparedStream],
    tokenizer: StreamTokenizer,
    config: EvaluationConfig,
    decode: DecodeConfig,
    share: Share | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    group: dist.ProcessGroup | None = None,
) -> StreamsRun:
    """Run a share of the streams through `model`, which is put into evaluation mode and back.

    `group`: the processes that hold a part of the model each, when `model` is this one's; all must call this with the
    same share, run it in lockstep and find the same.
    """
    run = StreamsRun()
    with evaluating(model):
        for streams, frames in prepared.batches(
            share or Share(), config.batch_streams, run.skipped, group, on_progress
        ):
            started = time.perf_counter()
            run.free += free_running(model, streams, frames, tokenizer, prepared.compiler, decode)
            between = time.perf_counter()
            run.forced += _teacher_forced(
                predictions_at_once if group is None else predictions_in_lockstep,
                model, streams, frames, tokenizer, prepared.compiler, decode,
            )  # fmt: skip
            run.free_seconds += between - started
            run.forced_seconds += time.perf_counter() - between
    return run


def result_of(
    prepared: PreparedCorpus[PreparedStream], runs: Sequence[StreamsRun], judge: Judge, config: EvaluationConfig
) -> EvaluationResult:
    """The figures of all shares together; the same however the streams were shared out.

    Raises DataError when not one stream could be evaluated.
    """
    free = {transcript.key: transcript for run in runs for transcript in run.free}
    forced = {transcript.key: transcript for run in runs for transcript in run.forced}
    skipped = prepared.left_out(runs, None if free else "not one stream can be evaluated")
    order = [item.compiled.key for item in prepared.items if item.compiled.key in free]
    transcripts, forced_transcripts = [free[key] for key in order], [forced[key] for key in order]
    rules = (judge, config.window_frames, config.tolerance_s)

    def more(part: str) -> dict[str, float]:
        return {"n_skipped": len(skipped), "evaluation_seconds": max(getattr(run, f"{part}_seconds") for run in runs)}

    return EvaluationResult(
        figures=streaming_figures(transcripts, *rules) | more("free"),
        teacher_forced=teacher_forced_figures(forced_transcripts, *rules) | more("forced"),
        transcripts=transcripts,
        teacher_forced_transcripts=forced_transcripts,
        skipped=skipped,
    )


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model is in evaluation mode meanwhile."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def free_running(
    model: Any,
    streams: Sequence[PreparedStream],
    frames_FCHW: Sequence[torch.Tensor],
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
                pictures[row] = frames_FCHW[row][shown[row]]
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
            tokens=len(output.ids),
        )
        for slot, output in zip(transcript.slots, outputs, strict=True)
    )
    return replace(transcript, slots=slots, notes={"tokens": sum(len(output.ids) for output in outputs)})


def _teacher_forced(
    predict: Callable[..., Predictions],
    model: Any,
    streams: Sequence[PreparedStream],
    frames_FCHW: Sequence[torch.Tensor],
    tokenizer: StreamTokenizer,
    compiler: CompilerConfig,
    decode: DecodeConfig,
) -> list[StreamTranscript]:
    finished: list[StreamTranscript] = []
    compiled = [stream.compiled for stream in streams]
    for part in _passes(compiled, tokenizer.vocabulary_size):
        rows = [compiled[number] for number in part]
        predictions = predict(model, rows, [frames_FCHW[number] for number in part])
        transcripts = [streams[number].transcript for number in part]
        finished += teacher_forced_transcripts(predictions, rows, transcripts, tokenizer, decode)
    missed = missed_turns(compiled, finished, tokenizer, compiler)
    for part in _passes([turn.row for turn in missed], tokenizer.vocabulary_size):
        turns = [missed[number] for number in part]
        seen = [frames_FCHW[turn.stream][: len(turn.row.frames)] for turn in turns]
        found = rolled_forward(predict(model, [turn.row for turn in turns], seen), turns, tokenizer, decode)
        for turn, rolled in zip(turns, found, strict=True):
            transcript = finished[turn.stream]
            finished[turn.stream] = replace(transcript, rolled=(*transcript.rolled, rolled))
    return finished


def _passes(rows: Sequence[CompiledStream], vocabulary: int) -> Iterator[range]:
    """The numbers of the rows in batches whose logits fit."""
    longest = max((len(row.ids) for row in rows), default=1)
    size = max(1, _LOGIT_BYTES // (4 * longest * vocabulary))
    for start in range(0, len(rows), size):
        beat()
        yield range(start, min(start + size, len(rows)))
