"""The picture of `data show`: a strip of frames with what is said under them, and what each token sees.

All sizes are inches; the strip runs from left to right and wraps like text.
"""

import math
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from moss_train.data.show import Item, kind_name, kinds_of, sees, silence_text
from moss_train.streams.compiled import CompiledStream, FrameRequest, Kind

INK, MUTED, RULE, USER, SYSTEM = "#1c2530", "#6b7885", "#d5dbe1", "#6c3fc4", "#7d8894"
#: colour of a token that is trained as each kind; they differ in lightness too
KIND_COLOURS = {
    Kind.IGNORED: "#ffffff",
    Kind.TEXT: "#2f6fde",
    Kind.ONSET: "#0c7a5f",
    Kind.IDLE_SILENCE: "#c3cbd3",
    Kind.STOP_SILENCE: "#66727f",
    Kind.REVISION: "#f08a24",
    Kind.STALE: "#d62839",
    Kind.THINK: "#8a5fc7",
}
COLUMNS, COLUMN, GAP, MARGIN = 10, 1.3, 0.08, 0.3
LINE, CHARACTERS_PER_INCH = 0.125, 18.5  #: of the text size below
TEXT_POINTS = 6.8
MOST_LINES = 14  #: of one text; more is cut
SILENT_RUN, OFFLINE_RUN = 6, 20  #: runs of frames longer than these are shown in part

Pictures = Callable[[Sequence[FrameRequest]], list[np.ndarray]]


@dataclass
class Cell:
    """One place in the strip: something above (a frame or what the user says) and what the assistant says below."""

    columns: int
    above: Item | None = None
    below: Item | None = None
    hidden: int = 0  #: frames left out here

    @property
    def width(self) -> float:
        return self.columns * COLUMN - GAP


def draw_sample(out: Path, title: str, row: CompiledStream, items: list[Item], pictures: Pictures) -> None:
    """Write the picture. `pictures` gives the frames that are drawn, uint8 [h, w, 3] each."""
    cells = _cells(row, items)
    shown = [cell.above.frame for cell in cells if cell.above is not None and cell.above.frame is not None]
    thumbnails = dict(zip(shown, pictures([row.frames[frame] for frame in shown]), strict=True)) if shown else {}
    thumb_height = max((_thumb_height(picture) for picture in thumbnails.values()), default=0.0)
    lines = _lines(cells)
    heights = [_line_heights(line, thumb_height) for line in lines]
    strip = sum(above + below + 0.5 for above, below in heights)
    top, panel = 0.75, 2.5
    width, height = COLUMNS * COLUMN + 2 * MARGIN, top + strip + panel
    figure = Figure((width, height), dpi=120, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    page = figure.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, width), ylim=(height, 0))
    page.set_axis_off()
    _text(page, MARGIN, 0.3, title, size=12, weight="bold")
    _legend(figure, row, (MARGIN / width, 1 - 0.42 / height))
    y = top
    for line, (above, below) in zip(lines, heights, strict=True):
        x = MARGIN
        for cell in line:
            _draw_cell(page, cell, x, y, above, below, row, thumbnails)
            x += cell.columns * COLUMN
        y += above + below + 0.5
    _draw_panel(figure, row, (0.75 / width, 0.5 / height, 1 - (0.75 + MARGIN) / width, (panel - 1.0) / height))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # drawn as a box
        canvas.print_png(str(out))


# --- what stands where ---------------------------------------------------------------------------------------


def _cells(row: CompiledStream, items: list[Item]) -> list[Cell]:
    cells: list[Cell] = []
    for item in items:
        last = cells[-1] if cells else None
        if item.frame is not None:
            cells.append(Cell(1, item, item if row.kind == "stream" else None))
        elif item.role == "assistant" and last is not None and _waits_for_answer(last):
            last.below = item
            last.columns = _columns_for(last.above, item)
        elif item.role in ("user", "system"):
            cells.append(Cell(_columns_for(item), item))
        else:
            cells.append(Cell(_columns_for(item), None, item))
    return _without_long_runs(cells, row)


