"""All figures of an evaluation for the terminal, in one table a subject."""

import math
from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moss_train.report.quickstart import figure_text

#: subject → figure → (how it is written, which way is better: ↑, ↓ or "" for counts and what has no better)
SUBJECTS: dict[str, dict[str, tuple[str, str]]] = {
    "Decisions": {
        "speak_precision": ("speak precision", "↑"),
        "speak_recall": ("speak recall", "↑"),
        "speak_f1": ("speak F1", "↑"),
        "silence_precision": ("silence precision", "↑"),
        "silence_recall": ("silence recall", "↑"),
        "silence_f1": ("silence F1", "↑"),
        "balanced_accuracy": ("balanced accuracy", "↑"),
        "trigger_precision": ("trigger precision", "↑"),
        "trigger_recall": ("trigger recall", "↑"),
        "trigger_f1": ("trigger F1", "↑"),
        "stop_error_tokens": ("stop error, tokens", "0"),
        "stop_error_abs_tokens": ("… absolute", "↓"),
    },
    "Answers and revisions": {
        "answer_accuracy": ("answer accuracy", "↑"),
        "answer_accuracy_evidence_after": ("… evidence after", "↑"),
        "answer_accuracy_evidence_before": ("… evidence before", "↑"),
        "proactive_time_accuracy": ("proactive time accuracy", "↑"),
        "proactive_accuracy": ("proactive accuracy", "↑"),
        "revision_accuracy": ("revision accuracy", "↑"),
        "revision_delay_frames": ("revision delay, frames", "↓"),
        "stale_rate": ("stale answers", "↓"),
        "false_revision_rate": ("false revisions", "↓"),
        "restate_rate": ("restated answers", "↓"),
        "offline_accuracy": ("offline accuracy", "↑"),
        "offline_silent_rate": ("… would be silent", "↓"),
    },
    "Timing": {
        "answer_latency_s": ("answer latency, s", "↓"),
        "revision_latency_s": ("revision latency, s", "↓"),
        "tim_diff_s": ("TimDiff (LiveStar), s", "↓"),
        "redundancy": ("redundancy", "↓"),
        "coverage": ("coverage", "↑"),
        "emission_lag_s": ("emission lag, s", "↓"),
        "emission_lag_growth": ("… growth, s a second", "0"),
    },
    "Spans (MMDuet)": {
        "in_span_score": ("in-span score, 1 to 5", "↑"),
        "pauc": ("PAUC", "↑"),
        "out_of_span_rate": ("out of span", "↓"),
    },
    "Language (VideoLLM-online)": {
        "lm_ppl": ("LM-PPL", "↓"),
        "lm_correctness": ("LM-Correctness", "↑"),
        "time_diff_s": ("TimeDiff, s", "↓"),
        "fluency": ("Fluency", "↑"),
    },
    "Checks": {
        "future_frame_deviation": ("future frames change", "0"),
        "incremental_deviation": ("caches change", "0"),
    },
}
_COUNTS = "n_streams n_questions n_revisions n_confirmations n_turns n_offline n_probes n_unscorable n_skipped".split()


def print_figures(variants: Mapping[str, Mapping[str, float]], console: Console, title: str) -> None:
    """One table for each subject of which anything was measured. `variants`: column → figures by their names. A figure
    by kind (`offline_accuracy.claim`) stands below its own; those of no subject (a benchmark's tasks) come last."""
    console.print(title, style="bold", markup=False)
    measured = dict.fromkeys(name for figures in variants.values() for name in figures)
    named = {name for subject in SUBJECTS.values() for name in subject}
    other = {
        name: (name.replace("_", " "), "↑")
        for name in measured
        if name.partition(".")[0] not in named and not name.startswith("n_") and name != "evaluation_seconds"
    }
    for subject, listed in (SUBJECTS | {"Others": other}).items():
        rows: dict[str, tuple[str, str]] = {}
        for name, (words, better) in listed.items():
            rows[name] = words, better
            kinds = [one for one in measured if one.startswith(f"{name}.")]
            rows |= {one: (f"… {one.partition('.')[2].replace('_', ' ')}", better) for one in kinds}
        shown = {
            name: words
            for name, words in rows.items()
            if any(math.isfinite(figures.get(name, math.nan)) for figures in variants.values())
        }
        if not shown:
            continue
        table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
        table.add_column(subject, min_width=28, no_wrap=True)
        table.add_column("better", style="dim")
        for variant in variants:
            table.add_column(variant, justify="right", no_wrap=True, min_width=14)
        for name, (words, better) in shown.items():
            cells = [_cell(name, figures[name]) if name in figures else "" for figures in variants.values()]
            table.add_row(words, better, *cells)
        console.print(table)
    counts = {name: figures[name] for figures in variants.values() for name in _COUNTS if name in figures}
    console.print(", ".join(f"{value:.0f} {name[2:].replace('_', ' ')}" for name, value in counts.items()), style="dim")


def _cell(name: str, value: float) -> str:
    return f"{value:.1e}" if name in SUBJECTS["Checks"] and value else figure_text(name, value)
