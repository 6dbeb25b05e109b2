"""Streams for the tests of the caches: random rows, the dense computation they are held to, and how they are fed."""

from dataclasses import dataclass

import numpy as np
import torch
from model_cases import IMAGE

from moss_train.model.attention import DenseAttention
from moss_train.model.layers import LayerInputs
from moss_train.streams.sight import Places, Sight

ANCHOR = 96


@dataclass
class Grown:
    """One row as it is in the end."""

    ids: np.ndarray
    frames: torch.Tensor
    places: Places


def grown_rows(seed: int, sight: Sight, shape=((9, 3), (0, 11), (5, 0), (7, 2))) -> list[Grown]:
    """Rows of (frames, leading tokens): up to four tokens behind each anchor."""
    rng = np.random.default_rng(seed)
    rows = []
    for frames, leading in shape:
        ids = list(rng.integers(1, 96, leading))
        for _ in range(frames):
            ids += [ANCHOR, *rng.integers(1, 96, rng.integers(0, 5))]
        ids = np.array(ids)
        pixels = torch.from_numpy(rng.integers(0, 256, (frames, 3, IMAGE, IMAGE), dtype=np.uint8))
        rows.append(Grown(ids, pixels, sight.places(ids == ANCHOR)))
    return rows


@torch.inference_mode()
def dense_logits(model, row: Grown, sight: Sight, stays=None) -> torch.Tensor:
    """Logits [T, V] of one row over boolean masks that are written down from the definition (design 4.2).

    `stays(frame, hi)`: whether a frame is still there for a token that has met `hi` frames; None: as `sight` says.
    """
    tokens, frames = len(row.ids), len(row.frames)
    own = torch.zeros(1, tokens, tokens, dtype=torch.bool)
    cross = torch.zeros(1, tokens, frames, dtype=torch.bool)
    for t in range(tokens):
        for u in range(t + 1):
            near = sight.text_window is None or u > t - sight.text_window
            own[0, t, u] = near or u < sight.text_sinks
        hi = int((row.ids[: t + 1] == ANCHOR).sum())
        for f in range(hi):
            if stays is not None:
                cross[0, t, f] = stays(f, hi)
            else:
                cross[0, t, f] = sight.window is None or f >= hi - sight.window or f < sight.sinks
    places = row.places
    positions, cross_positions, frame_positions = (
        torch.from_numpy(x.astype(np.int64)) for x in (places.positions, places.cross_positions, places.frame_positions)
    )
    inputs = LayerInputs(
        backend=DenseAttention(own, cross),
        text_rotation=model.text_rotation(positions[:, None]),
        cross_rotation=model.text_rotation(cross_positions[:, None]),
        frame_rotation=model.frame_rotation(frame_positions),
        features_NPH=model.encode_frames(row.frames) if frames else None,
        sees_frames_TR1=cross.any(-1).T[..., None] if frames else None,
    )
    return model.decode(torch.from_numpy(row.ids)[:, None], inputs)[:, 0]


def feed(model, state, rows: list[Grown], sight: Sight, at_once, only_last: bool = False) -> list[torch.Tensor]:
    """Logits of each row, fed `at_once(rng)` tokens a row and step, with the frames they meet added just before."""
    rng = np.random.default_rng(1)
    fed, shown, got = [0] * len(rows), [0] * len(rows), [[] for _ in rows]
    while any(n < len(row.ids) for n, row in zip(fed, rows, strict=True)):
        lengths = [min(at_once(rng), len(row.ids) - n) for n, row in zip(fed, rows, strict=True)]
        longest = max(lengths)
        if not longest:
            continue
        arrays = {name: np.zeros((len(rows), longest), np.int64) for name in ("ids", "at", "cross", "lo", "hi", "text")}
        new_rows, positions, pictures = [], [], []
        for r, row in enumerate(rows):
            part, places = slice(fed[r], fed[r] + lengths[r]), row.places
            for name, values in (
                ("ids", row.ids), ("at", places.positions), ("cross", places.cross_positions),
                ("lo", places.visible_lo), ("hi", places.visible_hi), ("text", places.text_lo),
            ):  # fmt: skip
                arrays[name][r, : lengths[r]] = values[part]
            due = int(places.visible_hi[part.stop - 1]) if lengths[r] else shown[r]
            new_rows += [r] * (due - shown[r])
            positions += places.frame_positions[shown[r] : due].tolist()
            pictures += list(row.frames[shown[r] : due])
            shown[r], fed[r] = due, part.stop
        if pictures:
            model.add_frames(state, torch.stack(pictures), torch.tensor(new_rows), torch.tensor(positions))
        t = {name: torch.from_numpy(values) for name, values in arrays.items()}
        logits = model.extend(
            state, t["ids"], t["at"], torch.tensor(lengths), t["lo"], t["hi"], sight.sinks,
            cross_positions_RL=t["cross"], text_lo_RL=t["text"], text_sinks=sight.text_sinks, only_last=only_last,
        )  # fmt: skip
        for r, length in enumerate(lengths):
            if length:
                got[r].append(logits[r][None] if only_last else logits[r, :length])
    return [torch.cat(parts) for parts in got]
