"""The report as one HTML file that needs nothing else: no script, no network, every picture inside."""

import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moss_train.redact import redact
from moss_train.report.calibration import calibration_curves
from moss_train.report.curves import loss_curves
from moss_train.report.metrics_file import MetricsRow, finite_or_none
from moss_train.report.palette import GRID, INK, MUTED
from moss_train.report.quickstart import (
    COUNTS,
    FIGURES,
    VARIANTS,
    Report,
    Requirements,
    figure_text,
    required_text,
    streams_text,
)
from moss_train.report.style import STYLE
from moss_train.report.words import escaped


def write_html(
    path: Path,
    report: Report,
    requirements: Requirements,
    rows: Sequence[MetricsRow] = (),
    streams: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page, whole or not at all.

    Args:
        report: the verdict and its figures.
        requirements: what was asked, shown beside the figures.
        rows: metrics of all stages; the curves of loss and calibration are drawn from them.
        streams: the HTML of evaluated streams, see `stream_view.stream_views`.
        facts: short things to say about the run, name → value.
        settings: the resolved configuration; secrets are hidden.
    """
    body = [_head(report, requirements, facts or {}), "<h2>Held-out figures</h2>", _table(report, requirements)]
    curves = _themed(loss_curves(rows))
    if curves:
        body += ["<h2>Training loss</h2>", f'<section class="curves">{curves}</section>']
    calibration = _themed(calibration_curves(rows))
    if calibration:
        body += ["<h2>Calibration of speaking</h2>", f'<section class="curves calibration">{calibration}</section>']
    if streams:
        body += ["<h2>What the model says, and when</h2>", legend(), *streams]
    if settings:
        text = html.escape(json.dumps(finite_or_none(redact(settings)), indent=2, ensure_ascii=False))
        body += [
            "<h2>Configuration</h2>",
            f"<section><details><summary>resolved</summary><pre>{text}</pre></details></section>",
        ]
    page = document(report.name, "".join(body))
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def _head(report: Report, requirements: Requirements, facts: Mapping[str, Any]) -> str:
    badge = '<span class="badge ok">passed</span>' if report.ok else '<span class="badge bad">failed</span>'
    badge = badge if requirements.asked else ""
    shown = " · ".join(f"{html.escape(name)} <b>{html.escape(str(value))}</b>" for name, value in facts.items())
    failures = "".join(f"<li>{html.escape(failure)}</li>" for failure in report.failures)
    listed = f'<ul class="failures">{failures}</ul>' if failures else ""
    return f'<h1>{html.escape(report.name)} {badge}</h1><p class="facts">{shown}</p>{listed}'


def _table(report: Report, requirements: Requirements) -> str:
    variants = {
        prefix: title for prefix, title in VARIANTS.items() if any(prefix + name in report.figures for name in FIGURES)
    }
    head = "".join(
        f"<th>{html.escape(title)}<br>{html.escape(streams_text(report, prefix))}</th>"
        for prefix, title in variants.items()
    )
    lines = []
    for name, title in (FIGURES | COUNTS).items():
        if not any(prefix + name in report.figures for prefix in variants):
            continue
        required = required_text(requirements, name)
        cells = []
        for prefix in variants:
            style = "main" if not prefix else ""
            if not prefix and required:
                missed = any(failure.startswith(f"{name} is ") for failure in report.failures)
                style += " missed" if missed else " reached"
            value = report.figures.get(prefix + name)
            cells.append(f'<td class="{style}">{"" if value is None else figure_text(name, value)}</td>')
        row = "counts" if name in COUNTS else ""
        lines.append(
            f'<tr class="{row}"><td>{html.escape(title)}</td>{"".join(cells)}<td class="required">{required}</td></tr>'
        )
    return (
        f'<section class="scroll figures"><table><thead><tr><th></th>{head}<th>required</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></section>"
    )


def _themed(svg: str) -> str:
    """A drawing with the page's colours of ink in place of fixed ones, so that it can be read on dark paper too."""
    for colour, name in ((INK, "ink"), (MUTED, "muted"), (GRID, "grid")):
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def legend() -> str:
    """What the colours and marks of streams mean."""

    def chip(style: str) -> str:
        return f'<span class="chip {style}"></span>'

    items = [
        chip("silence") + "silent",
        chip("speak") + "speaks",
        chip("revise") + "revises its answer; an arrow leads to the old one",
        chip("hears") + "the user speaks",
        chip("timing") + "speaks or is silent at the wrong time",
        chip("answer") + "says something else",
        '<span class="mark">◆</span> the answer changes',
        "◇ something else changes",
        "+1 frame: so long after its evidence, and after the reference",
    ]
    return f'<p class="legend">{"".join(f"<span>{item}</span>" for item in items)}</p>'


def document(title: str, body: str) -> str:
    """A whole page with the report's style."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escaped(title, 200)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>\n"
    )
