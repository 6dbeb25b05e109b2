"""`moss-train eval`: free-running and teacher-forced figures of a checkpoint on packed streams."""

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moss_train.data.corpus import load_source
from moss_train.errors import ConfigError
from moss_train.evaluate.config import DecodeConfig, EvaluationConfig
from moss_train.evaluate.judges import JUDGES, load_judge
from moss_train.evaluate.runner import evaluate_streams
from moss_train.evaluate.transcript import write_transcripts
from moss_train.report.html import write_html
from moss_train.report.quickstart import Requirements, build_report, print_report, write_report
from moss_train.report.stream_view import stream_views
from moss_train.train.restore import load_model, stage_of


@dataclass
class EvaluateOptions:
    """Which checkpoint is evaluated on which streams."""

    ckpt: str
    """Checkpoint folder, or a stage's or run's folder, whose newest checkpoint is taken."""
    data: str | None = None
    """Packed folder of held-out streams; null takes the one the run was evaluated on."""
    judge: str | None = None
    """Who decides whether an answer is right, `text` or `world`; null takes the run's."""
    out: str | None = None
    """Folder for `report.json`, `transcripts.jsonl` and `report.html`; null writes nothing."""
    pictures: int = 12
    """Clips whose timeline is drawn into the HTML report."""
    settings: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Batch, tolerance and limit."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """How replies are read from predictions."""

    def validate(self) -> None:
        self.settings.validate()
        self.decode.validate()
        if self.judge is not None and self.judge not in JUDGES:
            raise ConfigError(f"judge={self.judge!r}: legal values are {', '.join(JUDGES)}, or null")
        if self.pictures < 0:
            raise ConfigError(f"pictures={self.pictures}: must not be negative")


def evaluate_command(options: EvaluateOptions) -> int:
    """Figures of a checkpoint on held-out streams, as a table and, with out=…, as files.

    Example: moss-train eval ckpt=outputs/quickstart data=data/heldout out=outputs/evaluation
    """
    model, tokenizer, run = load_model(options.ckpt)
    stage = stage_of(options.ckpt)
    compiler = run.stages[stage].compiler
    source = options.data or run.evaluate.source
    if source is None:
        raise ConfigError("data is not given and the run names no held-out source: add data=<packed folder>")
    judge = load_judge(options.judge or run.evaluate.judge)
    corpus = load_source(source, tokenizer, compiler, run.model.vision.image_size)
    console = Console(highlight=False)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as bar:
        task = bar.add_task("streams", total=None)
        result = evaluate_streams(
            model,
            corpus,
            tokenizer,
            compiler,
            judge,
            options.settings,
            options.decode,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for key, reason in result.skipped.items():
        console.print(f"left out {key}: {reason}", style="yellow", markup=False)
    requirements = Requirements(name="eval", at_least={}, at_most={}, compared=(), compared_with=())
    report = build_report({"": result.figures, "teacher_forced.": result.teacher_forced}, {}, requirements)
    print_report(report, requirements, console)
    if options.out is not None:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        write_transcripts(result.transcripts, out / "transcripts.jsonl")
        write_report(report, out / "report.json")
        streams = stream_views(
            result.transcripts,
            lambda key: corpus.all_frames(corpus.index.number(key)).numpy(),
            judge,
            options.pictures,
            options.settings.window_frames,
        )
        facts = {"checkpoint": options.ckpt, "stage": stage, "streams": source}
        page = write_html(out / "report.html", report, requirements, streams=streams, facts=facts)
        console.print(f"written to {page.parent}")
    return 0