def _waits_for_answer(cell: Cell) -> bool:
    return cell.above is not None and cell.above.role == "user" and cell.above.frame is None and cell.below is None


def _columns_for(*items: Item | None) -> int:
    longest = max(len(item.text) for item in items if item is not None)
    enough = math.ceil(longest / (COLUMN * CHARACTERS_PER_INCH * 5))
    return min(max(enough, 1 if longest < 30 else 2), COLUMNS)


def _without_long_runs(cells: list[Cell], row: CompiledStream) -> list[Cell]:
    """The strip without the middle of long runs of frames at which nothing happens."""
    most = SILENT_RUN if row.kind == "stream" else OFFLINE_RUN
    result: list[Cell] = []
    run: list[Cell] = []
    for cell in [*cells, Cell(0)]:
        below = cell.below
        quiet = cell.above is not None and cell.above.frame is not None
        quiet = quiet and (below is None or (below.silent and not below.thought))
        same = not run or _taught(row, cell) == _taught(row, run[-1])
        if quiet and same:
            run.append(cell)
            continue
        result += _shortened(run, most)
        run = [cell] if quiet else []
        if not quiet and cell.columns:
            result.append(cell)
    return result


def _taught(row: CompiledStream, cell: Cell) -> list[Kind]:
    return kinds_of(row, cell.below) if cell.below is not None else []


def _shortened(run: list[Cell], most: int) -> list[Cell]:
    if len(run) <= most:
        return run
    kept = most // 2
    return [*run[:kept], Cell(1, hidden=len(run) - 2 * kept), *run[-kept:]]


def _lines(cells: list[Cell]) -> list[list[Cell]]:
    lines: list[list[Cell]] = [[]]
    for cell in cells:
        if sum(placed.columns for placed in lines[-1]) + cell.columns > COLUMNS:
            lines.append([])
        lines[-1].append(cell)
    return lines


def _line_heights(line: list[Cell], thumb_height: float) -> tuple[float, float]:
    """Heights of the upper and the lower half of a line of the strip."""
    above, below = 0.0, 0.0
    for cell in line:
        if cell.above is not None and cell.above.frame is not None or cell.hidden:
            above = max(above, thumb_height)
        elif cell.above is not None:
            above = max(above, len(_wrapped(cell.above.text, cell.width)) * LINE + 0.3)
        if cell.below is not None:
            height = len(_said_lines(cell.below, cell.width, trained=True)) * LINE + 0.12
            if cell.above is None:
                above = max(above, height + 0.2)
            else:
                below = max(below, height)
    return above, below


def _wrapped(text: str, width: float) -> list[str]:
    characters = max(8, int((width - 0.12) * CHARACTERS_PER_INCH))
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, characters) or [""]] or [""]
    return (
        lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], f"… {len(lines) - MOST_LINES + 1} more lines"]
    )


def _thumb_height(picture: np.ndarray) -> float:
    return min(1.25, (COLUMN - GAP) * picture.shape[0] / picture.shape[1])


# --- drawing -------------------------------------------------------------------------------------------------


