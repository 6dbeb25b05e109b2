"""A tiny model's sizes and hand-made batches for the tests of this room."""

import numpy as np
import torch

from moss_train.data.batch import Batch, plain_places
from moss_train.model.config import ModelConfig, TextConfig, VisionConfig

IMAGE = 28


def tiny_config(**changes) -> ModelConfig:
    settings = {
        "name": "test",
        "vision": VisionConfig(
            hidden_size=32, local_layers=3, global_layers=1, attention_heads=2, mlp_size=48, patch_size=7,
            image_size=IMAGE, intermediate_layers=[0, 2],
        ),
        "text": TextConfig(
            vocabulary_size=96, hidden_size=48, layers=5, cross_layers=[1, 3], attention_heads=6, key_value_heads=2,
            mlp_size=64, rope_theta=10000.0, rope_scaling=None,
        ),
        "pool_stride": 2,
        "initial_gate": 0.7,
        "init_std": 0.2,
    }  # fmt: skip
    return ModelConfig(**{**settings, **changes})


def stream(
    rng: np.random.Generator,
    frames: int,
    leading: int = 3,
    window: int | None = None,
    sinks: int = 0,
    jitter: bool = False,
) -> dict:
    """One stream as plain arrays: `leading` tokens, then frame anchors with one to four tokens behind each.

    With `jitter` an anchor changes places with the token before it, unless that is an anchor too.
    """
    anchor = 96
    ids, anchors = list(rng.integers(1, 96, leading)), []
    for _ in range(frames):
        early = [ids.pop()] if jitter and ids and ids[-1] != anchor else []
        anchors.append(len(ids))
        ids += [anchor, *early, *rng.integers(1, 96, rng.integers(1, 5))]
    hi = np.cumsum(np.array(ids) == anchor)
    lo = np.zeros_like(hi) if window is None else np.maximum(hi - window, 0)
    return {
        "ids": np.array(ids),
        "hi": hi,
        "lo": lo,
        "sinks": np.minimum(sinks, hi),
        "anchors": np.array(anchors, dtype=np.int64),
        "frames": torch.from_numpy(rng.integers(0, 256, (frames, 3, IMAGE, IMAGE), dtype=np.uint8)),
    }


def pack(rows: list[list[dict]], padding: int = 0) -> Batch:
    """Rows of streams as a batch; `padding` more padding tokens than needed."""
    tokens = max(sum(len(s["ids"]) for s in row) for row in rows) + padding
    frames = max(sum(len(s["frames"]) for s in row) for row in rows)
    shape = (len(rows), tokens)
    out = {name: torch.zeros(shape, dtype=torch.int64) for name in ("ids", "positions", "lo", "hi", "slo", "shi")}
    segments = torch.full(shape, -1, dtype=torch.int32)
    frame_positions = torch.zeros(len(rows), frames, dtype=torch.int64)
    pixels, frame_rows, frame_slots = [], [], []
    for r, row in enumerate(rows):
        t, f = 0, 0
        for index, s in enumerate(row):
            n, m = len(s["ids"]), len(s["frames"])
            where = slice(t, t + n)
            for name, values in (
                ("ids", s["ids"]), ("positions", np.arange(n)), ("lo", s["lo"] + f), ("hi", s["hi"] + f),
                ("slo", np.full(n, f)), ("shi", s["sinks"] + f),
            ):  # fmt: skip
                out[name][r, where] = torch.from_numpy(np.asarray(values, dtype=np.int64))
            segments[r, where] = index
            frame_positions[r, f : f + m] = torch.from_numpy(s["anchors"])
            pixels.append(s["frames"])
            frame_rows += [r] * m
            frame_slots += range(f, f + m)
            t, f = t + n, f + m
    return Batch(
        ids_RT=out["ids"],
        labels_RT=torch.full(shape, -100),
        kinds_RT=torch.zeros(shape, dtype=torch.uint8),
        weights_RT=torch.ones(shape),
        positions_RT=out["positions"],
        segments_RT=segments,
        visible_lo_RT=out["lo"].int(),
        visible_hi_RT=out["hi"].int(),
        sink_lo_RT=out["slo"].int(),
        sink_hi_RT=out["shi"].int(),
        origins_RT=torch.full_like(out["ids"], -1),
        **plain_places(out["positions"]),
        frames_NCHW=torch.cat(pixels) if pixels else torch.zeros(0, 3, IMAGE, IMAGE, dtype=torch.uint8),
        frame_rows_N=torch.tensor(frame_rows, dtype=torch.int64),
        frame_slots_N=torch.tensor(frame_slots, dtype=torch.int64),
        frame_positions_RF=frame_positions,
        frame_counts_R=torch.tensor([sum(len(s["frames"]) for s in row) for row in rows]),
    )
