"""`moss-train bench stream`: time to the first token, decoding rate and frame latency, beside a decoder-only model.

The protocol is that of the reference's benchmark (`model_facts.md` E.3): inputs are made outside the timer, one
warm-up, TTFT is prefill and one token, TPS = (N - 1) / (time of N tokens - TTFT); besides it the total of one prefill
and N tokens with the same N for both. The tower is timed apart, since it is the same for both.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moss_train.bench.stream_ours import CrossAttending
from moss_train.bench.stream_theirs import DecoderOnly
from moss_train.errors import ConfigError
from moss_train.parallel import groups
from moss_train.parallel.config import LayoutConfig
from moss_train.streams.sight import Sight

#: figure → least value
AT_LEAST = {"ttft_cold_ratio": 5.0, "ttft_mid_ratio": 20.0, "tps_ratio": 2.7}
#: figure → largest value
AT_MOST = {"frame_latency_growth": 1.1, "cache_growth": 1.0}
_OURS_VISION = 101  #: 560 pixels, patches of 14, pooled by 4, and the class token
_TOWER_FRAMES = 4  #: timed at once


@dataclass
class StreamOptions:
    """Sizes, the same for both models, and what is timed."""

    hidden: int = 512
    """Width of both decoders."""
    layers: int = 4
    """Layers of both decoders, cross layers counted in."""
    cross_layers: list[int] = field(default_factory=lambda: [2])
    """Which of our layers look at the frames; one in five at 11B."""
    heads: int = 8
    """Query heads."""
    key_value_heads: int = 2
    """Key and value heads; a fourth of the query heads, as at 11B."""
    mlp: int = 1408
    """Width of the feed-forward layers."""
    vocabulary: int = 8192
    """Rows of the head."""
    frames: int = 256
    """Frames of the video."""
    their_vision_tokens: int = 200
    """Vision tokens that a frame has in the decoder-only model: Qwen2.5-VL's at 560 pixels, where two pictures share
    400. Ours has 101."""
    prompt_before: int = 12
    """Text tokens before the video."""
    question: int = 24
    """Text tokens of a question, those of its header included."""
    new_tokens: int = 64
    """Tokens of an answer, the same for both."""
    image_size: int = 560
    """Side of a frame in pixels."""
    tower_hidden: int = 128
    """Width of the tower, which is ours for both."""
    tower_layers: int = 3
    """Local layers of the tower; there is a global one besides."""
    window: int = 64
    """Frames that the windowed stream sees, training and serving alike."""
    sinks: int = 2
    """First frames that stay visible beside the window."""
    text_window: int = 1024
    """Text tokens that it sees."""
    text_sinks: int = 64
    """First tokens that stay visible beside the text window."""
    near: int = 128
    """Frame at which the latency of a frame is taken first,"""
    far: int = 4096
    """and last."""
    repeats: int = 2
    """Timed runs of each model, in turns; the median counts. One of the decoder-only model takes a minute."""
    threads: int | None = None
    """Threads of both; null: as many as there are processors."""
    device: str | None = None
    """cpu or cuda; null takes a GPU where there is one. On a GPU both models are bfloat16."""
    quick: bool = False
    """Shows that all of it works: a tiny model, few frames, targets are not judged."""

    def validate(self) -> None:
        """Raise ConfigError for the first field that cannot be."""
        for name, least in (
            ("frames", 1), ("prompt_before", 1), ("question", 1), ("new_tokens", 2), ("repeats", 1), ("window", 1),
            ("sinks", 0), ("text_window", 1), ("text_sinks", 0), ("near", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.far < self.near + 64:
            raise ConfigError(f"far={self.far}: must be at least near + 64 = {self.near + 64}")
        if self.hidden % self.heads or self.heads % self.key_value_heads:
            raise ConfigError(f"heads={self.heads}: must divide hidden and be a multiple of key_value_heads")
        if not self.cross_layers or not all(0 <= layer < self.layers for layer in self.cross_layers):
            raise ConfigError(f"cross_layers={list(self.cross_layers)}: name some of the {self.layers} layers")
        if self.device not in (None, "cpu", "cuda"):
            raise ConfigError(f"device={self.device!r}: legal values are cpu, cuda, null")

    def sized(self) -> "StreamOptions":
        """With `quick` the options of a run that takes seconds."""
        if not self.quick:
            return self
        return replace(
            self, hidden=64, layers=3, cross_layers=[1], heads=4, key_value_heads=2, mlp=96, vocabulary=512, frames=12,
            new_tokens=4, tower_hidden=64, tower_layers=1, window=8, text_window=32, text_sinks=4, near=40, far=120,
            repeats=1,
        )  # fmt: skip


def stream_command(options: StreamOptions) -> int:
    """Live and offline speed beside a decoder-only model of transformers with the same width, depth, heads, head and
    prompt. Prints both sides and one JSON line; `ok` when the targets are met.

    Example: moss-train bench stream quick=true
    """
    sizes = options.sized()
    device = torch.device(sizes.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: there is none")
    threads = torch.get_num_threads()
    torch.set_num_threads(sizes.threads or os.cpu_count() or 1)
    try:
        group = groups.initialize(LayoutConfig()).tensor_group
        measured = measure(sizes, group, device, Console(file=sys.stderr))
    finally:
        torch.set_num_threads(threads)
        groups.shutdown()
    Console().print(table_of(sizes, measured))
    result = verdict(measured, judged=not options.quick)
    print(json.dumps(result))
    return 0 if result["ok"] else 1


def measure(sizes: StreamOptions, group: Any, device: torch.device, console: Console) -> dict[str, float]:
    """Every figure, seconds and ratios, by name."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ours, theirs = CrossAttending(sizes, group, device, dtype), DecoderOnly(sizes, device, dtype)
    vision = ours.model.sizes.tokens_per_frame
    if vision != _OURS_VISION:
        raise ConfigError(f"image_size={sizes.image_size}: makes {vision} vision tokens a frame; take 560 for 101")

    def timed(work: Callable[[], object]) -> float:
        ours.synchronise()
        began = time.perf_counter()
        work()
        ours.synchronise()
        return time.perf_counter() - began

    console.print(f"{device.type}, {dtype}, {torch.get_num_threads()} threads; decoder layers: ours "
                  f"{ours.parameters:,} parameters, theirs {theirs.parameters:,}", highlight=False)  # fmt: skip
    ours.tower_seconds(1)
    tower_s = statistics.median(ours.tower_seconds(_TOWER_FRAMES) for _ in range(sizes.repeats))
    tower_s *= sizes.frames / _TOWER_FRAMES
    console.print(f"tower and projector: {tower_s:.2f} s for {sizes.frames} frames", highlight=False)
    seconds: dict[str, list[float]] = {}
    for side in (ours, theirs):  # warm-up
        side.cold(side.prompt(2) if side is ours else side.prepare(2))
        side.decode(2)
    prompts = {"ours": ours.prompt(sizes.frames), "theirs": theirs.prepare(sizes.frames)}
    for repeat in range(sizes.repeats):
        sides = (("ours", ours), ("theirs", theirs))
        for name, side in sides if repeat % 2 == 0 else sides[::-1]:
            seconds.setdefault(f"{name}.ttft_cold_s", []).append(timed(lambda side=side, n=name: side.cold(prompts[n])))
            rest = timed(lambda side=side: side.decode(sizes.new_tokens - 1))
            seconds.setdefault(f"{name}.decode_s", []).append(rest)
            if side is theirs:
                seconds.setdefault("cache", []).append(theirs.cache_bytes)
                # the question comes after frames and an answer, as ours does below
                asked = [_asked(theirs, sizes, timed) for _ in range(3)]
                seconds.setdefault("theirs.question_s", []).append(statistics.median(asked))
            console.print(f"{name}, run {repeat + 1}: first token {seconds[f'{name}.ttft_cold_s'][-1]:.2f} s, "
                          f"{(sizes.new_tokens - 1) / rest:.1f} tokens a second", highlight=False)  # fmt: skip
    ours.start()
    ours.skip_to(sizes.frames)
    cache = ours.cache_bytes
    ours.question()
    seconds["ours.question_s"] = [timed(ours.question) for _ in range(max(3, sizes.repeats))]
    figures = {name: statistics.median(values) for name, values in seconds.items()}
    figures |= {"tower_s": tower_s, "ours.cache_mb": cache / 1e6, "theirs.cache_mb": figures.pop("cache") / 1e6}
    return figures | _ratios(figures, sizes) | frame_latencies(ours, sizes, console)