def _draw_cell(
    page: Axes,
    cell: Cell,
    x: float,
    y: float,
    above: float,
    below: float,
    row: CompiledStream,
    thumbnails: dict[int, np.ndarray],
) -> None:
    if cell.hidden:
        said = " silent" if row.kind == "stream" else ""
        middle = y + 0.14 + above / 2
        _text(page, x + cell.width / 2, middle, f"⋯ {cell.hidden} more\n{said} frames ⋯", ha="center", color=MUTED)
        return
    item = cell.above
    if item is not None and item.frame is not None:
        picture = thumbnails[item.frame]
        height = _thumb_height(picture)
        width = min(cell.width, height * picture.shape[1] / picture.shape[0])
        time = f"{item.time_s:.2f}".rstrip("0").rstrip(".")
        _text(page, x, y + 0.1, f"frame {item.frame} · {time} s", color=MUTED, size=6.2)
        page.imshow(picture, extent=(x, x + width, y + 0.14 + height, y + 0.14), aspect="auto", zorder=1)
    elif item is not None:
        colour = USER if item.role == "user" else SYSTEM
        name = item.role + (f" at {item.time_s:g} s" if item.time_s is not None else "")
        name = f"said before · {name}" if item.context else name
        lines = _wrapped(item.text, cell.width) if item.text else ["(nobody asks)"]
        height = len(lines) * LINE + 0.1
        _text(page, x, y + 0.1, name, color=colour, size=6.2, weight="bold")
        _box(page, x, y + 0.14, cell.width, height, face=_tint(colour, 0.12), edge=colour)
        _text(page, x + 0.06, y + 0.14 + 0.05 + LINE * 0.8, "\n".join(lines), va="baseline_first", color=INK)
    if cell.below is not None:
        top = y + above + 0.2
        if item is None:  # a text that nothing is asked or shown for
            _text(page, x, y + 0.1, cell.below.role or "text", color=KIND_COLOURS[Kind.TEXT], size=6.2, weight="bold")
            top = y + 0.2
        _draw_said(page, cell.below, cell.width, x, top, row)


def _draw_said(page: Axes, item: Item, width: float, x: float, y: float, row: CompiledStream) -> None:
    """What the assistant says in a slot: its tokens as squares, the words, and a bar of the frames it sees."""
    kinds = kinds_of(row, item)
    square = min(0.09, (width - 0.02) / max(len(kinds), 1))
    for index, kind in enumerate(kinds):
        face = KIND_COLOURS[kind]
        page.add_patch(
            Rectangle((x + index * square, y), square * 0.86, 0.075, facecolor=face, edgecolor=MUTED, lw=0.3)
        )
    counts = Counter(kind for kind in kinds if kind not in (Kind.STOP_SILENCE, Kind.ONSET)) or Counter(kinds)
    kind = counts.most_common(1)[0][0] if counts else Kind.IGNORED
    lines = _said_lines(item, width, kind != Kind.IGNORED)
    height = len(lines) * LINE + 0.08
    colour = KIND_COLOURS[kind] if kind != Kind.IGNORED else RULE
    face = _tint(colour, 0.18) if kind != Kind.IGNORED else "white"
    _box(page, x, y + 0.1, width, height, face=face, edge=colour, dashed=kind == Kind.IGNORED)
    words = MUTED if item.silent or kind == Kind.IGNORED else INK
    style = "italic" if item.silent else "normal"
    if item.context:
        _text(page, x, y - 0.04, "said before", color=MUTED, size=6.2)
    _text(page, x + 0.06, y + 0.1 + 0.04 + LINE * 0.8, "\n".join(lines), va="baseline_first", color=words, style=style)
    total = len(row.frames)
    if not total:
        return
    bar = y + 0.1 + height + 0.035
    page.add_patch(Rectangle((x, bar), width, 0.035, facecolor="#eceff2", lw=0))
    token = max(item.first - 1, 0)
    lo, hi = int(row.visible_lo[token]), int(row.visible_hi[token])
    for first, end in ((0, min(row.sinks, hi)), (lo, hi)):
        page.add_patch(
            Rectangle((x + width * first / total, bar), width * (end - first) / total, 0.035, facecolor=INK, lw=0)
        )
    note = f"sees {sees(row, item)}" if hi else "sees no frame"
    note += f" · {item.ending}" if item.ending else ""
    _text(page, x, bar + 0.12, note, color=MUTED, size=5.8)


