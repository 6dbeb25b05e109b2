"""Two properties that every model must have, as figures: the future changes nothing, and serving equals training.

* `future_frame_deviation`: frames from f on are replaced by noise; the largest change of a logit of any token that sees
  only earlier frames (`visible_hi ≤ f`), over a few f. Exactly 0: such a token's row is computed from the same numbers.
* `incremental_deviation`: the largest difference of a logit at any slot between one forward pass and the key-value
  caches, eviction by windows included. 0 up to rounding (1e-5 in float32).

Shape suffixes: T tokens, V vocabulary, F frames, C colour channels, H, W pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch

from moss_train.data.collate import collate
from moss_train.evaluate.prepared import PreparedCorpus, PreparedStream, Share
from moss_train.evaluate.row_predictions import largest_deviation
from moss_train.evaluate.runner import evaluating
from moss_train.streams.compiled import CompiledStream
from moss_train.streams.sight import Sight

_CUTS = 3  #: how many f are tried in each stream


def invariance_figures(model: Any, prepared: PreparedCorpus[PreparedStream], streams: int) -> dict[str, float]:
    """Both figures, the worst of the first `streams` streams."""
    few = PreparedCorpus(prepared.items[:streams], {}, prepared.compiler, prepared.cache)
    worst = {"future_frame_deviation": 0.0, "incremental_deviation": 0.0}
    with evaluating(model):
        for items, frames in few.batches(Share(), 1, {}):
            compiled, frames_FCHW = items[0].compiled, frames[0]
            batch = collate([[(compiled, frames_FCHW)]])
            found = (
                future_frame_deviation(model, compiled, frames_FCHW),
                largest_deviation(model, batch, compiled, frames_FCHW, Sight.of(prepared.compiler)),
            )
            worst = {name: max(value, new) for (name, value), new in zip(worst.items(), found, strict=True)}
    return worst


@torch.inference_mode()
def future_frame_deviation(
    model: Any, stream: CompiledStream, frames_FCHW: torch.Tensor, cuts: Sequence[int] | None = None
) -> float:
    """The largest change of a logit of a token that sees none of the frames that were replaced. `cuts`: from which
    frames on; by default some that are spread over the stream."""
    count = len(frames_FCHW)
    if cuts is None:
        cuts = sorted({round(count * part / (_CUTS + 1)) for part in range(_CUTS + 1)} - {count}) if count else []
    noise = torch.randint(
        0, 256, tuple(frames_FCHW.shape), dtype=frames_FCHW.dtype, generator=torch.Generator().manual_seed(0)
    )
    device = next(model.parameters()).device
    before_TV = model(collate([[(stream, frames_FCHW)]]).to(device))[:, 0]
    worst = 0.0
    for cut in cuts:
        changed = torch.cat([frames_FCHW[:cut], noise[cut:]])
        after_TV = model(collate([[(stream, changed)]]).to(device))[:, 0]
        blind = torch.from_numpy(stream.visible_hi <= cut).to(device)
        if blind.any():
            worst = max(worst, float((after_TV[blind] - before_TV[blind]).abs().max()))
    return worst
