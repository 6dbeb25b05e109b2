"""What planning costs and leaves empty, on a blend of the lengths of real-time training, and what a trainer waits for.

The blend is that of `sources.SHARES` and its lengths; its clips are tiny, so that many batches can really be delivered.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from omegaconf import OmegaConf

from moss_train.bench.data_loading.clips import ClipSpec, encode_clip, still_picture
from moss_train.bench.data_loading.sources import (
    MOST_S,
    SHARES,
    Staged,
    image_sample,
    stage,
    stream_sample,
    stream_seconds,
    text_sample,
    words,
)
from moss_train.data.batch import ALL_FRAMES, Batch
from moss_train.data.collate import padding_of_batches
from moss_train.data.config import DataConfig, SourceConfig
from moss_train.data.loader import build_loader
from moss_train.data.packing import Deal, Padding, RowLimits, padding_of, plan_rows, stream_costs
from moss_train.data.planning import Place, Planner
from moss_train.data.shards.pack import pack
from moss_train.data.sources import OpenBlend, open_blend
from moss_train.errors import DataError
from moss_train.locations import shipped_directory
from moss_train.report.metrics_file import read_metrics
from moss_train.streams.config import CompilerConfig, TokenizerConfig
from moss_train.streams.tokenizer import load_tokenizer

#: pixels of the tiles in which the tiny clips are delivered
_TILE = 16
_RANKS = 64  #: of the simulated imbalance
_MEAN_WORDS = {"text": 260.0, "image": 45.0}  #: of a log-normal with σ 0.8; not published


@dataclass(frozen=True)
class PlanFigures:
    """Figures of planning; padding is the share of places in delivered microbatches that hold nothing."""

    text_padding: float
    frame_padding: float
    text_padding_8_rows: float  #: the same, planned with up to eight rows a microbatch, which are padded to the longest
    frame_padding_8_rows: float
    imbalance: float  #: cost of the rank with most work ÷ the mean over ranks
    plan_ms: float  #: median for one global batch, CPU time of the thread that plans
    streams: int  #: of the global batch whose padding is measured, and
    data_ranks: int  #: over so many ranks
    largest_batch: int  #: of imbalance and plan_ms


def realtime_stage() -> tuple[DataConfig, CompilerConfig]:
    """Budgets and compiler of the shipped real-time stage; the sources are left out."""
    path = shipped_directory("recipes") / "stage" / "realtime.yaml"
    recipe: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["data"].pop("sources")
    data = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), recipe["data"]))
    compiler = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CompilerConfig), recipe["compiler"]))
    return data, compiler  # type: ignore[return-value]


def make_blend(folder: Path, samples: int) -> Path:
    """A packed source of `samples` samples of the blend, made where it is not there already."""
    packed = folder / f"lengths-{samples}"
    if not packed.exists():
        staging = folder / f"staging-lengths-{samples}"
        shutil.rmtree(staging, ignore_errors=True)
        stage(staging, blend_samples(samples))
        pack(staging, packed)
        shutil.rmtree(staging)
    return packed


def blend_samples(samples: int, seed: int = 0) -> list[Staged]:
    """Samples by the shares of the blend; half of the videos are streams."""
    clip = encode_clip(ClipSpec(MOST_S, 32, 32, 0, rate=1, gop=8, preset="ultrafast"))
    still = still_picture(0, 32, 32)
    counts = {name: round(share * samples) for name, share in SHARES.items()}
    rng = np.random.default_rng(seed)
    made: list[Staged] = []
    for number in range(counts["text"]):
        made.append(text_sample(f"text{number:05d}", _word_count(rng, "text")))
    for number in range(counts["image"]):
        key = f"image{number:05d}"
        made.append(Staged(key, image_sample(key, _word_count(rng, "image")), {"jpg": still}))
    videos = samples - len(made)
    for number, seconds in enumerate(stream_seconds(videos // 2, seed)):
        key = f"stream{number:05d}"
        made.append(Staged(key, stream_sample(key, round(float(seconds), 2), number), {"mp4": clip}))
    for number in range(videos - videos // 2):
        key, end = f"offline{number:05d}", round(float(rng.uniform(6, 20)), 2)
        made.append(Staged(key, _question(key, end, int(rng.integers(10, 80))), {"mp4": clip}))
    return made


def _question(key: str, end_s: float, count: int) -> dict:
    messages = [
        {"role": "user", "content": "<|video|>" + words(12, count)},
        {"role": "assistant", "content": words(count, count + 1)},
    ]
    media = [{"id": "m0", "kind": "video", "member": "mp4"}]
    sample = {"schema": "moss_train/conversation@1", "id": key, "media": media, "messages": messages}
    return sample | {"sampling": {"fps": 1.0, "end_s": end_s}}


def _word_count(rng: np.random.Generator, kind: str) -> int:
    return int(np.clip(rng.lognormal(np.log(_MEAN_WORDS[kind]) - 0.32, 0.8), 5, 1500))


def plan_figures(packed: Path, batch: int, data_ranks: int, largest: int, repeats: int) -> PlanFigures:
    """Deliver a global batch of `batch` streams on each of `data_ranks` ranks in turn; plan batches of `largest`."""
    data, compiler = realtime_stage()
    data = replace(data, sources={"blend": SourceConfig(path=str(packed))}, workers=0, prefetch=0)
    tokenizer = load_tokenizer(TokenizerConfig())
    delivered: list[Batch] = []
    for rank in range(data_ranks):
        config = replace(data, global_batch_size=batch)
        with build_loader(config, compiler, tokenizer, _TILE, 0, data_rank=rank, data_ranks=data_ranks) as loader:
            delivered += next(loader).microbatches
    config = replace(data, global_batch_size=largest)
    opened = open_blend(config, compiler, tokenizer, _TILE, seed=0)
    wide = _padding_of_wide(opened, data, batch, data_ranks)
    return PlanFigures(
        *padding_of_batches(delivered),
        wide.text,
        wide.frame,
        statistics.median(_imbalance(opened, config, epoch) for epoch in range(repeats)),
        1e3 * statistics.median(_plan_seconds(opened, config, repeats)),
        batch,
        data_ranks,
        largest,
    )


def _padding_of_wide(opened: OpenBlend, data: DataConfig, batch: int, data_ranks: int) -> Padding:
    """Of as large a batch with eight rows a microbatch."""
    units = opened.blend.global_batch(0, 0)[:batch, 1]
    tokens, frames = opened.lengths[0].tokens[units].tolist(), opened.lengths[0].frames[units].tolist()
    plan = plan_rows(tokens, frames, RowLimits.of(replace(data, micro_batch_rows=8)), data.cost, data_ranks)
    return padding_of(plan, tokens, frames)


def _plan_seconds(opened: OpenBlend, data: DataConfig, repeats: int) -> list[float]:
    planner = Planner(opened, RowLimits.of(data), data.cost, Place(0, _RANKS, ALL_FRAMES, 1))
    seconds = []
    for epoch in range(repeats):
        opened.blend.global_batch(epoch, 0)  # the order of an epoch is worked out once, for all its batches
        began = time.thread_time()
        planner.plan(epoch, 0)
        seconds.append(time.thread_time() - began)
    return seconds


def _imbalance(opened: OpenBlend, data: DataConfig, epoch: int) -> float:
    """Over the ranks, from the rows that each of them gets."""
    units = opened.blend.global_batch(epoch, 0)[:, 1]
    tokens, frames = opened.lengths[0].tokens[units].tolist(), opened.lengths[0].frames[units].tolist()
    costs = stream_costs(data.cost, tokens, frames)
    deal = Deal(tokens, frames, RowLimits.of(data), data.cost, _RANKS)
    loads = [
        sum(costs[stream] for rows in deal.microbatches(rank) for row in rows for stream in row)
        for rank in range(_RANKS)
    ]
    return max(loads) * _RANKS / sum(loads)


def data_wait(folder: Path, clips: int, batch: int, epochs: int) -> tuple[float, int]:
    """Median share of a step waited for data after the first epoch, and the steps it is of.

    The quickstart's model and real-time stage, trained on `clips` rendered clips with one decoder process.
    Raises DataError when rendering, packing or training fails.
    """
    if not (folder / "packed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        counts = ("align=0", "temporal=0", "sft=0", f"realtime={clips}", "heldout=1")
        _moss("data", "render", f"out={folder / 'clips'}", *counts)
        _moss("data", "pack", f"source={folder / 'clips' / 'train' / 'realtime'}", f"out={folder / 'packed'}")
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    steps = epochs * clips // batch
    _moss(
        "train",
        "recipe=realtime",
        "model=tiny",
        "precision=fp32",
        f"output_dir={run}",
        f"stages.realtime.data.sources.realtime.path={folder / 'packed'}",
        "stages.realtime.init=scratch",
        "stages.realtime.epochs=null",
        "stages.realtime.compiler.jitter_probability=0",
        "stages.realtime.compiler.tokens_per_second=8",
        f"stages.realtime.steps={steps}",
        "stages.realtime.save_every=0",
        "stages.realtime.log_every=1",
        f"stages.realtime.data.global_batch_size={batch}",
        "stages.realtime.data.workers=1",
    )
    rows = read_metrics(run / "metrics.jsonl")
    waits = [row.metrics["data_wait"] for row in rows if row.step > clips // batch and "data_wait" in row.metrics]
    if not waits:
        raise DataError(f"{run} holds no step after the first epoch")
    return statistics.median(waits), len(waits)


def _moss(*arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "moss_train", *arguments], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise DataError(f"moss-train {' '.join(arguments[:2])} failed: {(done.stderr or done.stdout).strip()[-800:]}")
