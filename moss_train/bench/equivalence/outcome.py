"""What a training of a few steps leaves behind, by whichever way it was done: figures and full tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moss_train.bench.equivalence.cases import Problem

#: Moments of which the tensors are kept. "fresh": as the model is built. "start": before the first step.
#: "gradient": of the first step, as the optimizer sees it. "first", "last": weights after one and after all steps.
MOMENTS = ("fresh", "start", "gradient", "first", "last")


@dataclass
class Figures:
    """What one optimizer step reported."""

    loss: float
    grad_norm: float
    per_kind: dict[str, float]
    per_kind_count: dict[str, int]


@dataclass
class Outcome:
    """Figures of each step, and the tensors of each moment by canonical parameter name."""

    steps: list[Figures]
    trained: list[str]  #: names of the trained parameters
    tensors: dict[str, dict[str, torch.Tensor]]

    def save_tensors(self, path: Path) -> None:
        """Write the tensors; `read_tensors` reads them back."""
        flat = {f"{moment}/{name}": tensor for moment in self.tensors for name, tensor in self.tensors[moment].items()}
        save_file({name: tensor.detach().float().contiguous().clone() for name, tensor in flat.items()}, path)


def read_tensors(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Moment → name → float32 tensor."""
    tensors: dict[str, dict[str, torch.Tensor]] = {moment: {} for moment in MOMENTS}
    for name, tensor in load_file(path).items():
        moment, _, parameter = name.partition("/")
        tensors[moment][parameter] = tensor
    return tensors


def starting_weights(problem: Problem, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Float32 weights in which nothing is special: no norm is one, no bias zero, no gate like another.

    shapes: of every parameter, by canonical name. Each tensor is a function of its name, its shape and the problem's
    seed alone.
    """
    weights = {}
    for name in sorted(shapes):
        number = int.from_bytes(name.encode(), "little") % (2**31)
        noise = torch.randn(shapes[name], generator=torch.Generator().manual_seed(number + problem.seed))
        centre, spread = _starting_distribution(name, noise.dim())
        weight = centre + spread * noise
        weights[name] = weight.bfloat16().float() if problem.rounded else weight
    return weights


def _starting_distribution(name: str, dimensions: int) -> tuple[float, float]:
    """Mean and deviation. Chosen, by trying, such that little cancels: in a gradient that is a sum of large terms of
    both signs, rounding would be a large part of what is left."""
    if name.endswith("norm.weight"):
        return 1.0, 0.2
    if name.endswith("gate"):
        return 0.7, 0.1
    if name.startswith("embedding."):
        return 0.0, 0.5
    if name.endswith(("query.weight", "key.weight")):
        return 0.0, 0.2
    if name.endswith(("value.weight", "projector.weight")):
        return 0.0, 0.25
    return 0.0, 0.15 if dimensions > 1 else 0.1