def _asked(theirs: DecoderOnly, sizes: StreamOptions, timed: Callable[[Callable[[], object]], float]) -> float:
    taken = timed(theirs.question)
    theirs.forget(sizes.question)
    return taken


def _ratios(figures: dict[str, float], sizes: StreamOptions) -> dict[str, float]:
    """Their time ÷ ours, our rate ÷ theirs."""
    tower_s, rest = figures["tower_s"], sizes.new_tokens - 1
    ours, theirs = ({key: figures[f"{who}.{key}"] for key in ("ttft_cold_s", "decode_s", "question_s")}
                    for who in ("ours", "theirs"))  # fmt: skip
    cold = (theirs["ttft_cold_s"], ours["ttft_cold_s"])
    total = tuple(side["ttft_cold_s"] + side["decode_s"] for side in (theirs, ours))
    return {
        "ours.tps": rest / ours["decode_s"],
        "theirs.tps": rest / theirs["decode_s"],
        "ours.total_s": total[1],
        "theirs.total_s": total[0],
        "ttft_cold_ratio": cold[0] / cold[1],
        "ttft_cold_ratio.with_tower": (cold[0] + tower_s) / (cold[1] + tower_s),
        "ttft_mid_ratio": cold[0] / ours["question_s"],
        "ttft_mid_ratio.incremental": theirs["question_s"] / ours["question_s"],
        "tps_ratio": theirs["decode_s"] / ours["decode_s"],
        "total_ratio": total[0] / total[1],
        "total_ratio.with_tower": (total[0] + tower_s) / (total[1] + tower_s),
    }


