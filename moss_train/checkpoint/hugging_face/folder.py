"""Writing a folder that transformers loads: weights in numbered files, streamed, and the small files beside them."""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moss_train.checkpoint import files
from moss_train.checkpoint.hugging_face.mapping import ReferenceTensor, reference_tensors
from moss_train.checkpoint.hugging_face.source import INDEX
from moss_train.checkpoint.safetensors_file import StreamedTensor, write_safetensors
from moss_train.checkpoint.store import CheckpointReader
from moss_train.engines.weights import NAMESPACE
from moss_train.errors import CheckpointError, ConfigError
from moss_train.model.config import ModelConfig
from moss_train.model.video_model import VideoModel
from moss_train.model.vision_tower import IMAGE_MEAN, IMAGE_STD
from moss_train.streams.tokenizer import SpecialTokens

_BLOCK_BYTES = 16 * 1024**2  #: rounded and written at a time
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class WrittenFolder:
    """What `write_folder` wrote."""

    files: int
    tensors: int
    parameters: int
    bytes: int


def parse_bytes(text: str, field: str) -> int:
    """Bytes of `5GB`, `512MiB` or `1000`; ConfigError naming `field` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(f"{field}={text}: give a size such as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def require_empty(out: Path) -> None:
    """Raise ConfigError unless `out` does not exist or is an empty folder: nothing is overwritten."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"out={out}: exists already; give a new folder, or remove what is there")


def write_folder(
    out: Path,
    source: CheckpointReader,
    model: VideoModel,
    texts: Mapping[str, bytes],
    dtype: torch.dtype | None,
    shard_bytes: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> WrittenFolder:
    """Write the weights of `source` under the reference's names, with an index, and `texts` beside them.

    model: a whole one of the same sizes; on the meta device will do. dtype: of all weights; None keeps each tensor's
    own. shard_bytes: a file is closed when the next tensor would make it larger. `progress` is told the bytes written
    and those in all. No more than a block of a tensor is in memory. Everything is written under another name and
    renamed at the end: killed at any instant, it leaves no `out`. CheckpointError when it cannot be written.
    """
    require_empty(out)
    tensors = reference_tensors(model)
    dtypes = {name: dtype or _stored_dtype(source, tensor) for name, tensor in tensors.items()}
    total = sum(torch.Size(tensor.shape).numel() * dtypes[name].itemsize for name, tensor in tensors.items())
    done = 0

    def count(block: torch.Tensor) -> torch.Tensor:
        nonlocal done
        done += block.nbytes
        progress(done, total)
        return block

    convert = _Conversion()

    def streamed(tensor: ReferenceTensor) -> StreamedTensor:
        kind = dtypes[tensor.name]

        def blocks() -> Iterator[torch.Tensor]:
            return (count(convert(block, kind)) for block in _blocks(source, tensor, kind))

        return StreamedTensor(kind, tensor.shape, blocks)

    plan = _by_file({name: streamed(tensor) for name, tensor in tensors.items()}, shard_bytes)
    partial = out.parent / f".tmp-{out.name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        weight_map = {}
        for number, group in enumerate(plan, start=1):
            file = f"model-{number:05d}-of-{len(plan):05d}.safetensors"
            write_safetensors(partial / file, group, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(group, file)
        parameters = sum(torch.Size(tensor.shape).numel() for tensor in tensors.values())
        index = {"metadata": {"total_size": total, "total_parameters": parameters}, "weight_map": weight_map}
        for name, content in {INDEX: files.json_bytes(index, INDEX), **texts}.items():
            files.write_durably(partial / name, content)
        files.sync_directory(partial)
        os.rename(partial, out)  # over an empty folder too
        files.sync_directory(out.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{out}: cannot be written ({error}); nothing is left of it. Free space or mend permissions, then try again"
        ) from error
    return WrittenFolder(len(plan), len(tensors), parameters, total)


class _Conversion:
    """Blocks in another dtype, each in the memory of the one before: allocated anew for every block, it grew by what
    the allocator keeps."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def __call__(self, block: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if block.dtype == dtype:
            return block
        size = block.numel() * dtype.itemsize
        if size > self._memory.numel():
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory[:size].view(dtype).view(block.shape).copy_(block)


def _stored_dtype(source: CheckpointReader, tensor: ReferenceTensor) -> torch.dtype:
    """The dtype in which a checkpoint keeps what becomes one tensor; the widest where its parts differ, because one of
    them was trained and the other frozen."""
    found = [source.dtype(f"{NAMESPACE}/{part.ours}") for part in tensor.parts]
    return max(found, key=lambda dtype: dtype.itemsize)


def _blocks(source: CheckpointReader, tensor: ReferenceTensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The tensor's elements in order, in blocks of whole rows."""
    for part in tensor.parts:
        name, shape = f"{NAMESPACE}/{part.ours}", part.shape
        if not shape:
            yield source.read(name, (), ())
            continue
        row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
        rows = max(1, _BLOCK_BYTES // max(1, row_bytes))
        for first in range(0, shape[0], rows):
            extent = (min(rows, shape[0] - first), *shape[1:])
            yield source.read(name, (first, *(0,) * (len(shape) - 1)), extent)


def _by_file(tensors: Mapping[str, StreamedTensor], shard_bytes: int) -> list[dict[str, StreamedTensor]]:
    groups: list[dict[str, StreamedTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if size > shard_bytes and groups[-1]:
            groups.append({})
            size = tensor.nbytes
        groups[-1][name] = tensor
    return groups


def generation_config(special: SpecialTokens) -> dict[str, Any]:
    """generation_config.json: where transformers' `generate` begins, ends and pads."""
    return {
        "bos_token_id": special.begin_of_text,
        "eos_token_id": [special.end_of_text, special.end_of_turn],
        "pad_token_id": special.padding,
    }


def preprocessor_config(sizes: ModelConfig, tiles: int) -> dict[str, Any]:
    """preprocessor_config.json for transformers' MllamaImageProcessor; `tiles`: most tiles of a picture."""
    side = sizes.vision.image_size
    return {
        "processor_class": "MllamaProcessor",
        "image_processor_type": "MllamaImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_pad": True,
        "resample": 2,  # bilinear
        "rescale_factor": 1 / 255,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
        "size": {"height": side, "width": side},
        "max_image_tiles": tiles,
    }
