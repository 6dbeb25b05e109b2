"""The report as one HTML file that needs nothing else: no script, no network, every picture inside."""

import base64
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
from moss_train.report.palette import ERROR, GRID, INK, MUTED, PAPER, SLOT_COLOURS, USER
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
from moss_train.report.timelines import TimelinePicture

_STYLE = f"""
:root {{ color-scheme: light; }}
body {{ margin: 0; background: #f5f7f9; color: {INK}; font: 15px/1.5 system-ui, "Segoe UI", Arial, sans-serif; }}
main {{ max-width: 1360px; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }}
h1 {{ font-size: 1.7rem; margin: 0 0 .3rem; }}
h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .7rem; }}
section, .card {{ background: {PAPER}; border: 1px solid {GRID}; border-radius: 12px; padding: 1rem 1.2rem; }}
.badge {{ display: inline-block; border-radius: 999px; padding: .1rem .8rem; font-weight: 600; color: #fff; }}
.ok {{ background: #12865f; }} .bad {{ background: {ERROR}; }}
.facts {{ color: {MUTED}; margin: .2rem 0 0; }} .facts b {{ color: {INK}; font-weight: 600; }}
.failures li {{ color: {ERROR}; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .32rem .7rem; text-align: right; border-bottom: 1px solid {GRID}; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
thead th {{ color: {MUTED}; font-weight: 600; font-size: .86rem; }}
tr.counts td {{ color: {MUTED}; }}
td.main {{ font-weight: 650; }} td.reached {{ color: #12865f; }} td.missed {{ color: {ERROR}; }}
td.required {{ color: {MUTED}; }}
.curves svg {{ width: 100%; height: auto; display: block; }}
.calibration svg {{ max-width: 38rem; }}
.legend {{ color: {MUTED}; margin: 0 0 .9rem; display: flex; flex-wrap: wrap; gap: .35rem 1.2rem; font-size: .9rem; }}
.chip {{ display: inline-block; width: 1.5em; height: .95em; border-radius: 4px; vertical-align: -.1em; }}
.chip {{ margin-right: .4em; }}
figure {{ margin: 0 0 1rem; }} figure img {{ max-width: 100%; height: auto; display: block; }}
figcaption {{ margin-bottom: .5rem; color: {MUTED}; }} figcaption b {{ color: {INK}; }}
details pre {{ overflow-x: auto; font-size: .82rem; }} summary {{ cursor: pointer; color: {MUTED}; }}
"""


def write_html(
    path: Path,
    report: Report,
    requirements: Requirements,
    rows: Sequence[MetricsRow] = (),
    pictures: Sequence[TimelinePicture] = (),
    facts: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page, whole or not at all.

    Args:
        report: the verdict and its figures.
        requirements: what was asked, shown beside the figures.
        rows: metrics of all stages; the curves of loss and calibration are drawn from them.
        pictures: timelines of clips.
        facts: short things to say about the run, name → value.
        settings: the resolved configuration; secrets are hidden.
    """
    body = [_head(report, requirements, facts or {}), "<h2>Held-out figures</h2>", _table(report, requirements)]
    curves = loss_curves(rows)
    if curves:
        body += ["<h2>Training loss</h2>", f'<section class="curves">{curves}</section>']
    calibration = calibration_curves(rows)
    if calibration:
        body += ["<h2>Calibration of speaking</h2>", f'<section class="curves calibration">{calibration}</section>']
    if pictures:
        body += ["<h2>What the model says, and when</h2>", _legend(), *map(_picture, pictures)]
    if settings:
        text = html.escape(json.dumps(finite_or_none(redact(settings)), indent=2, ensure_ascii=False))
        body += [
            "<h2>Configuration</h2>",
            f"<section><details><summary>resolved</summary><pre>{text}</pre></details></section>",
        ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(report.name)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
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
        f'<section class="scroll"><table><thead><tr><th></th>{head}<th>required</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></section>"
    )


def _legend() -> str:
    def chip(fill: str, border: str = "none", style: str = "solid") -> str:
        edge = "" if border == "none" else f"border:1.5px {style} {border};box-sizing:border-box;"
        return f'<span class="chip" style="background:{fill};{edge}"></span>'

    items = [
        chip(SLOT_COLOURS["silence"][0], SLOT_COLOURS["silence"][1]) + "silent",
        chip(SLOT_COLOURS["speak"][0]) + "speaks",
        chip(SLOT_COLOURS["revise"][0]) + "revises its answer",
        chip("#f3eefc", USER) + "the user speaks",
        chip(PAPER, ERROR) + "speaks or is silent at the wrong time",
        chip(PAPER, ERROR, "dashed") + "says something else",
        f'<span style="color:{SLOT_COLOURS["revise"][0]}">◆</span> the answer changes',
        "◇ something else changes",
    ]
    return f'<p class="legend">{"".join(f"<span>{item}</span>" for item in items)}</p>'


def _picture(picture: TimelinePicture) -> str:
    data = base64.b64encode(picture.png).decode()
    key, caption = html.escape(picture.key), html.escape(picture.caption)
    return (
        f'<figure class="card"><figcaption><b>{key}</b> · {caption}</figcaption>'
        f'<img alt="timeline of {key}: {caption}" src="data:image/png;base64,{data}"></figure>'
    )
