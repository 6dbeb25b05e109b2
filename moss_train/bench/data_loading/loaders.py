"""The three loaders of the comparison, each over the same shards, with one worker, until every sample came once.

The others decode every picture with decord, one thread, `get_batch` of ascending indices at the size of the tile, as
their users do: the index of time t is ⌊t · rate⌋. Which moments are asked for is told to them, so that they need not
compile anything; stills are decoded by our function in all three.
"""

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from moss_train.bench.data_loading.sources import Asked, CaseSources
from moss_train.data.batch import FrameShare
from moss_train.data.config import DataConfig, SourceConfig
from moss_train.data.decoding.decode import decode_arrays, fitted_size
from moss_train.data.loader import build_loader
from moss_train.errors import DataError
from moss_train.streams.config import CompilerConfig, TokenizerConfig
from moss_train.streams.tokenizer import load_tokenizer

#: (key, number of the first picture among the sample's, pictures uint8 [F, 3, S, S])
Delivered = tuple[str, int, torch.Tensor]
Run = Callable[[CaseSources, int, int], Iterator[Delivered]]

OURS, WEBDATASET, ENERGON = "ours", "webdataset", "energon"


def ours(case: CaseSources, size: int, rank: int) -> Iterator[Delivered]:
    """`build_loader`, one decoder process; of a microbatch's pictures rank `rank` gets its share."""
    data = DataConfig(
        sources={name: SourceConfig(path=str(path)) for name, path in case.folders.items()},
        global_batch_size=case.batch,
        pack_text_tokens=4096,
        pack_frames=256,
        workers=1,
        prefetch=1,
        max_bad_fraction=0.0,
    )
    share = FrameShare(rank, case.ranks)
    tokenizer = load_tokenizer(TokenizerConfig())
    with build_loader(data, CompilerConfig(), tokenizer, size, seed=0, frame_share=share) as loader:
        for _ in range(loader.steps_per_epoch(0)):
            for batch in next(loader).microbatches:
                # Of all pictures of the microbatch, those in this rank's share are given.
                first, end = share.of(batch.frame_bounds) if batch.frame_bounds else (0, batch.frames)
                start = 0
                for key in (key for row in batch.keys for key in row):
                    after = start + len(case.requests[key].times)
                    low, high = max(start, first), min(after, end)
                    yield key, max(0, low - start), batch.frames_NCHW[low - first : max(low, high) - first]
                    start = after


def webdataset_decord(case: CaseSources, size: int, rank: int) -> Iterator[Delivered]:
    """`WebDataset` in a `DataLoader` with one worker."""
    import webdataset

    decode = _Decode(case, size)
    urls = [str(tar) for tar in case.tars]
    dataset = webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None).map(decode)
    for key, frames in torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1):
        yield key, 0, frames


def energon_decord(case: CaseSources, size: int, rank: int) -> Iterator[Delivered]:
    """Energon: a prepared dataset of crude samples, a `Cooker` that decodes, one worker."""
    from moss_train.bench.data_loading.energon import samples

    decode = _Decode(case, size)
    for sample in samples(prepared_folder(case), lambda raw: decode(raw)[1]):
        yield sample.__key__.rpartition("/")[2], 0, sample.frames


RUNS: dict[str, Run] = {OURS: ours, WEBDATASET: webdataset_decord, ENERGON: energon_decord}


class _Decode:
    """A raw sample, member → bytes, to its key and pictures."""

    def __init__(self, case: CaseSources, size: int):
        self._requests = case.requests
        self._size = size

    def __call__(self, raw: dict) -> tuple[str, torch.Tensor]:
        key = raw["__key__"].rpartition("/")[2]
        asked = self._requests[key]
        if not asked.times:
            return key, torch.zeros((0, 3, self._size, self._size), dtype=torch.uint8)
        if asked.member == "mp4":
            return key, decord_frames(raw[asked.member], asked, self._size)
        return key, torch.from_numpy(decode_arrays(raw[asked.member], asked.times, self._size).frames)


def decord_frames(data: bytes, asked: Asked, size: int) -> torch.Tensor:
    """uint8 [F, 3, S, S]."""
    import av  # noqa: F401 (before decord, see `data.decoding.decord_reader`)
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    width, height = fitted_size(asked.width, asked.height, size)
    reader = decord.VideoReader(io.BytesIO(data), num_threads=1, width=width, height=height)
    rate = reader.get_avg_fps()
    indices = [min(int(time * rate + 1e-3), len(reader) - 1) for time in asked.times]
    pictures = reader.get_batch(indices).asnumpy()
    del reader  # it would go on decoding
    tile = np.zeros((len(pictures), 3, size, size), np.uint8)
    tile[:, :, :height, :width] = pictures.transpose(0, 3, 1, 2)
    return torch.from_numpy(tile)


def prepared_folder(case: CaseSources) -> Path:
    """The case's shards as an Energon dataset: links in a folder of their own, indexed by `energon prepare`."""
    folder = case.tars[0].parents[2] / "energon" / case.name
    if not (folder / ".nv-meta" / "dataset.yaml").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for number, tar in enumerate(case.tars):
            link = folder / f"shard-{number:06d}.tar"
            if not link.exists():
                link.hardlink_to(tar)
        command = [sys.executable, "-c", "from megatron.energon.cli.main import main; main()", "prepare", str(folder)]
        command += ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
        command += ["--num-workers", "1", "--no-progress"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise DataError(f"energon prepare {folder} failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return folder
