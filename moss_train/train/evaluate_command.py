"""`moss-train eval`: figures of a checkpoint on packed held-out samples, or on a public benchmark's files."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moss_train.cli_options import overrides_of
from moss_train.data.corpus import load_source
from moss_train.data.shards.transfer import shown
from moss_train.errors import ConfigError
from moss_train.evaluate.benchmarks import (
    BENCHES,
    POLL_S,
    load_proactive,
    load_probes,
    proactive_items,
    probe_items,
)
from moss_train.evaluate.config import DecodeConfig, EvaluationConfig
from moss_train.evaluate.file_corpus import FileCorpus
from moss_train.evaluate.invariance import invariance_figures
from moss_train.evaluate.judges import check_judge, load_judge
from moss_train.evaluate.metrics import TEACHER_FORCED
from moss_train.evaluate.metrics.benchmarks import ProbeAnswer, ovo_figures, proactive_figures
from moss_train.evaluate.metrics.replies import StreamReplies
from moss_train.evaluate.offline import (
    OfflineAnswer,
    answers_of,
    offline_figures,
    prepare_conversations,
    run_conversations,
    write_answers,
)
from moss_train.evaluate.prepared import Corpus, FrameCache, PreparedCorpus, PreparedStream, prepare_streams
from moss_train.evaluate.runner import EvaluationResult, result_of, run_streams
from moss_train.evaluate.transcript import write_transcripts
from moss_train.report.figure_tables import print_figures
from moss_train.report.html import write_html
from moss_train.report.quickstart import Requirements, build_report, write_report
from moss_train.report.stream_view import stream_views
from moss_train.streams.config import CompilerConfig
from moss_train.streams.tokenizer import StreamTokenizer
from moss_train.train.config import RunConfig
from moss_train.train.given_settings import check_decode, decode_settings, evaluation_settings, told
from moss_train.train.restore import load_model, stage_of
from moss_train.train.stream_command import system_of

_NOTHING_ASKED = Requirements(name="eval", at_least={}, at_most={}, compared=(), compared_with=())


@dataclass
class EvaluateOptions:
    """Which checkpoint is evaluated on what."""

    ckpt: str
    """Checkpoint folder, or a stage's or run's folder, whose newest checkpoint is taken."""
    data: str | None = None
    """Packed folder of held-out streams; null takes the one the run was evaluated on."""
    offline_data: str | None = None
    """Packed folder of held-out conversations; null takes the run's (`evaluate.offline_source`), if it has one."""
    bench: str | None = None
    """A public benchmark in place of packed data: `streamingbench_po` (StreamingBench, proactive output) or `ovo`
    (OVO-Bench). Needs `annotations` and `media_root`."""
    annotations: str | None = None
    """The benchmark's annotations, .json, .jsonl or .csv."""
    media_root: str | None = None
    """The folder of the benchmark's videos."""
    system: str | None = None
    """System prompt of a benchmark's samples; null takes the one of the run's held-out streams, empty means none."""
    judge: str | None = None
    """Who decides whether an answer is right, `text`, `world` or `module:Class`; null takes the run's."""
    invariance: int = 0
    """On how many streams it is checked that future frames change nothing and the caches equal a whole pass."""
    out: str | None = None
    """Folder for `report.json`, `transcripts.jsonl`, `answers.jsonl` and `report.html`; null writes nothing."""
    pictures: int = 12
    """Clips whose timeline is drawn into the HTML report."""
    settings: dict[str, Any] = overrides_of(EvaluationConfig)
    """Batch, tolerances and limit, where they are to differ from the run's `evaluate.settings`."""
    decode: dict[str, Any] = overrides_of(DecodeConfig)
    """How replies are read from predictions, where it is to differ from the run's `evaluate.decode`."""

    def validate(self) -> None:
        evaluation_settings(EvaluationConfig(), self.settings)
        check_decode(self.decode)
        if self.judge is not None:
            check_judge(self.judge)
        for name in ("pictures", "invariance"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must not be negative")
        if self.bench is not None and self.bench not in BENCHES:
            raise ConfigError(f"bench={self.bench!r}: legal values are {', '.join(BENCHES)}, or null")
        for name in ("annotations", "media_root"):
            if (getattr(self, name) is None) != (self.bench is None):
                given = getattr(self, name) or "null"
                raise ConfigError(
                    f"{name}={given}: bench, annotations and media_root belong together; give all or none"
                )
        if self.bench is not None and (self.data is not None or self.offline_data is not None):
            raise ConfigError(f"bench={self.bench}: has its own samples; leave data and offline_data out")


@dataclass
class _Found:
    """All that was found about a model."""

    figures: dict[str, float] = field(default_factory=dict)
    teacher_forced: dict[str, float] = field(default_factory=dict)
    result: EvaluationResult | None = None
    streams: PreparedCorpus[PreparedStream] | None = None  #: those of the result
    answers: list[OfflineAnswer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    source: str = ""


def evaluate_command(options: EvaluateOptions) -> int:
    """Figures of a checkpoint, as tables and, with out=…, as files.

    Examples:
      moss-train eval ckpt=outputs/quickstart data=data/heldout out=outputs/evaluation
      moss-train eval ckpt=outputs/run bench=streamingbench_po annotations=questions.json media_root=videos
    """
    model, tokenizer, run = load_model(options.ckpt)
    stage = stage_of(options.ckpt)
    console = Console(highlight=False)
    evaluation = _Evaluation(options, model, tokenizer, run, run.stages[stage].compiler, console)
    if options.bench is None:
        found = evaluation.packed()
    else:
        assert options.annotations is not None and options.media_root is not None  # checked by `validate`
        annotations, media_root = Path(options.annotations), Path(options.media_root)
        if not media_root.is_dir():
            raise ConfigError(f"media_root={media_root}: there is no such folder")
        bench = evaluation.proactive if options.bench == "streamingbench_po" else evaluation.ovo
        found = bench(annotations, media_root)
    for key, reason in found.skipped.items():
        console.print(f"left out {key}: {reason}", style="yellow", markup=False)
    columns = {"free-running": found.figures, "teacher-forced": found.teacher_forced}
    if found.result is None:
        columns = {"offline": found.figures}
    print_figures(columns, console, f"{options.ckpt}, {stage}: {shown(found.source)}")
    if options.out is not None:
        _write(Path(options.out), found, evaluation, {"checkpoint": options.ckpt, "stage": stage})
        console.print(f"written to {options.out}", markup=False)
    return 0


class _Evaluation:
    """One model and how it is asked."""

    def __init__(
        self,
        options: EvaluateOptions,
        model: torch.nn.Module,
        tokenizer: StreamTokenizer,
        run: RunConfig,
        compiler: CompilerConfig,
        console: Console,
    ):
        self.options, self._model, self._tokenizer, self._run = options, model, tokenizer, run
        self._compiler, self._console = compiler, console
        self.settings = evaluation_settings(run.evaluate.settings, options.settings)
        self.decode = decode_settings(run.evaluate.decode, options.decode)
        for name, applied in (("settings", self.settings), ("decode", self.decode)):
            line = told(name, applied, getattr(options, name))
            console.print(line, style="dim", markup=False, soft_wrap=True)
        self.judge = load_judge(options.judge or run.evaluate.judge)
        self._image_size = run.model.vision.image_size

    def packed(self) -> _Found:
        """Held-out streams, and conversations where there are any."""
        source = self.options.data or self._run.evaluate.source
        if source is None:
            raise ConfigError("data is not given and the run names no held-out source: add data=<packed folder>")
        found = self._streams(load_source(source, self._tokenizer, self._compiler, self._image_size), source)
        offline = self.options.offline_data or self._run.evaluate.offline_source
        if offline is not None:
            stage = self._run.stages.get(self._run.evaluate.offline_stage)
            compiler = self._compiler if stage is None else stage.compiler
            self._answer(found, load_source(offline, self._tokenizer, compiler, self._image_size), compiler)
            found.figures |= offline_figures(found.answers, self.judge)
        return found

    def proactive(self, annotations: Path, media_root: Path) -> _Found:
        """StreamingBench, proactive output."""
        items = proactive_items(load_proactive(annotations, media_root), self._compiler, self._system())
        found = self._streams(FileCorpus(items, self._image_size), str(annotations))
        assert found.result is not None
        replies = [StreamReplies.of(transcript) for transcript in found.result.transcripts]
        found.figures |= proactive_figures(replies, POLL_S)
        return found

    def ovo(self, annotations: Path, media_root: Path) -> _Found:
        """OVO-Bench."""
        items = probe_items(load_probes(annotations, media_root), self._system())
        found = _Found(source=str(annotations))
        self._answer(found, FileCorpus(items, self._image_size), self._compiler)
        found.figures = ovo_figures([_probe_answer(answer) for answer in found.answers])
        return found

    def is_right(self, answer: OfflineAnswer) -> bool:
        """By the benchmark's own rule, or the judge's."""
        if self.options.bench == "ovo":
            return _probe_answer(answer).right
        return self.judge.same_answer(answer.said, answer.reference)

    def _streams(self, corpus: Corpus, source: str) -> _Found:
        settings = self.settings
        cache = FrameCache(corpus, settings.cache_mb)
        prepared = prepare_streams(corpus, self._tokenizer, self._compiler, settings.limit, cache)
        with _progress(self._console, "streams") as progress:
            run = run_streams(self._model, prepared, self._tokenizer, settings, self.decode, on_progress=progress)
        result = result_of(prepared, [run], self.judge, settings)
        figures = dict(result.figures)
        if self.options.invariance:
            figures |= invariance_figures(self._model, prepared, self.options.invariance)
        return _Found(figures, result.teacher_forced, result, prepared, [], result.skipped, source)

    def _answer(self, found: _Found, corpus: Corpus, compiler: CompilerConfig) -> None:
        settings = self.settings
        prepared = prepare_conversations(corpus, self._tokenizer, compiler, settings.limit)
        with _progress(self._console, "questions") as progress:
            run = run_conversations(self._model, prepared, self._tokenizer, settings, on_progress=progress)
        found.answers, skipped = answers_of(prepared, [run])
        found.skipped = found.skipped | skipped

    def _system(self) -> str | None:
        if self.options.system is not None:
            return self.options.system or None
        return system_of(self._run.evaluate.source)


def _probe_answer(answer: OfflineAnswer) -> ProbeAnswer:
    return ProbeAnswer(answer.key, answer.kind or "", answer.said, answer.reference)


@contextlib.contextmanager
def _progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar meanwhile; gives what is told of (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _write(out: Path, found: _Found, evaluation: _Evaluation, facts: dict[str, str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    figures = {"": found.figures, f"{TEACHER_FORCED}.": found.teacher_forced}
    report = build_report(figures, {}, _NOTHING_ASKED)
    write_report(report, out / "report.json")
    if found.answers:
        write_answers(found.answers, evaluation.is_right, out / "answers.jsonl")
    if found.result is not None and found.streams is not None:
        write_transcripts(found.result.transcripts, out / "transcripts.jsonl")
        views = stream_views(
            found.result.transcripts,
            lambda key: found.streams.frames_of(key).numpy(),
            evaluation.judge,
            evaluation.options.pictures,
            evaluation.settings.window_frames,
        )
        facts = facts | {
            "streams": found.source,
            "decode": told("decode", evaluation.decode, evaluation.options.decode),
        }
        write_html(out / "report.html", report, _NOTHING_ASKED, streams=views, facts=facts)
