"""A small set of cases in which every legal pair of values occurs.

The set stands in `covering_set.json`, a row of values for each case. After a change of the axes below, write it anew:

    python tests/equivalence/covering.py
"""

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from moss_train.bench.equivalence.cases import PRECISIONS, Case, Problem
from moss_train.engines.config import OPTIMIZERS
from moss_train.errors import ConfigError
from moss_train.model.config import RecomputeConfig
from moss_train.model.groups import PRESETS
from moss_train.objectives.config import NORMALISERS
from moss_train.parallel.config import LayoutConfig

FILE = Path(__file__).with_name("covering_set.json")
RANKS = 8  #: the largest layout
SEED = 1  #: of the choice among equally good cases

#: Layers of each chunk by name and number of chunks, for 8 layers of which 1, 4 and 6 attend to frames. "uneven" has
#: chunks without such a layer; "ends" has the embedding alone before the first layer; "head" the head alone after the
#: last.
SPLITS: dict[str, dict[int, list[int]]] = {
    "uneven": {2: [1, 7], 4: [1, 3, 1, 3], 8: [1, 2, 0, 2, 1, 0, 1, 1]},
    "ends": {2: [0, 8], 4: [0, 5, 3, 0], 8: [0, 2, 1, 1, 2, 1, 1, 0]},
    "head": {2: [8, 0], 4: [3, 3, 2, 0], 8: [2, 1, 1, 1, 1, 1, 1, 0]},
}
RECOMPUTE = {
    "none": RecomputeConfig(),
    "selective": RecomputeConfig("selective", "selective"),
    "full": RecomputeConfig("full", "full"),
    "full and tower": RecomputeConfig("full", "full", tower=True, tower_frames=2),
}
LAYOUT_AXES: dict[str, tuple] = {
    "tp": (1, 2),
    "sp": (False, True),
    "pp": (1, 2, 4),
    "vpp": (1, 2),
    "split": ("balanced", *SPLITS),
    "cp": (1, 2),
    "frame_shard": ("tp", "model_parallel"),
    "dp": (1, 2),
    "zero": (0, 1),
}
OTHER_AXES: dict[str, tuple] = {
    "recompute": tuple(RECOMPUTE),
    "precision": PRECISIONS,
    "trainable": tuple(PRESETS),
    "optimizer": OPTIMIZERS,
    "clip": (0.0, 0.3),
    "normaliser": NORMALISERS,
    "streams": ("mixed", "windowed", "text", "images", "sparse"),
    "pack": (True, False),
    "micro_batch_rows": (1, 2),
    "overlap": ("none", "gradients", "gradients and weights"),
}
AXES = LAYOUT_AXES | OTHER_AXES

Row = dict[str, Any]  #: a value for each axis
Pair = tuple[str, Any, str, Any]


def case_of(row: Row) -> Case | None:
    """The case, or None when the product would refuse it or it needs too many processes."""
    pipeline_split = None
    if row["split"] != "balanced":
        pipeline_split = SPLITS[row["split"]].get(row["pp"] * row["vpp"])
        if pipeline_split is None:
            return None
    case = Case(
        problem=Problem(
            rounded=row["precision"] == "bf16",
            **{name: row[name] for name in ("trainable", "optimizer", "clip", "normaliser", "streams")},
        ),
        layout=LayoutConfig(
            pipeline_split=pipeline_split,
            **{name: row[name] for name in LAYOUT_AXES if name != "split"},
        ),
        recompute=RECOMPUTE[row["recompute"]],
        overlap_grad_reduce=row["overlap"] != "none",
        overlap_param_gather=row["overlap"] == "gradients and weights",
        **{name: row[name] for name in ("precision", "pack", "micro_batch_rows")},
    )
    if case.world_size > RANKS:
        return None
    try:
        case.check()
    except ConfigError:
        return None
    return case


def pairs_of(row: Row) -> set[Pair]:
    return {(a, row[a], b, row[b]) for a, b in itertools.combinations(AXES, 2)}


@cache
def legal_pairs() -> frozenset[Pair]:
    """Every pair of values that occurs in some legal case.

    Exhaustive over layouts together with each pair of the other values, the rest at their first.
    """
    plain = {name: values[0] for name, values in AXES.items()}
    pairs: set[Pair] = set()
    for layout in _legal_layouts():
        row = plain | layout
        pairs |= pairs_of(row)
        for name, values in OTHER_AXES.items():
            for value in values:
                changed = row | {name: value}
                if not pairs_of(changed) <= pairs and case_of(changed):
                    pairs |= pairs_of(changed)
    for a, b in itertools.combinations(OTHER_AXES, 2):
        for left, right in itertools.product(OTHER_AXES[a], OTHER_AXES[b]):
            if case_of(plain | {a: left, b: right}):
                pairs.add((a, left, b, right))
    return frozenset(pairs)


@cache
def _legal_layouts() -> tuple[Row, ...]:
    plain = {name: values[0] for name, values in OTHER_AXES.items()}
    rows = [dict(zip(LAYOUT_AXES, values, strict=True)) for values in itertools.product(*LAYOUT_AXES.values())]
    # The plain optimizer may forbid a layout that another allows.
    return tuple(row for row in rows if any(case_of(plain | row | {"optimizer": name}) for name in OPTIMIZERS))


def covering_set() -> list[Row]:
    """The rows as they were chosen."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def choose() -> list[Row]:
    """Rows chosen greedily: each covers as many pairs as can be found that no earlier one has."""
    rng = np.random.default_rng(SEED)
    open_pairs, rows = set(legal_pairs()), []
    while open_pairs:
        row = _best(open_pairs, rng)
        open_pairs -= pairs_of(row)
        rows.append(row)
    return rows


def _best(open_pairs: set[Pair], rng: np.random.Generator) -> Row:
    """Of some candidates built around one open pair, the one that covers most, then the one on fewest processes."""
    layouts, best = _legal_layouts(), None
    a, left, b, right = sorted(open_pairs, key=str)[int(rng.integers(len(open_pairs)))]
    fitting = [row for row in layouts if all(row.get(n, v) == v for n, v in ((a, left), (b, right)))]
    candidates = 0
    while candidates < 60:
        row = dict(fitting[int(rng.integers(len(fitting)))])
        row |= {name: values[int(rng.integers(len(values)))] for name, values in OTHER_AXES.items()}
        row |= {a: left, b: right}
        row = _improved(row, open_pairs, rng, keep={a, b})
        case = case_of(row)
        if case is None:
            continue
        candidates += 1
        score = (len(pairs_of(row) & open_pairs), -case.world_size)
        if best is None or score > best[0]:
            best = (score, row)
    return best[1]


def _improved(row: Row, open_pairs: set[Pair], rng: np.random.Generator, keep: set[str]) -> Row:
    """`row` with each other value replaced by the one that covers most, one axis after another."""
    for name in rng.permutation([name for name in OTHER_AXES if name not in keep]):
        choices = [row | {name: value} for value in OTHER_AXES[name]]
        row = max(choices, key=lambda choice: len(pairs_of(choice) & open_pairs))
    return row


if __name__ == "__main__":
    FILE.write_text("[\n" + ",\n".join(json.dumps(row) for row in choose()) + "\n]\n", encoding="utf-8")
