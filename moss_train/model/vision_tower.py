"""The vision tower of Llama-3.2-Vision for one-tile frames (`reference/model_facts.md` A.2).

Replicated on every tensor-parallel rank (frames are shared out, not the weights), hence plain torch layers.
Shape suffixes: N frames, C colours, S tokens of a frame (class token, patches, zero padding), V tower width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from moss_train.model.config import VisionConfig

# Mean and deviation of CLIP's training images, which Llama-3.2-Vision's processor normalises with.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

ONE_TILE = 1  # the aspect-ratio id of a picture that fills one tile
PADDING_MULTIPLE = 8  # tokens of a frame are zero-padded to a multiple of this, as the reference's kernels want


def normalise_pixels(frames_NCHW: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 RGB to the tower's input; float frames are taken as normalised already."""
    if frames_NCHW.dtype != torch.uint8:
        return frames_NCHW.to(dtype)
    mean = torch.tensor(IMAGE_MEAN, device=frames_NCHW.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGE_STD, device=frames_NCHW.device).view(1, 3, 1, 1)
    return ((frames_NCHW.float() / 255.0 - mean) / std).to(dtype)


class GatedTileEmbedding(nn.Module):
    """A learnt vector per tile position, added through a tanh gate."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.width = config.hidden_size
        self.embedding = nn.Embedding(config.aspect_ratios + 1, config.max_tiles * config.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x_NSV: torch.Tensor) -> torch.Tensor:
        first_tile = self.embedding.weight[ONE_TILE, : self.width]
        return x_NSV + first_tile * self.gate.tanh()


class GatedPositionEmbedding(nn.Module):
    """Position of a token in its tile, blended with its position in the tiling by a tanh gate."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.tokens, self.width = config.patches + 1, config.hidden_size
        self.embedding = nn.Parameter(torch.zeros(self.tokens, self.width))
        self.tile_embedding = nn.Embedding(config.aspect_ratios + 1, config.max_tiles * self.tokens * self.width)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x_NSV: torch.Tensor) -> torch.Tensor:
        gate = self.gate.tanh()
        first_tile = self.tile_embedding.weight[ONE_TILE, : self.tokens * self.width].view(self.tokens, self.width)
        return x_NSV + (1 - gate) * self.embedding + gate * first_tile


class VisionAttention(nn.Module):
    """Bidirectional attention among the tokens of one frame."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.attention_heads
        for name in ("query", "key", "value", "output"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size, bias=False))

    def forward(self, x_NSV: torch.Tensor, mask_SS: torch.Tensor | None) -> torch.Tensor:
        frames, tokens, width = x_NSV.shape
        split = (frames, tokens, self.heads, width // self.heads)
        q, k, v = (layer(x_NSV).view(split).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_SS)
        return self.output(mixed.transpose(1, 2).reshape(frames, tokens, width))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.mlp_size)
        self.down = nn.Linear(config.mlp_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


class VisionLayer(nn.Module):
    """Pre-norm transformer layer; a global layer's branches pass through tanh gates."""

    def __init__(self, config: VisionConfig, gated: bool):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = VisionAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = VisionMLP(config)
        self.attention_gate = nn.Parameter(torch.full((1,), math.pi / 4)) if gated else None
        self.mlp_gate = nn.Parameter(torch.full((1,), math.pi / 4)) if gated else None

    def forward(self, x_NSV: torch.Tensor, mask_SS: torch.Tensor | None) -> torch.Tensor:
        attended = self.attention(self.attention_norm(x_NSV), mask_SS)
        x_NSV = x_NSV + (attended if self.attention_gate is None else self.attention_gate.tanh() * attended)
        fed = self.mlp(self.mlp_norm(x_NSV))
        return x_NSV + (fed if self.mlp_gate is None else self.mlp_gate.tanh() * fed)


class VisionTower(nn.Module):
    """Encodes frames one by one; no frame sees another."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positions = GatedPositionEmbedding(config)
        self.pre_tile = GatedTileEmbedding(config)
        self.post_tile = GatedTileEmbedding(config)
        self.norm_pre = nn.LayerNorm(width, eps=config.norm_eps)
        self.norm_post = nn.LayerNorm(width, eps=config.norm_eps)
        self.local_layers = nn.ModuleList(VisionLayer(config, gated=False) for _ in range(config.local_layers))
        self.global_layers = nn.ModuleList(VisionLayer(config, gated=True) for _ in range(config.global_layers))

    def forward(self, frames_NCHW: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of each frame, each [N, 1 + patches, V]: the final one first, then the intermediate ones.

        The intermediate maps are the *inputs* of the layers named by `intermediate_layers`.
        """
        pixels = normalise_pixels(frames_NCHW, self.patch_embedding.weight.dtype)
        x_NSV = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x_NSV = self.pre_tile(x_NSV)
        x_NSV = torch.cat([self.class_embedding.expand(x_NSV.shape[0], 1, -1), x_NSV], dim=1)
        x_NSV = self.norm_pre(self.positions(x_NSV))
        tokens = x_NSV.shape[1]
        x_NSV = F.pad(x_NSV, (0, 0, 0, -tokens % PADDING_MULTIPLE))
        mask_SS = self._padding_mask(tokens, x_NSV)

        intermediate = []
        for index, layer in enumerate(self.local_layers):
            if index in self.config.intermediate_layers:
                intermediate.append(x_NSV[:, :tokens])
            x_NSV = layer(x_NSV, mask_SS)
        x_NSV = self.post_tile(self.norm_post(x_NSV))
        for layer in self.global_layers:
            x_NSV = layer(x_NSV, mask_SS)
        return [x_NSV[:, :tokens], *intermediate]

    def _padding_mask(self, tokens: int, x_NSV: torch.Tensor) -> torch.Tensor | None:
        if self.config.full_attention:
            return None
        # Llama-3.2's mask forbids only pairs of padding tokens; pictures do attend to padding.
        padding = torch.arange(x_NSV.shape[1], device=x_NSV.device) >= tokens
        return ~(padding[:, None] & padding[None, :])
