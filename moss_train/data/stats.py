"""`data stats`: how long the streams of packed sources are, how well they fill rows, how evenly they load ranks."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np

from moss_train.data.config import OVER_BUDGET, CostConfig, DataConfig, SourceConfig
from moss_train.data.corpus import Corpus
from moss_train.data.decoding.probe import MediaProbe
from moss_train.data.packing import Deal, RowLimits, padding_of
from moss_train.data.shards.index_rows import KINDS
from moss_train.data.shards.lengths import Lengths
from moss_train.data.sources import OpenBlend, open_blend
from moss_train.errors import ConfigError
from moss_train.streams.config import CompilerConfig, TokenizerConfig
from moss_train.streams.tokenizer import load_tokenizer

#: samples whose media are looked up for their durations, drawn evenly when there are more
_DURATIONS = 20_000
#: global batches over which packing is averaged
_STEPS = 50
_BINS = 10
_BAR = 14  #: characters of the longest bar
_PANEL = 43  #: characters of a histogram, and the gap to the next


_INK, _MUTED, _GRID, _BAR_COLOUR = "#1c2530", "#66727f", "#e6eaee", "#2f6fde"


@dataclass
class StatsOptions:
    """Options of `data stats`."""

    path: str
    """Packed folder or URL; several are joined by commas and read as one blend, each once an epoch."""
    pack_text_tokens: int = 4096
    """Text-token budget of a row; the published real-time stage's."""
    pack_frames: int = 256
    """Frame budget of a row."""
    over_budget: str = "skip"
    """What becomes of a longer sample: `skip` or `split`."""
    global_batch_size: int = 256
    """Streams of an optimizer step."""
    micro_batch_rows: int = 1
    """Most rows of a forward pass."""
    ranks: int = 8
    """Data ranks over which a global batch is dealt."""
    cost: CostConfig = field(default_factory=CostConfig)
    """What a stream costs, for the balance of ranks."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Text lengths are in its tokens."""
    compiler: CompilerConfig = field(default_factory=CompilerConfig)
    """Frame rate and limits under which the samples are compiled."""
    workers: int = 1
    """Processes that measure lengths which were never measured."""
    out: str | None = None
    """Picture (.png) of the histograms to write."""

    def validate(self) -> None:
        """Raise ConfigError for the first field that cannot be."""
        for name in ("pack_text_tokens", "pack_frames", "global_batch_size", "micro_batch_rows", "ranks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.over_budget not in OVER_BUDGET:
            raise ConfigError(f"over_budget={self.over_budget!r} is not one of {', '.join(OVER_BUDGET)}")
        if self.out is not None and not self.out.endswith(".png"):
            raise ConfigError(f"out={self.out} must end in .png")
        self.tokenizer.validate()
        self.compiler.validate()


@dataclass(frozen=True)
class KindLengths:
    """Lengths of the units of one kind in one source; a unit is a sample, or a part of one that was split."""

    source: str
    kind: str
    tokens: np.ndarray  #: int [U]
    frames: np.ndarray  #: int [U]
    seconds: np.ndarray  #: float [V], of the videos of the samples looked at


@dataclass(frozen=True)
class PackingFigures:
    """How rows are filled and ranks are loaded, over some global batches."""

    steps: int
    streams_a_row: float
    text_fill: float  #: share of the rows' token budgets that is used
    frame_fill: float
    text_padding: float  #: share of the computed places that is padding: rows are as wide as the widest beside them
    frame_padding: float
    imbalance: float  #: median over steps of the dearest rank's cost ÷ the mean
    worst_imbalance: float
    rows_a_rank: float


def stats_command(options: StatsOptions) -> int:
    """Histograms of text tokens, frames and durations by source and kind; packing, padding and balance of ranks.

    Nothing is decoded; lengths that were never measured are measured first.
    """
    opened = _open(options)
    lengths = [
        part for corpus, own in zip(opened.corpora, opened.lengths, strict=True) for part in by_kind(corpus, own)
    ]
    for corpus, own in zip(opened.corpora, opened.lengths, strict=True):
        print("\n".join(_source_lines(corpus, own, opened, options)))
        for part in (part for part in lengths if part.source == corpus.name):
            print("\n" + "\n".join(_kind_lines(part)))
        print()
    print("\n".join(_packing_lines(packing_figures(opened, options), options)))
    if options.out is not None:
        draw(lengths, Path(options.out))
        print(f"\nhistograms are drawn in {options.out}")
    return 0


def by_kind(corpus: Corpus, lengths: Lengths) -> list[KindLengths]:
    """The lengths of a source for each kind of sample that it holds."""
    kinds = np.asarray(corpus.index.kinds)
    of_units = kinds[lengths.samples]
    numbers = np.unique(np.linspace(0, max(0, len(corpus) - 1), min(_DURATIONS, len(corpus))).astype(np.int64))
    seconds: dict[int, list[float]] = {}
    for number in numbers.tolist():
        videos = (facts for facts in corpus.entry(number).media.values() if isinstance(facts, MediaProbe))
        seconds.setdefault(int(kinds[number]), []).extend(f.duration_s for f in videos if f.container != "image")
    found = []
    for code in np.unique(of_units).tolist():
        here = of_units == code
        own = np.asarray(seconds.get(code, []), np.float64)
        found.append(KindLengths(corpus.name, KINDS[code], lengths.tokens[here], lengths.frames[here], own))
    return found


def packing_figures(opened: OpenBlend, options: StatsOptions) -> PackingFigures:
    """Plan the first global batches of an epoch for all ranks."""
    limits = RowLimits(options.pack_text_tokens, options.pack_frames, options.micro_batch_rows, True)
    steps = min(_STEPS, opened.blend.steps_per_epoch(0))
    rows = streams = 0
    sums = np.zeros(4, np.int64)
    imbalances = []
    for step in range(steps):
        tokens, frames = _lengths_of_batch(opened, step)
        deal = Deal(tokens, frames, limits, options.cost, options.ranks)
        plan = [deal.microbatches(rank) for rank in range(options.ranks)]
        padding = padding_of(plan, tokens, frames)
        sums += [padding.tokens, padding.token_places, padding.frames, padding.frame_places]
        rows += sum(len(microbatch) for own in plan for microbatch in own)
        streams += len(tokens)
        imbalances.append(deal.imbalance)
    return PackingFigures(
        steps=steps,
        streams_a_row=streams / max(1, rows),
        text_fill=sums[0] / max(1, rows * options.pack_text_tokens),
        frame_fill=sums[2] / max(1, rows * options.pack_frames),
        text_padding=1 - sums[0] / max(1, sums[1]),
        frame_padding=1 - sums[2] / max(1, sums[3]),
        imbalance=statistics.median(imbalances),
        worst_imbalance=max(imbalances),
        rows_a_rank=rows / steps / options.ranks,
    )


def _open(options: StatsOptions) -> OpenBlend:
    paths = [path for path in options.path.split(",") if path]
    if not paths:
        raise ConfigError("path= is empty: name a packed folder")
    names = [path.rstrip("/").rpartition("/")[2] for path in paths]
    # Folders of one name are told apart by their whole paths.
    names = [path if names.count(name) > 1 else name for name, path in zip(names, paths, strict=True)]
    data = DataConfig(
        sources={name: SourceConfig(path=path) for name, path in zip(names, paths, strict=True)},
        global_batch_size=options.global_batch_size,
        micro_batch_rows=options.micro_batch_rows,
        pack_text_tokens=options.pack_text_tokens,
        pack_frames=options.pack_frames,
        over_budget=options.over_budget,
        cost=options.cost,
        workers=options.workers,
    )
    return open_blend(data, options.compiler, load_tokenizer(options.tokenizer), 64, seed=0, progress=True)


def _lengths_of_batch(opened: OpenBlend, step: int) -> tuple[list[int], list[int]]:
    entries = opened.blend.global_batch(0, step)
    lengths = [(opened.lengths[source].tokens[unit], opened.lengths[source].frames[unit]) for source, unit in entries]
    return [int(tokens) for tokens, _ in lengths], [int(frames) for _, frames in lengths]


def _source_lines(corpus: Corpus, lengths: Lengths, opened: OpenBlend, options: StatsOptions) -> Iterator[str]:
    figures = opened.figures()[corpus.name]
    yield f"{corpus.name}: {figures.samples:,} samples, {figures.video_hours:.2f} hours of video"
    if figures.split:
        yield f"  {figures.split:,} samples are cut in parts, {len(lengths.samples):,} units together"
    if figures.over_budget:
        share = figures.over_budget / len(lengths.samples)
        remedy = "" if options.over_budget == "split" else ", over_budget=split cuts streams"
        yield (
            f"  {figures.over_budget:,} ({share:.1%}) are longer than a row of {options.pack_text_tokens:,} tokens "
            f"and {options.pack_frames:,} frames and are left out{remedy}"
        )
    if lengths.faults:
        number, reason = next(iter(lengths.faults.items()))
        yield f"  {len(lengths.faults):,} do not compile; the first, {corpus.key(number)!r}: {reason[:90]}"


def _kind_lines(part: KindLengths) -> Iterator[str]:
    yield f"  {part.kind}, {len(part.tokens):,} {'unit' if len(part.tokens) == 1 else 'units'}"
    panels = [histogram("text tokens", part.tokens), histogram("frames", part.frames)]
    if len(part.seconds):
        panels.append(histogram("seconds of video", part.seconds))
    for cells in zip_longest(*panels, fillvalue=""):
        yield "  " + "".join(f"{cell:<{_PANEL}}" for cell in cells).rstrip()


def _packing_lines(found: PackingFigures, options: StatsOptions) -> Iterator[str]:
    def counted(count: int, what: str) -> str:
        return f"{count:,} {what}{'' if count == 1 else 's'}"

    yield (
        f"packing: {counted(options.global_batch_size, 'stream')} a step over {counted(options.ranks, 'rank')}, "
        f"microbatches of at most {counted(options.micro_batch_rows, 'row')}, mean of {counted(found.steps, 'step')}"
    )
    yield f"  streams a row       {found.streams_a_row:8.1f}"
    yield f"  rows a rank         {found.rows_a_rank:8.1f}"
    yield f"  rows are filled     {found.text_fill:8.1%} of {options.pack_text_tokens:,} tokens"
    yield f"                      {found.frame_fill:8.1%} of {options.pack_frames:,} frames"
    yield f"  computed in vain    {found.text_padding:8.1%} of text places, {found.frame_padding:.1%} of frame places"
    yield (
        f"  dearest rank ÷ mean {found.imbalance:8.3f} in the median step, {found.worst_imbalance:.3f} in the worst: "
        f"the others wait {1 - 1 / found.imbalance:.1%} of it"
    )


def histogram(title: str, values: np.ndarray) -> list[str]:
    """Lines of text: the title, some quantiles, and a bar for each bin; the last bin takes all that is longer."""
    if not len(values):
        return [title, "none"]
    edges = bins_of(values)
    counts = np.histogram(values, [*edges[:-1], math.inf])[0]
    least, middle, high, most = np.percentile(values, [0, 50, 95, 100])
    lines = [title, f"median {_short(middle)}, 95% ≤ {_short(high)}, {_short(least)} … {_short(most)}"]
    width = max(len(_short(edge)) for edge in edges)
    for low, end, count in zip(edges, edges[1:], counts, strict=False):
        last = end == edges[-1] and most > end
        span = f"{_short(low):>{width}} – {'more' if last else _short(end):>{max(width, 4)}}"
        bar = "█" * max(round(_BAR * count / counts.max()), 1 if count else 0)
        lines.append(f"{span} {bar:<{_BAR}} {count:,}")
    return lines


def bins_of(values: np.ndarray) -> list[float]:
    """Edges of about ten bins of equal, round widths, from 0 to the 99th percentile or somewhat beyond it."""
    high = float(np.percentile(values, 99))
    raw = max(high / _BINS, 1.0 if np.issubdtype(np.asarray(values).dtype, np.integer) else 0.1)
    unit = 10 ** math.floor(math.log10(raw))
    step = unit * next(factor for factor in (1, 2, 5, 10) if unit * factor >= raw - 1e-9)
    # Half open bins: a value on the last edge needs one more.
    return [step * number for number in range(math.floor(high / step) + 2)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or float(value).is_integer() else f"{value:.1f}"


def draw(lengths: Sequence[KindLengths], path: Path) -> None:
    """The same histograms as a picture: a row for each source and kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(lengths), 3, figsize=(11, 2.4 * len(lengths)), squeeze=False, layout="constrained")
    for row, part in zip(axes, lengths, strict=True):
        for axis, (title, values) in zip(
            row,
            (("text tokens", part.tokens), ("frames", part.frames), ("seconds of video", part.seconds)),
            strict=True,
        ):
            axis.set_axisbelow(True)
            axis.grid(axis="y", color=_GRID)
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.tick_params(colors=_MUTED, length=0, labelsize=8)
            axis.set_title(title, loc="left", fontsize=9, color=_INK)
            if len(values):
                edges = bins_of(values)
                axis.hist(np.minimum(values, edges[-1] - 1e-9), edges, color=_BAR_COLOUR, rwidth=0.9)
            else:
                axis.text(0.5, 0.5, "none", transform=axis.transAxes, ha="center", color=_MUTED)
                axis.set_xticks([])
                axis.set_yticks([])
        row[0].set_ylabel(f"{part.source}\n{part.kind}", fontsize=9, color=_INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
