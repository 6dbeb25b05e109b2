"""Tensors in safetensors files, and the index that says which slice of which tensor lies where.

index.json: {"format": …, "tensors": {name: {"shape": […], "dtype": "float32",
             "slices": [{"file": "tensors-00000-00000.safetensors", "key": …, "offsets": […], "shape": […]}]}}}

A slice is the block of the global tensor that starts at `offsets` and has the extent `shape`. A reader needs
nothing else, so whoever wrote the slices, and how many there are, does not matter to it. Writers work side by side,
each into files of its own (`write_part`); one of them puts their parts of the index together (`merge_parts`).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moss_train.checkpoint.files import CHECKSUM, FORMAT, read_json
from moss_train.checkpoint.safetensors_file import WrittenFile, write_safetensors
from moss_train.engines.pieces import Piece, Shape, slices_of
from moss_train.errors import CheckpointError

INDEX = "index.json"
#: A file is closed when the next slice would make it larger than this: small enough that several are hashed at a time.
FILE_BYTES = 128 * 1024**2

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.bfloat16, torch.float16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


def write_part(
    directory: Path,
    writer: int,
    pieces: Iterable[Piece],
    file_bytes: int = FILE_BYTES,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write one writer's pieces, every file fsynced; JSON for `merge_parts`: its files and its part of the index."""
    files: dict[str, Any] = {}
    index: dict[str, Any] = {}
    for number, group in enumerate(_by_file(pieces, file_bytes)):
        name = f"tensors-{writer:05d}-{number:05d}.safetensors"
        written = write_safetensors(directory / name, {_key(piece): piece.tensor for piece in group}, progress=progress)
        files[name] = described(written)
        for piece in group:
            entry = index.setdefault(
                piece.name,
                {
                    "shape": list(piece.whole),
                    "dtype": str(piece.tensor.dtype).removeprefix("torch."),
                    "slices": [],
                },
            )
            entry["slices"].append(
                {
                    "file": name,
                    "key": _key(piece),
                    "offsets": list(piece.offsets),
                    "shape": list(piece.tensor.shape),
                }
            )
    return {"files": files, "tensors": index}


