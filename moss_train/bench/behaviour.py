"""`moss-train bench behaviour`: does each piece of the method teach what it is there for?"""

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from moss_train.bench.behaving.runs import Place, Run, carry_out
from moss_train.bench.behaving.table import summary, table_of
from moss_train.bench.behaving.variants import FULL, SYNTH, VARIANTS
from moss_train.data.shards.pack import pack
from moss_train.data.synthetic.render import RenderOptions, render
from moss_train.errors import ConfigError
from moss_train.synthesis.command import SynthOptions, synth

RATE = 8.0  #: tokens per second of the quickstart's recipe
_QUICK = {"align": 16, "temporal": 8, "sft": 16, "realtime": 24, "heldout": 20}
_QUICK_STEPS = [
    "stages.*.data.global_batch_size=4", "stages.*.log_every=1", "stages.align.steps=2", "stages.temporal.steps=2",
    "stages.sft.steps=2", "stages.realtime.steps=2",
]  # fmt: skip


@dataclass
class BehaviourOptions:
    """Which variants are trained, how often, and where."""

    out: str = "outputs/behaviour"
    """Folder for the clips, the runs and their record `runs.jsonl`. What is recorded there is not done again."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Seeds of weights, order and augmentations; every variant is trained with each, on the same clips."""
    variants: list[str] = field(default_factory=list)
    """Names, see the table that is printed; empty: all of them."""
    at_once: int = 2
    """Trainings at a time, each with one thread."""
    limit_s: float = 300.0
    """Seconds that the training of a real-time stage may take; one that takes longer ends the verb."""
    overrides: list[str] = field(default_factory=list)
    """More overrides of `moss-train train recipe=quickstart` for all trainings."""
    quick: bool = False
    """A few clips and two steps a stage: shows that all of it works; its figures mean nothing and have no targets."""

    def validate(self) -> None:
        """Raise ConfigError for the first field that cannot be."""
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown:
            raise ConfigError(f"variants: {', '.join(unknown)} is none of {', '.join(VARIANTS)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(f"seeds={self.seeds}: give different numbers from 0 on, at least one")
        if self.at_once < 1:
            raise ConfigError(f"at_once={self.at_once}: must be at least 1")
        if not self.limit_s > 0:
            raise ConfigError(f"limit_s={self.limit_s}: must be above 0 seconds")

    @property
    def names(self) -> list[str]:
        """The variants, in the order of the table."""
        return [name for name in VARIANTS if not self.variants or name in self.variants]


def behaviour_command(options: BehaviourOptions) -> int:
    """Train the quickstart's real-time stage with each of its pieces taken away, several seeds each, and score all of
    them on held-out streams: combinations and timings that training never shows.

    All variants of a seed start from the same earlier stages. Interrupted, it goes on where it stopped. Prints a table
    with what each piece is worth, then JSON: means over the seeds and their standard deviations.
    """
    console, began = Console(stderr=True), time.monotonic()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    overrides = (*(_QUICK_STEPS if options.quick else ()), *options.overrides)
    place = Place(out, overrides, 1, options.limit_s)
    prepare_data(place, _QUICK if options.quick else {}, console)
    runs = [Run(seed, None) for seed in options.seeds]
    runs += [Run(seed, VARIANTS[name]) for seed in options.seeds for name in options.names]

    def say(row: dict[str, Any]) -> None:
        told = {} if "figures" not in row else row["figures"]
        figures = ", ".join(
            f"{name} {told[name]:.3f}" for name in ("speak_f1", "revision_accuracy") if told.get(name) is not None
        )
        console.print(
            f"seed {row['seed']}, {row['variant']}: {row['training_s']:.0f} s  {figures}", highlight=False, markup=False
        )

    rows = carry_out(runs, place, options.at_once, say)
    scored = {key: row for key, row in rows.items() if "figures" in row and key[0] in options.seeds}
    console.print(table_of(scored, options.names), highlight=False)
    result = summary(scored, options.names, targets=not options.quick)
    result["figures"]["seconds"] = round(time.monotonic() - began)
    print(json.dumps(result), flush=True)
    return 0 if result["ok"] else 1


def prepare_data(place: Place, clips: dict[str, int], console: Console) -> None:
    """Rendered clips, the streams synthesised from their captions, and all of it packed, made where it is missing."""
    rendered, marker = place.out / "clips", place.clips
    render(RenderOptions(out=str(rendered), overwrite=True, **clips), progress=True)
    made_from = (rendered / "render.json").read_bytes()
    if marker.is_file() and marker.read_bytes() == made_from:
        return
    shutil.rmtree(place.out / "data", ignore_errors=True)
    console.print("packing the clips", highlight=False)
    for source in ("train/align", "train/temporal", "train/sft", "train/realtime", "heldout/realtime", "heldout/sft"):
        pack(rendered / source, place.data(source))
    synth(
        SynthOptions(
            source="rendered",
            path=str(rendered / "train" / FULL.source),
            out=str(place.out / "synth"),
            tokens_per_second=RATE,
            overwrite=True,
        )
    )
    pack(place.out / "synth", place.data(f"train/{SYNTH.source}"))
    marker.write_bytes(made_from)