def _said_lines(item: Item, width: float, trained: bool) -> list[str]:
    """The words of a slot, its thoughts first, or what there is to say of its silence."""
    lines = _wrapped(f"(thinks: {item.thought})", width) if item.thought else []
    if not item.silent:
        return lines + _wrapped(item.text, width)
    special = silence_text(item)
    return lines + _wrapped(
        ("silent" if trained else "silent, not trained") + (f": {special}" if special else ""), width
    )


def _draw_panel(figure: Figure, row: CompiledStream, place: tuple[float, float, float, float]) -> None:
    """Every token of the row: the frames it sees (above) and what it is trained as (the band below)."""
    left, bottom, width, height = place
    axes = figure.add_axes((left, bottom + height * 0.16, width, height * 0.84))
    length, total = len(row.ids), len(row.frames)
    edges = np.arange(length + 1)
    lo, hi = (np.append(values, values[-1:]) for values in (row.visible_lo, row.visible_hi))
    axes.fill_between(edges, lo, hi, step="post", color="#9db8e8", lw=0, label="visible frames")
    if row.sinks:
        axes.fill_between(edges, 0, np.minimum(hi, row.sinks), step="post", color="#9db8e8", lw=0)
    axes.plot(row.frame_positions + 0.5, np.arange(total) + 0.5, ".", color=INK, ms=2.5)
    axes.set(xlim=(0, length), ylim=(0, max(total, 1)), xticks=[])
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_ylabel("frames seen", fontsize=8, color=INK)
    axes.set_title("every token of the row: the frames it sees (• where each arrives), and what is trained",
                   fontsize=8, loc="left", color=INK)  # fmt: skip
    axes.tick_params(labelsize=7, colors=MUTED)
    band = figure.add_axes((left, bottom, width, height * 0.14))
    targets = np.concatenate([[0], row.kinds[:-1]])[None]
    colours = ListedColormap([KIND_COLOURS[kind] for kind in Kind])
    band.imshow(targets, aspect="auto", cmap=colours, vmin=-0.5, vmax=len(Kind) - 0.5,
                extent=(0, length, 0, 1), interpolation="nearest")  # fmt: skip
    band.set(yticks=[], xlim=(0, length))
    band.set_xlabel("token", fontsize=8, color=INK)
    band.tick_params(labelsize=7, colors=MUTED)
    for drawn in (axes, band):
        for side in drawn.spines.values():
            side.set_color(RULE)


def _legend(figure: Figure, row: CompiledStream, place: tuple[float, float]) -> None:
    counts = Counter(row.kinds[:-1].tolist())
    patches = [
        Patch(facecolor=KIND_COLOURS[kind], edgecolor=MUTED, linewidth=0.5, label=f"{kind_name(kind)} {counts[kind]}")
        for kind in Kind
        if counts[kind]
    ]
    figure.legend(
        handles=patches, loc="upper left", bbox_to_anchor=place, ncols=len(patches), fontsize=8, frameon=False,
        handlelength=1.0, handleheight=0.9, columnspacing=1.4, borderpad=0, borderaxespad=0,
    )  # fmt: skip


def _box(page: Axes, x: float, y: float, width: float, height: float, face, edge, dashed: bool = False) -> None:
    page.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.04",
            facecolor=face,
            edgecolor=edge,
            lw=0.8,
            linestyle="--" if dashed else "-",
        )  # fmt: skip
    )


def _text(page: Axes, x: float, y: float, text: str, size: float = TEXT_POINTS, **style) -> None:
    vertical = style.pop("va", "baseline")
    if vertical == "baseline_first":  # y is the baseline of the first line, whatever the number of lines
        for number, line in enumerate(text.split("\n")):
            page.text(x, y + number * LINE, line, fontsize=size, va="baseline", parse_math=False, **style)
        return
    page.text(x, y, text, fontsize=size, va=vertical, parse_math=False, **style)


def _tint(colour: str, strength: float) -> tuple[float, float, float]:
    """The colour on white paper, so strong."""
    return tuple(1 - strength * (1 - channel) for channel in to_rgb(colour))  # type: ignore[return-value]
