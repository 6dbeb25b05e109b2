"""Loaders for tests: of one rank, of several that talk to each other, and what they deliver in comparable form."""

import hashlib
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch

from moss_train.data.batch import ALL_FRAMES, Batch, FrameShare
from moss_train.data.config import DataConfig, SourceConfig
from moss_train.data.loader import Agree, GlobalStep, Loader, build_loader
from moss_train.streams.config import CompilerConfig, TokenizerConfig
from moss_train.streams.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(TokenizerConfig())


def loader_of(
    path: Path,
    rank: int = 0,
    ranks: int = 1,
    quarantine: Path | None = None,
    compiler: CompilerConfig | None = None,
    seed: int = 3,
    agree: Agree | None = None,
    share: FrameShare = ALL_FRAMES,
    multiple: int = 1,
    **data: object,
) -> Loader:
    settings = {"global_batch_size": 6, "micro_batch_rows": 2, "pack_text_tokens": 200, "pack_frames": 20}
    config = DataConfig(sources={"main": SourceConfig(path=str(path))}, **(settings | {"workers": 0} | data))
    compiler = compiler or CompilerConfig()
    return build_loader(config, compiler, TOKENIZER, 64, seed, rank, ranks, quarantine, agree, share, multiple)


def steps_of(loader: Loader, count: int) -> list[GlobalStep]:
    with loader:
        return [next(loader) for _ in range(count)]


def content(step: GlobalStep) -> dict[str, str]:
    """key → digest of what is delivered of it: tokens, labels and pixels, whatever the row it lies in."""
    found = {}
    for batch in step.microbatches:
        for row, keys in enumerate(batch.keys):
            first = 0
            for segment, key in enumerate(keys):
                here = batch.segments_RT[row] == segment
                count = len({int(f) for f in batch.visible_hi_RT[row][here]} - {first})
                own = (
                    (batch.frame_rows_N == row) & (batch.frame_slots_N >= first) & (batch.frame_slots_N < first + count)
                )
                parts = [batch.ids_RT[row][here], batch.labels_RT[row][here], batch.frames_NCHW[own]]
                found[key] = hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts)).hexdigest()
                first += count
    return found


def same(first: Batch, second: Batch) -> bool:
    """Bit for bit, the dtypes too."""
    pairs = [(getattr(first, f.name), getattr(second, f.name)) for f in fields(Batch)]
    return all(
        a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) else type(a) is type(b) and a == b
        for a, b in pairs
    )


def joined(shares: Sequence[Batch]) -> Batch:
    """The batch of which these are all shares, in order; checks that they differ in their pixels alone."""
    bare = [replace(batch, frames_NCHW=batch.frames_NCHW[:0]) for batch in shares]
    assert all(same(batch, bare[0]) for batch in bare)
    bounds = bare[0].frame_bounds or (0, bare[0].frames)
    assert len(bounds) == len(shares) + 1 and bounds[0] == 0 and bounds[-1] == bare[0].frames
    assert [len(b.frames_NCHW) for b in shares] == [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    return replace(bare[0], frames_NCHW=torch.cat([batch.frames_NCHW for batch in shares]), frame_bounds=())


def joined_steps(steps: Sequence[GlobalStep]) -> GlobalStep:
    """One data rank's step of the steps of all its shares, in order."""
    first = steps[0]
    for step in steps:
        assert (step.epoch, step.step, step.keys, step.masked) == (first.epoch, first.step, first.keys, first.masked)
        assert step.quarantined == first.quarantined
    return replace(first, microbatches=[joined(m) for m in zip(*(s.microbatches for s in steps), strict=True)])


class Ranks:
    """Loaders of `count` data ranks times `shares`, each in a thread, that tell each other what they met.

    `loaders` are in order of data rank, then of share; `told` is what each told in the latest step.
    """

    def __init__(self, path: Path, count: int, ledger: Path, shares: int = 1, **settings: object):
        places = [(rank, FrameShare(share, shares)) for rank in range(count) for share in range(shares)]
        self.told: dict[int, list] = {}
        self._meeting = threading.Barrier(len(places), timeout=60)
        self._threads = ThreadPoolExecutor(len(places))
        self.loaders = [
            loader_of(
                path,
                rank,
                count,
                ledger if number == 0 else None,
                agree=partial(self._agree, number),
                share=share,
                **settings,
            )
            for number, (rank, share) in enumerate(places)
        ]

    def _agree(self, number: int, own: list) -> list[list]:
        self.told[number] = json.loads(json.dumps(own))
        self._meeting.wait()
        told = [self.told[number] for number in range(len(self.loaders))]
        self._meeting.wait()
        return told

    def step(self) -> list[GlobalStep | Exception]:
        """What `next` gives or raises on every rank."""
        futures = [self._threads.submit(next, loader) for loader in self.loaders]
        return [future.exception(60) or future.result() for future in futures]

    def close(self) -> None:
        self._threads.shutdown()
        for loader in self.loaders:
            loader.close()
