"""Tensors in safetensors files, and the index that says which slice of which tensor lies where.

index.json: {"format": …, "tensors": {name: {"shape": […], "dtype": "float32",
             "slices": [{"file": "tensors-00000.safetensors", "key": …, "offsets": […], "shape": […]}]}}}

A slice is the block of the global tensor that starts at `offsets` and has the extent `shape`. A reader needs
nothing else, so whoever wrote the slices, and how many there are, does not matter to it.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moss_train.checkpoint.files import FORMAT, json_bytes, read_json, sync_file, write_durably
from moss_train.errors import CheckpointError

INDEX = "index.json"
FILE_BYTES = 2 * 1024**3  #: a file is closed when the next tensor would make it larger than this

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.bfloat16, torch.float16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


def write_tensors(directory: Path, tensors: Mapping[str, torch.Tensor], file_bytes: int = FILE_BYTES) -> None:
    """Write whole tensors and their index into `directory`, every file fsynced."""
    index: dict[str, Any] = {}
    for number, names in enumerate(_by_file(tensors, file_bytes)):
        file = f"tensors-{number:05d}.safetensors"
        save_file(_plain({name: tensors[name] for name in names}), directory / file)
        sync_file(directory / file)
        for name in names:
            shape = list(tensors[name].shape)
            index[name] = {
                "shape": shape,
                "dtype": str(tensors[name].dtype).removeprefix("torch."),
                "slices": [{"file": file, "key": name, "offsets": [0] * len(shape), "shape": shape}],
            }
    write_durably(directory / INDEX, json_bytes({"format": FORMAT, "tensors": index}, INDEX))


class TensorIndex:
    """The index of one checkpoint, checked against the files its manifest lists."""

    def __init__(self, directory: Path, files: Iterable[str]):
        """CheckpointError when an entry is malformed, leaves the directory, or does not cover its tensor."""
        self._directory = directory
        self._files = set(files)
        content = read_json(directory / INDEX)
        try:
            if content["format"] != FORMAT:
                raise CheckpointError(f"{directory / INDEX}: not of the format {FORMAT}")
            self._entries: dict[str, Any] = content["tensors"]
            for name, entry in self._entries.items():
                self._check(name, entry)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{directory / INDEX}: malformed ({error!r})") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name → global shape."""
        return {name: tuple(entry["shape"]) for name, entry in self._entries.items()}

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Whole tensors on the CPU. A tensor of a single slice is backed by its file until it is copied."""
        tensors, opened = {}, {}
        for name in names:
            entry = self._entries[name]
            parts = []
            for piece in entry["slices"]:
                if piece["file"] not in opened:
                    opened[piece["file"]] = self._open(piece["file"])
                parts.append(self._piece(opened[piece["file"]], name, entry, piece))
            tensors[name] = parts[0][1] if len(parts) == 1 else _assemble(entry, parts)
        return tensors

    def _check(self, name: str, entry: dict[str, Any]) -> None:
        where, shape = f"{self._directory / INDEX}: {name}", entry["shape"]
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"{where}: unknown dtype {entry['dtype']!r}")
        covered = 0
        for piece in entry["slices"]:
            # The manifest's names have been checked, so no slice can point outside the directory.
            if piece["file"] not in self._files:
                raise CheckpointError(f"{where}: {piece['file']!r} is not a file of this checkpoint")
            extents = list(zip(piece["offsets"], piece["shape"], shape, strict=True))
            if not all(0 <= offset and 0 <= extent and offset + extent <= size for offset, extent, size in extents):
                raise CheckpointError(f"{where}: a slice lies outside the tensor's shape {shape}")
            covered += math.prod(piece["shape"])
        if covered != math.prod(shape) or not entry["slices"]:
            raise CheckpointError(f"{where}: the slices hold {covered} of {math.prod(shape)} elements")

    def _open(self, file: str):
        try:
            return safe_open(self._directory / file, framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._directory / file}: cannot be read: {error}") from error

    def _piece(self, opened, name: str, entry: dict[str, Any], piece: dict[str, Any]) -> tuple[Any, torch.Tensor]:
        try:
            tensor = opened.get_tensor(piece["key"])
        except SafetensorError as error:
            raise CheckpointError(f"{self._directory / piece['file']}: {piece['key']}: {error}") from error
        if list(tensor.shape) != piece["shape"] or tensor.dtype != _DTYPES[entry["dtype"]]:
            raise CheckpointError(
                f"{self._directory / piece['file']}: {piece['key']} is {tensor.dtype} {list(tensor.shape)}, "
                f"the index says {entry['dtype']} {piece['shape']} for {name}"
            )
        return piece["offsets"], tensor


def _assemble(entry: dict[str, Any], parts: list[tuple[list[int], torch.Tensor]]) -> torch.Tensor:
    whole = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
    for offsets, part in parts:
        whole[tuple(slice(start, start + size) for start, size in zip(offsets, part.shape, strict=True))] = part
    return whole


def _by_file(tensors: Mapping[str, torch.Tensor], file_bytes: int) -> list[list[str]]:
    files, size = [[]], 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if size > file_bytes and files[-1]:
            files.append([])
            size = tensor.nbytes
        files[-1].append(name)
    return files


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors, none sharing memory with another: safetensors refuses tied ones."""
    plain, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return plain
