"""From feature maps to what the cross layers attend to: pooling, channel interleaving, projection.

Shape suffixes: N frames, S tokens of a map (class token and patches), V tower width, P vision tokens of a
frame after pooling, D channels of all maps together, H decoder width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def pool_map(map_NSV: torch.Tensor, mode: str, stride: int) -> torch.Tensor:
    """Pool the patch grid of one map by `stride`, keeping the class token: [N, S, V] to [N, P, V]."""
    if mode == "none":
        return map_NSV
    class_token, patches = map_NSV[:, :1], map_NSV[:, 1:]
    side = math.isqrt(patches.shape[1])
    grid = patches.transpose(1, 2).unflatten(2, (side, side))
    pooled = F.avg_pool2d(grid, stride) if mode == "average" else F.max_pool2d(grid, stride)
    return torch.cat([class_token, pooled.flatten(2).transpose(1, 2)], dim=1)


def pooled_features(maps: list[torch.Tensor], mode: str, stride: int) -> torch.Tensor:
    """Pool every map, then join channels in the reference's order: [N, P, D].

    The final map fills the first V channels; the intermediate maps follow interleaved channel by channel
    (channel 0 of each, then channel 1 of each, …), not block by block (`model_facts.md` A.2). Pooling before
    joining is exact, because it treats channels alone, and never holds the unpooled D channels.
    """
    final, *intermediate = (pool_map(m, mode, stride) for m in maps)
    if not intermediate:
        return final
    return torch.cat([final, torch.stack(intermediate, dim=-1).flatten(-2)], dim=-1)


class Projector(nn.Linear):
    """One biased linear layer, [N, P, D] to [N, P, H]."""
