"""Samples of a prepared Energon dataset, pictures decoded by a `Cooker`; imported only where Energon is measured."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_loader,
    get_train_dataset,
    stateless,
)


@edataclass
class FramesSample(Sample):
    """What the worker sends; at module level, so that it can be pickled."""

    frames: torch.Tensor  #: uint8 [F, 3, S, S]


def samples(folder: Path, decode: Callable[[dict], torch.Tensor]) -> Iterator[FramesSample]:
    """Every sample of the dataset once, from one worker."""

    @stateless
    def cook(crude: dict) -> FramesSample:
        return FramesSample(**basic_sample_keys(crude), frames=decode(crude))

    class Encoder(DefaultTaskEncoder):
        decoder = None
        cookers = [Cooker(cook)]

    dataset = get_train_dataset(
        folder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=1),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Encoder(),
        repeat=False,
    )
    yield from get_loader(dataset)
