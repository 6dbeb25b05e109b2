"""What a model says of every token of compiled rows: in one forward pass, and through the key-value caches.

The caches are how a model is served, and how one is run of which several processes hold a part each. Both ways agree up
to rounding, for any layout of rows, jittered or windowed; `largest_deviation` measures that.

Shape suffixes: R rows, T tokens, V vocabulary, L tokens fed at once, N frames of all rows, C colour channels, H, W
pixels, F frames.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from moss_train.data.batch import Batch
from moss_train.data.collate import collate
from moss_train.model.predictions import Predictions
from moss_train.parallel.phases import beat
from moss_train.streams.compiled import CompiledStream
from moss_train.streams.sight import Sight

_FRAMES_AT_ONCE = 256  #: encoded in one go


@torch.inference_mode()
def predictions_at_once(model: Any, rows: Sequence[CompiledStream], frames_FCHW: Sequence[torch.Tensor]) -> Predictions:
    """Predictions of rows of one stream each, padded to the longest, in one forward pass as in training; `model` is
    whole on this process."""
    batch = collate([[pair] for pair in zip(rows, frames_FCHW, strict=True)])
    return model.predictions(batch.to(next(model.parameters()).device))


@torch.inference_mode()
def predictions_in_lockstep(
    model: Any, rows: Sequence[CompiledStream], frames_FCHW: Sequence[torch.Tensor]
) -> Predictions:
    """The same through the caches, `model` being what this process holds. Every process of a model-parallel group must
    call it with the same rows, and gets all predictions, of the whole vocabulary."""
    longest = max(len(row.ids) for row in rows)
    state = model.start_streams(len(rows), longest, max(1, *map(len, frames_FCHW)))
    device = state.device
    pictures_NCHW = torch.cat(list(frames_FCHW))
    rows_N = torch.tensor([number for number, row in enumerate(rows) for _ in row.frames], dtype=torch.long)
    positions_N = torch.from_numpy(np.concatenate([row.frame_positions for row in rows]).astype(np.int64))
    for start in range(0, len(rows_N), _FRAMES_AT_ONCE):
        beat()
        part = slice(start, start + _FRAMES_AT_ONCE)
        model.add_frames(state, pictures_NCHW[part].to(device), rows_N[part], positions_N[part])

    def padded_RL(field: str) -> torch.Tensor:
        values = [getattr(row, field) for row in rows]
        return torch.from_numpy(np.stack([np.pad(own, (0, longest - len(own))) for own in values]).astype(np.int64))

    beat()
    # All frames are there, and each token looks at those it may see. Ranges stay on the CPU, where caches read them.
    logits_RTV = model.extend(
        state,
        padded_RL("ids").to(device),
        padded_RL("positions").to(device),
        torch.tensor([len(row.ids) for row in rows]),
        visible_lo_RL=padded_RL("visible_lo"),
        visible_hi_RL=padded_RL("visible_hi"),
        sinks=rows[0].sinks,
        cross_positions_RL=padded_RL("cross_positions").to(device),
        text_lo_RL=padded_RL("text_lo"),
        text_sinks=rows[0].text_sinks,
    )
    decisions_RT = state.decisions_RL
    return Predictions(logits_RTV.transpose(0, 1), None if decisions_RT is None else decisions_RT.T)


@torch.inference_mode()
def incremental_logits(
    model: Any, stream: CompiledStream, frames_FCHW: torch.Tensor, sight: Sight | None = None
) -> torch.Tensor:
    """Logits [T, V] of a compiled stream, run through the caches in the order in which its tokens see its frames.

    Each frame is added just before the first token that may see it; between two frames the tokens are fed at once.
    Equal to the full forward up to rounding, for any layout, jittered or windowed. With the `sight` of its compiler,
    what lies beyond its windows is evicted; None keeps all.
    """
    device = next(model.parameters()).device
    length = len(stream.ids)
    state = model.start_streams(1, length, max(1, len(stream.frames)), sight=sight)
    pieces = []
    start = added = 0
    while start < length:
        seen = int(stream.visible_hi[start])
        if seen > added:
            model.add_frames(
                state,
                frames_FCHW[added:seen].to(device),
                torch.zeros(seen - added, dtype=torch.long, device=device),
                torch.as_tensor(stream.frame_positions[added:seen], dtype=torch.long, device=device),
            )
            added = seen
        end = start + 1
        while end < length and stream.visible_hi[end] == seen:
            end += 1

        def row(values: Any, dtype: torch.dtype, part: slice = slice(start, end)) -> torch.Tensor:
            return torch.as_tensor(values[part], dtype=dtype, device=device)[None]

        logits_RLV = model.extend(
            state,
            row(stream.ids, torch.long),
            row(stream.positions, torch.long),
            torch.tensor([end - start], device=device),
            visible_lo_RL=row(stream.visible_lo, torch.int32),
            visible_hi_RL=row(stream.visible_hi, torch.int32),
            sinks=stream.sinks,
            cross_positions_RL=row(stream.cross_positions, torch.long),
            text_lo_RL=row(stream.text_lo, torch.int32),
            text_sinks=stream.text_sinks,
        )
        pieces.append(logits_RLV[0])
        start = end
    return torch.cat(pieces)


def largest_deviation(
    model: Any, batch: Batch, stream: CompiledStream, frames_FCHW: torch.Tensor, sight: Sight | None = None
) -> float:
    """Largest absolute difference of the logits at the slots, incremental against teacher-forced.

    `batch` holds `stream` alone in its only row.
    """
    at_slots = [slot.position for slot in stream.slots]
    with torch.inference_mode():
        full_TV = model(batch.to(next(model.parameters()).device))[:, 0]
    step_TV = incremental_logits(model, stream, frames_FCHW, sight)
    return float((full_TV[at_slots] - step_TV[at_slots]).abs().max())
