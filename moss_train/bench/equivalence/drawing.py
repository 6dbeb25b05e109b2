"""Cases at random: every option of a layout and of its training drawn alone, until the product would accept all."""

from collections.abc import Sequence

import numpy as np

from moss_train.bench.equivalence.cases import PRECISIONS, Case, Problem
from moss_train.bench.equivalence.streams import DIETS
from moss_train.engines.config import ENGINES, OPTIMIZERS
from moss_train.errors import ConfigError
from moss_train.model.config import RECOMPUTED, RecomputeConfig
from moss_train.model.groups import PRESETS
from moss_train.objectives.config import NORMALISERS
from moss_train.parallel.config import FRAME_SHARDING, LayoutConfig

_LAYERS = Problem().model().text.layers
_HALF_SHARE = 0.125  #: of cases in bfloat16, whose tolerances find coarse faults alone
_ANYTHING_SHARE = 0.5  #: of cases on streams of any form; the others are on a diet made to be awkward


def draw_case(rng: np.random.Generator, ranks: int, engines: Sequence[str] = ENGINES) -> Case:
    """A case of one of `engines` that is legal on at most `ranks` processes."""
    engine = str(rng.choice(engines)) if len(engines) > 1 else engines[0]
    while True:
        case = _draw(rng, engine)
        if case.world_size > ranks:
            continue
        try:
            case.check()
        except ConfigError:
            continue
        return case


def _draw(rng: np.random.Generator, engine: str) -> Case:
    half = bool(rng.random() < _HALF_SHARE)
    return Case(
        problem=_draw_problem(rng, half),
        layout=_DRAW_LAYOUT[engine](rng),
        recompute=_draw_recompute(rng),
        precision=PRECISIONS[half],
        pack=_flip(rng),
        micro_batch_rows=int(rng.integers(1, 4)),
        overlap_grad_reduce=_flip(rng),
        # Of megatron alone; drawn for it and refused, three DeepSpeed cases of four would be thrown away.
        overlap_param_gather=engine == "megatron" and _flip(rng),
        engine_name=engine,
    )


def _draw_problem(rng: np.random.Generator, half: bool) -> Problem:
    awkward = [name for name in DIETS if not name.startswith("any")]
    anything = [name for name in DIETS if name.startswith("any")]
    cross_layers = np.flatnonzero(rng.random(_LAYERS) < 0.4).tolist() or [int(rng.integers(_LAYERS))]
    return Problem(
        trainable=str(rng.choice(list(PRESETS))),
        optimizer=str(rng.choice(OPTIMIZERS)),
        clip=float(rng.choice([0.0, 0.3])),
        normaliser=str(rng.choice(NORMALISERS)),
        streams=str(rng.choice(anything if rng.random() < _ANYTHING_SHARE else awkward)),
        cross_layers=tuple(cross_layers),
        pieces=_flip(rng),
        rounded=half,
        seed=int(rng.integers(2**31)),
    )


def _draw_megatron_layout(rng: np.random.Generator) -> LayoutConfig:
    # Pipelines take the largest part of what can go wrong, and of the processes.
    pp, vpp = int(rng.choice([1, 2, 4, 8], p=[0.25, 0.4, 0.25, 0.1])), int(rng.choice([1, 2, 4], p=[0.6, 0.3, 0.1]))
    return LayoutConfig(
        tp=int(rng.choice([1, 2])),
        pp=pp,
        vpp=vpp,
        cp=int(rng.choice([1, 2, 4], p=[0.5, 0.4, 0.1])),
        dp=int(rng.choice([1, 2, 4], p=[0.5, 0.4, 0.1])),
        sp=_flip(rng),
        zero=int(rng.integers(2)),
        frame_shard=str(rng.choice(FRAME_SHARDING)),
        batch_p2p=[None, False, True][int(rng.integers(3))],
        pipeline_split=_draw_split(rng, pp * vpp) if _flip(rng) else None,
    )


def _draw_deepspeed_layout(rng: np.random.Generator) -> LayoutConfig:
    # Stages of ZeRO differ most on many data-parallel processes; pipelines are drawn for what the product accepts.
    pp = int(rng.choice([1, 2, 4], p=[0.7, 0.2, 0.1]))
    return LayoutConfig(
        tp=int(rng.choice([1, 2])),
        pp=pp,
        cp=int(rng.choice([1, 2, 4], p=[0.5, 0.4, 0.1])),
        dp=int(rng.choice([1, 2, 4], p=[0.3, 0.5, 0.2])),
        sp=_flip(rng),
        zero=int(rng.integers(4)),
        frame_shard=str(rng.choice(FRAME_SHARDING)),
        pipeline_split=_draw_split(rng, pp) if pp > 1 and _flip(rng) else None,
    )


_DRAW_LAYOUT = {"megatron": _draw_megatron_layout, "deepspeed": _draw_deepspeed_layout}


def _draw_split(rng: np.random.Generator, chunks: int) -> list[int]:
    """Any split, chunks of no layer among them."""
    ends = np.sort(rng.integers(0, _LAYERS + 1, chunks - 1))
    return np.diff(ends, prepend=0, append=_LAYERS).tolist()


def _draw_recompute(rng: np.random.Generator) -> RecomputeConfig:
    return RecomputeConfig(
        self_layers=str(rng.choice(RECOMPUTED)),
        cross_layers=str(rng.choice(RECOMPUTED)),
        tower=_flip(rng),
        tower_frames=int(rng.integers(1, 4)) if _flip(rng) else None,
    )


def _flip(rng: np.random.Generator) -> bool:
    return bool(rng.integers(2))