def merge_parts(parts: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of index.json, and {file: {"bytes", CHECKSUM}} of all writers.

    CheckpointError when they disagree about a tensor, or do not cover one: what is saved must be all there is.
    """
    index: dict[str, Any] = {}
    files: dict[str, Any] = {}
    for part in parts:
        files |= part["files"]
        for name, entry in part["tensors"].items():
            known = index.setdefault(name, {"shape": entry["shape"], "dtype": entry["dtype"], "slices": []})
            if (known["shape"], known["dtype"]) != (entry["shape"], entry["dtype"]):
                raise CheckpointError(
                    f"{name} is {known['dtype']} {known['shape']} for one process and {entry['dtype']} "
                    f"{entry['shape']} for another"
                )
            known["slices"] += entry["slices"]
    for name, entry in index.items():
        _require_cover(name, entry)
    return {"format": FORMAT, "tensors": index}, files


def described(written: WrittenFile) -> dict[str, Any]:
    """A file's entry in a manifest."""
    return {"bytes": written.bytes, CHECKSUM: written.checksum}


class TensorIndex:
    """The index of one checkpoint, checked against the files its manifest lists."""

    def __init__(self, directory: Path, files: Iterable[str]):
        """CheckpointError when an entry is malformed, leaves the directory, or does not cover its tensor."""
        self._directory = directory
        self._files = set(files)
        self._opened: dict[str, Any] = {}
        content = read_json(directory / INDEX)
        try:
            if content["format"] != FORMAT:
                raise CheckpointError(f"{directory / INDEX}: not of the format {FORMAT}")
            self._entries: dict[str, Any] = content["tensors"]
            for name, entry in self._entries.items():
                self._check(name, entry)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{directory / INDEX}: malformed ({error!r})") from error

    def shapes(self) -> dict[str, Shape]:
        """Canonical name → global shape."""
        return {name: tuple(entry["shape"]) for name, entry in self._entries.items()}

    def dtype(self, name: str) -> torch.dtype:
        """The precision in which a tensor is kept."""
        return _DTYPES[self._entries[name]["dtype"]]

    def read(self, name: str, offsets: Shape, shape: Shape) -> torch.Tensor:
        """A block of a tensor, on the CPU. One that lies in a single slice is backed by its file until it is copied."""
        entry = self._entries[name]
        block: torch.Tensor | None = None
        for piece in entry["slices"]:
            common = _overlap(offsets, shape, piece["offsets"], piece["shape"])
            if common is None:
                continue
            begin, extent = common
            found = self._slice(name, entry, piece)
            found = found[slices_of(tuple(b - o for b, o in zip(begin, piece["offsets"], strict=True)), extent)]
            if extent == tuple(shape):
                return found
            if block is None:
                block = torch.empty(shape, dtype=_DTYPES[entry["dtype"]])
            block[slices_of(tuple(b - o for b, o in zip(begin, offsets, strict=True)), extent)] = found
        return torch.empty(shape, dtype=_DTYPES[entry["dtype"]]) if block is None else block

    def read_whole(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Whole tensors by name, as `read`."""
        return {name: self.read(name, (0,) * len(shape), shape) for name in names for shape in [self.shapes_of(name)]}

    def shapes_of(self, name: str) -> Shape:
        """Global shape of one tensor."""
        return tuple(self._entries[name]["shape"])

    def _check(self, name: str, entry: dict[str, Any]) -> None:
        where, shape = f"{self._directory / INDEX}: {name}", _sizes(entry["shape"])
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"{where}: unknown dtype {entry['dtype']!r}")
        for piece in entry["slices"]:
            # The manifest's names have been checked, so no slice can point outside the directory.
            if piece["file"] not in self._files:
                raise CheckpointError(f"{where}: {piece['file']!r} is not a file of this checkpoint")
            if not isinstance(piece["key"], str):
                raise TypeError(f"key {piece['key']!r}")
            extents = zip(_sizes(piece["offsets"]), _sizes(piece["shape"]), shape, strict=True)
            if not all(offset + extent <= size for offset, extent, size in extents):
                raise CheckpointError(f"{where}: a slice lies outside the tensor's shape {shape}")
        _require_cover(where, entry)

    def _slice(self, name: str, entry: dict[str, Any], piece: dict[str, Any]) -> torch.Tensor:
        file = piece["file"]
        try:
            if file not in self._opened:
                self._opened[file] = safe_open(self._directory / file, framework="pt", device="cpu")
            tensor = self._opened[file].get_tensor(piece["key"])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._directory / file}: {piece['key']}: cannot be read: {error}") from error
        if list(tensor.shape) != piece["shape"] or tensor.dtype != _DTYPES[entry["dtype"]]:
            raise CheckpointError(
                f"{self._directory / file}: {piece['key']} is {tensor.dtype} {list(tensor.shape)}, "
                f"the index says {entry['dtype']} {piece['shape']} for {name}"
            )
        return tensor


def _sizes(found: Any) -> list[int]:
    """`found`, a list of whole numbers that are not negative; TypeError when it is anything else."""
    if not isinstance(found, list) or not all(type(size) is int and size >= 0 for size in found):
        raise TypeError(f"{found!r} are no sizes")
    return found


def _require_cover(where: str, entry: dict[str, Any]) -> None:
    """Raise CheckpointError unless the slices hold every element of the tensor once: they do when none overlap and
    their sizes add up."""
    shape, slices = entry["shape"], entry["slices"]
    covered = sum(math.prod(piece["shape"]) for piece in slices)
    if covered != math.prod(shape) or not slices:
        raise CheckpointError(f"{where}: the slices hold {covered} of {math.prod(shape)} elements")
    if len(slices) == 1 or not covered:
        return
    # Along the first dimension, a slice can only overlap those that have not ended where it begins.
    running: list[dict[str, Any]] = []
    for piece in sorted((piece for piece in slices if math.prod(piece["shape"])), key=lambda piece: piece["offsets"]):
        running = [other for other in running if other["offsets"][0] + other["shape"][0] > piece["offsets"][0]]
        for other in running:
            if _overlap(piece["offsets"], piece["shape"], other["offsets"], other["shape"]) is not None:
                raise CheckpointError(f"{where}: two slices hold the same elements")
        running.append(piece)


def _overlap(
    offsets: Sequence[int], shape: Sequence[int], other_offsets: Sequence[int], other_shape: Sequence[int]
) -> tuple[Shape, Shape] | None:
    """Offsets and shape of what two blocks have in common; None when that is nothing."""
    begin = tuple(map(max, offsets, other_offsets))
    end = tuple(min(o + s, p + q) for o, s, p, q in zip(offsets, shape, other_offsets, other_shape, strict=True))
    extent = tuple(e - b for b, e in zip(begin, end, strict=True))
    return (begin, extent) if all(size > 0 for size in extent) else None


def _key(piece: Piece) -> str:
    """A slice's name in its file: the tensor's, with the place where it is not the whole of it."""
    if tuple(piece.tensor.shape) == tuple(piece.whole):
        return piece.name
    return f"{piece.name}@{','.join(map(str, piece.offsets))}"


def _by_file(pieces: Iterable[Piece], file_bytes: int) -> list[list[Piece]]:
    files: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        size += piece.tensor.nbytes
        if size > file_bytes and files[-1]:
            files.append([])
            size = piece.tensor.nbytes
        files[-1].append(piece)
    return files if files[0] else []
