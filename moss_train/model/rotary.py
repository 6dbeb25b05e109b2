"""Rotary positions (Su et al. 2021) with Llama 3's frequency scaling, shared by text and frames."""

import math

import torch
from torch import nn

from moss_train.model.config import RopeScaling


def rotary_frequencies(head_size: int, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """Inverse wavelengths, float32 [head_size / 2].

    `scaling` is Llama 3.1's: long wavelengths are stretched by `factor`, short ones kept, and those between
    `original_max_positions / high` and `/ low` interpolated (transformers `_compute_llama3_parameters`).
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size)
    if scaling is None:
        return frequencies
    low_wavelength = scaling.original_max_positions / scaling.low_frequency_factor
    high_wavelength = scaling.original_max_positions / scaling.high_frequency_factor
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > low_wavelength, frequencies / scaling.factor, frequencies)
    smooth = (scaling.original_max_positions / wavelengths - scaling.low_frequency_factor) / (
        scaling.high_frequency_factor - scaling.low_frequency_factor
    )
    interpolated = (1 - smooth) * stretched / scaling.factor + smooth * stretched
    between = ~(wavelengths < high_wavelength) & ~(wavelengths > low_wavelength)
    return torch.where(between, interpolated, stretched)


class RotaryTable(nn.Module):
    """Turns integer positions of any shape [...] into cosines and sines [..., head_size], float32."""

    def __init__(self, head_size: int, theta: float, scaling: RopeScaling | None):
        super().__init__()
        # A plain attribute: recomputed from the config, never part of a checkpoint, never cast to bf16.
        self.frequencies = rotary_frequencies(head_size, theta, scaling)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        angles = positions.float()[..., None] * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the channel pairs (i, i + d/2) of `x` [..., d]; `cos` and `sin` broadcast against it."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cos.to(x.dtype)) + (turned * sin.to(x.dtype))