def frame_latencies(ours: CrossAttending, sizes: StreamOptions, console: Console) -> dict[str, float]:
    """Latency of a frame (its keys and values, its anchor's step; without the tower) near the stream's beginning and
    far from it, taken in turns: with windows, every frame on the way fed by itself, and without, where the caches are
    filled in long pieces."""
    half = min(32, sizes.near // 2)
    figures: dict[str, float] = {}
    windows = Sight(sizes.window, sizes.sinks, sizes.text_window, sizes.text_sinks)
    for name, sight in (("", windows), (".unbounded", Sight())):
        streams = []
        for at in (sizes.near, sizes.far):
            ours.start(sight)
            at_first = ours.cache_bytes
            advance = ours.fill if name else ours.watch
            advance(at - half)
            streams.append(ours.put_aside())
        near_s, far_s = ours.frame_seconds(streams, 2 * half)
        figures[f"frame_ms{name}.near"], figures[f"frame_ms{name}.far"] = 1e3 * near_s, 1e3 * far_s
        figures[f"frame_latency_growth{name}"] = far_s / near_s
        figures[f"{name.lstrip('.') or 'windowed'}.cache_mb"] = ours.cache_bytes / 1e6
        if not name:
            figures["cache_growth"] = ours.cache_bytes / at_first
        told = f"{1e3 * near_s:.2f} ms at frame {sizes.near}, {1e3 * far_s:.2f} ms at frame {sizes.far}"
        console.print(f"{'without' if name else 'with'} windows: {told}", highlight=False)
    ours.start()
    return figures


def verdict(figures: dict[str, float], judged: bool) -> dict[str, Any]:
    """The last line."""
    failures = []
    if judged:
        few = [(name, "least", bound) for name, bound in AT_LEAST.items() if figures[name] < bound]
        many = [(name, "most", bound) for name, bound in AT_MOST.items() if figures[name] > bound]
        failures = [f"{name} is {figures[name]:.3g}, should be at {end} {bound:g}" for name, end, bound in few + many]
    rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
    return {"name": "bench stream", "ok": not failures, "figures": rounded, "failures": failures}


def table_of(sizes: StreamOptions, figures: dict[str, float]) -> Table:
    """Both sides beside each other."""
    title = (
        f"{sizes.frames} frames, {_OURS_VISION} and {sizes.their_vision_tokens} vision tokens a frame; both decoders "
        f"{sizes.layers} layers of {sizes.hidden}, {sizes.heads}/{sizes.key_value_heads} heads, feed-forward "
        f"{sizes.mlp}, {sizes.vocabulary} rows in the head; prompt {sizes.prompt_before} + {sizes.question} tokens, "
        f"answer {sizes.new_tokens}; tower the same, timed apart"
    )
    table = Table(title=title)
    for heading in ("", "ours", "decoder-only", "ratio", "with the tower"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = (
        ("first token, cold, s", "ttft_cold_s", "ttft_cold_ratio", "ttft_cold_ratio.with_tower"),
        ("tokens a second", "tps", "tps_ratio", None),
        (f"one prefill and {sizes.new_tokens} tokens, s", "total_s", "total_ratio", "total_ratio.with_tower"),
        ("first token of a question, frames in the cache, s", "question_s", "ttft_mid_ratio.incremental", None),
        ("cache after it, MB", "cache_mb", None, None),
    )
    for label, key, ratio, tower in rows:
        cells = [f"{figures[f'{who}.{key}']:.4g}" for who in ("ours", "theirs")]
        cells += [f"{figures[name]:.2f}" if name else "" for name in (ratio, tower)]
        table.add_row(label, *cells)
    asked = (
        f"{figures['ours.question_s']:.4g}",
        f"{figures['theirs.ttft_cold_s']:.4g}",
        f"{figures['ttft_mid_ratio']:.2f}",
    )
    table.add_row("first token of a question: in the stream, as a query of its own, s", *asked, "")
    return table
