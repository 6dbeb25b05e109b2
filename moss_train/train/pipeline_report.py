"""`moss-train report`: a finished pipeline against itself untrained and without its last stage, on held-out streams."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moss_train.checkpoint.store import latest, load_checkpoint
from moss_train.data.shards.transfer import shown
from moss_train.errors import CheckpointError, ConfigError
from moss_train.evaluate.offline import OfflineAnswer, offline_figures
from moss_train.evaluate.runner import EvaluationResult
from moss_train.evaluate.transcript import write_transcripts
from moss_train.report.html import write_html
from moss_train.report.metrics_file import FILE_NAME, read_metrics
from moss_train.report.quickstart import FULL, SMOKE, Requirements, build_report, print_report, write_report
from moss_train.report.stream_view import stream_views
from moss_train.train.compose import load_run, resolved_dict
from moss_train.train.evaluation import Evaluator
from moss_train.train.restore import build_model, load_model

REQUIREMENTS: dict[str, Requirements] = {
    "quickstart": FULL,
    "smoke": SMOKE,
    "none": Requirements(name="report", at_least={}, at_most={}, compared=(), compared_with=()),
}


@dataclass
class ReportOptions:
    """Which run is reported on."""

    run: str
    """The run's folder (its `output_dir`), trained to the end."""
    requirements: str = "none"
    """What the figures must reach for exit code 0: `quickstart`, `smoke` (that everything ran) or `none`."""
    spent_s: float | None = None
    """Seconds that data and training took; null counts those spent in training loops. Those of the report come on
    top."""
    comparisons: int | None = 64
    """Most streams (and conversations) on which the untrained model and the one without the last stage are evaluated:
    they talk all the time, which is slow. Both see the same streams, the first ones that the trained model sees
    (`untrained.n_streams`). Null evaluates them on every stream."""
    pictures: int = 12
    """Clips whose timeline is drawn."""

    def validate(self) -> None:
        if self.requirements not in REQUIREMENTS:
            raise ConfigError(f"requirements={self.requirements!r}: legal values are {', '.join(REQUIREMENTS)}")
        if self.comparisons is not None and self.comparisons < 1:
            raise ConfigError(f"comparisons={self.comparisons}: must be at least 1, or null")
        if self.pictures < 0:
            raise ConfigError(f"pictures={self.pictures}: must not be negative")


def report_command(options: ReportOptions) -> int:
    """Evaluate a finished run on its held-out streams, beside the untrained model and the model without the last
    stage; write report.json, report.html and transcripts.jsonl into the run's folder. Exit code 1 when the figures
    miss the requirements."""
    began = time.monotonic()
    folder, console = Path(options.run), Console(highlight=False)
    checkpoints = finished_stages(folder)
    stages = list(checkpoints)
    model, tokenizer, run = load_model(checkpoints[stages[-1]])
    if run.evaluate.source is None:
        raise ConfigError(f"{folder}: the run names no held-out source; train with evaluate.source=<packed folder>")
    evaluator = Evaluator(run, tokenizer)
    last = stages[-1]
    compiler = run.stages[last].compiler

    models: dict[str, torch.nn.Module] = {"": model}
    if len(stages) > 1:
        models[f"without_{last}."] = load_model(checkpoints[stages[-2]])[0]
    models["untrained."] = build_model(run)
    results: dict[str, EvaluationResult] = {}
    offline: dict[str, list[OfflineAnswer]] = {}
    with _progress(console) as bar:
        for prefix, variant in models.items():
            task = bar.add_task(f"evaluating {prefix.rstrip('.').replace('_', ' ') or 'the trained model'}", total=None)
            results[prefix] = evaluator.evaluate(
                variant,
                compiler,
                limit=options.comparisons if prefix else None,
                on_progress=lambda done, total, t=task: bar.update(t, completed=done, total=total),
            )
            offline[prefix] = evaluator.answer_offline(variant, compiler, options.comparisons if prefix else None)
    variants = {prefix: result.figures for prefix, result in results.items()}
    for prefix, answers in offline.items():
        if answers:
            variants[prefix] |= offline_figures(answers, evaluator.judge)
    variants["teacher_forced."] = results[""].teacher_forced

    requirements = REQUIREMENTS[options.requirements]
    figures = run_figures(checkpoints.values(), model)
    spent = figures["training_seconds"] if options.spent_s is None else options.spent_s
    figures["seconds"] = spent + time.monotonic() - began
    report = build_report(variants, figures, requirements)
    write_report(report, folder / "report.json")
    write_transcripts(results[""].transcripts, folder / "transcripts.jsonl")
    streams = stream_views(
        results[""].transcripts,
        lambda key: evaluator.frames_of(compiler, key).numpy(),
        evaluator.judge,
        options.pictures,
        run.evaluate.settings.window_frames,
    )
    metrics = folder / FILE_NAME
    page = write_html(
        folder / "report.html",
        report,
        requirements,
        rows=read_metrics(metrics) if metrics.is_file() else (),
        streams=streams,
        facts={
            "run": run.name,
            "model": run.model.name,
            "stages": " → ".join(stages),
            "streams": shown(run.evaluate.source),
        },
        settings=resolved_dict(run),
    )
    print_report(report, requirements, console)
    console.print(f"written to {folder / 'report.json'} and {page}")
    return 0 if report.ok else 1


def finished_stages(folder: Path) -> dict[str, Path]:
    """Stage → its last checkpoint, in the order they ran; CheckpointError when one was not trained to its end."""
    checkpoints: dict[str, Path] = {}
    for name, _ in load_run(folder).ordered_stages():
        checkpoint = latest(folder / name / "checkpoints")
        if checkpoint is None:
            raise CheckpointError(f"{folder}: no checkpoint of {name}; train the run to its end first")
        progress = load_checkpoint(checkpoint, only=()).state["progress"]
        if progress["step"] < progress["total"]:
            raise CheckpointError(
                f"{folder}: {name} stopped at step {progress['step']} of {progress['total']}; "
                "give its train command once more to end it first"
            )
        checkpoints[name] = checkpoint
    return checkpoints


def run_figures(checkpoints: Iterable[Path], model: torch.nn.Module) -> dict[str, float]:
    """`training_seconds`, `parameters` and `trained_tokens` (labels in the loss) of the whole run."""
    progress = [load_checkpoint(checkpoint, only=()).state["progress"] for checkpoint in checkpoints]
    return {
        "training_seconds": sum(stage["seconds"] for stage in progress),
        "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
        "trained_tokens": float(sum(stage["trained_tokens"] for stage in progress)),
    }


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
