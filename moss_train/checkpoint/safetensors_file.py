"""Writing safetensors files as a stream: hashed while written, without a second copy of anything in memory.

The library's `save_file` copies every tensor into a buffer of its own and leaves the file to be read again for its
checksum. The format is small (https://github.com/huggingface/safetensors#format): eight bytes little-endian, the length
of a JSON header {name: {"dtype", "shape", "data_offsets": [begin, end]}}; the header, padded with spaces; the tensors'
bytes one after the other. Files are read with the library.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moss_train.checkpoint.files import new_checksum

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_ALIGNMENT = 8  #: of the first tensor, as the library writes it
_CHUNK_BYTES = 16 * 1024**2  #: written and hashed at a time
_SYNC_BYTES = 256 * 1024**2  #: handed to the disk at a time, so that the last fsync finds little left to do


@dataclass(frozen=True)
class WrittenFile:
    """A file that is on disk."""

    name: str
    bytes: int
    checksum: str  #: `files.CHECKSUM`


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor that is made block by block when it is its turn to be written, so that it never lies in memory whole."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[torch.Tensor]]  #: its elements in order, of `dtype`

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor | StreamedTensor],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> WrittenFile:
    """Write and fsync one file, tensors in the given order; the directory entry is durable only after it is synced too.

    tensors: on any device; those that are not contiguous or not on the CPU are copied one at a time. `progress` is
    called every few megabytes. OSError when the disk is full or the folder cannot be written.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest, unsynced = new_checksum(), 0
    with path.open("wb", buffering=0) as file:

        def put(part: memoryview | bytes) -> None:
            nonlocal unsynced
            digest.update(part)
            view = memoryview(part)
            while len(view):  # a raw file may take less than it is given
                view = view[file.write(view) :]
            unsynced += len(part)
            if unsynced >= _SYNC_BYTES:
                os.fdatasync(file.fileno())
                unsynced = 0
            progress()

        put(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for block in tensor.blocks() if isinstance(tensor, StreamedTensor) else (tensor,):
                content = _bytes_of(block)
                for start in range(0, len(content), _CHUNK_BYTES):
                    put(content[start : start + _CHUNK_BYTES])
        os.fsync(file.fileno())
    return WrittenFile(path.name, 8 + len(text) + begin, digest.hexdigest())


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements as bytes, without a copy where it is contiguous and on the CPU."""
    if sys.byteorder != "little":
        raise RuntimeError("safetensors files are little-endian; this machine is not")
    if not tensor.numel():
        return memoryview(b"")
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())
