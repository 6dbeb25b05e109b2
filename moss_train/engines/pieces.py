"""Blocks of whole tensors: what a process holds of the model's state, and where it can read what it needs.

A block begins at `offsets` of the whole tensor and has an extent in every dimension. Weights split over
tensor-parallel processes are one block; a distributed optimizer's shard is a run of the flattened weight, which
`blocks_of_run` cuts into blocks. Saving and loading need no more than this, so neither knows a layout.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A block of a whole tensor, in this process's memory."""

    name: str  #: canonical, as in `protocol.EngineState`
    whole: Shape  #: shape of the whole tensor
    offsets: Shape  #: where the block begins in it
    tensor: torch.Tensor  #: the block; the engine's own memory, not a copy
    constant: bool = False  #: nothing will change it, so that it need not be copied to be written later


class TensorSource(Protocol):
    """Whole tensors, of which any block can be read: a checkpoint, a folder of Hugging Face's, a dictionary."""

    origin: str  #: what it is, for messages

    def shapes(self) -> Mapping[str, Shape]:
        """Canonical name → shape of the whole tensor."""
        ...

    def read(self, name: str, offsets: Shape, shape: Shape) -> torch.Tensor:
        """A block, in the precision it is kept in; backed by its file where possible, so copy it at once."""
        ...


class MemorySource:
    """Tensors of this process as a TensorSource."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], origin: str = "the given tensors"):
        self.origin = origin
        self._tensors = tensors

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, offsets: Shape, shape: Shape) -> torch.Tensor:
        return self._tensors[name][slices_of(offsets, shape)]


def slices_of(offsets: Shape, shape: Shape) -> tuple[slice, ...]:
    """What indexes the block in its whole tensor."""
    return tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))


def blocks_of_run(shape: Shape, start: int, end: int) -> Iterator[tuple[Shape, Shape]]:
    """Offsets and shapes of blocks that make up elements [start, end) of a flattened tensor, in order.

    At most 2·(dimensions − 1) + 1 of them: a part of a row, whole rows, a part of a row, and so on inwards.
    """
    if start >= end:
        return
    if len(shape) <= 1:
        yield ((start,), (end - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows lie between
    if first > last:  # within one row
        yield from _in_row(shape, last, start - last * row, end - last * row)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *([0] * (len(shape) - 1))), (last - first, *shape[1:])
    if last * row < end:
        yield from _in_row(shape, last, 0, end - last * row)


def _in_row(shape: Shape, row: int, start: int, end: int) -> Iterator[tuple[Shape, Shape]]:
    for offsets, extent in blocks_of_run(shape[1:], start, end):
        yield (row, *offsets), (1, *extent)
