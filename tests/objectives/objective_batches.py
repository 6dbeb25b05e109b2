"""Batches of random labels for the tests of the objectives; no model, no frames."""

import torch

from moss_train.data.batch import Batch, plain_places
from moss_train.streams.compiled import IGNORED_LABEL, Kind

VOCABULARY = 24
SILENCE = 5
ANCHOR = VOCABULARY  #: an id without a row in the head


def batch_of(kinds, labels, weights=None, segments=None) -> Batch:
    """A batch without frames from lists of rows."""
    kinds_RT = torch.tensor(kinds, dtype=torch.uint8)
    rows, length = kinds_RT.shape
    zeros = torch.zeros(rows, length, dtype=torch.int32)
    weights_RT = torch.ones(rows, length) if weights is None else torch.tensor(weights, dtype=torch.float32)
    return Batch(
        ids_RT=torch.zeros(rows, length, dtype=torch.int64),
        labels_RT=torch.tensor(labels, dtype=torch.int64),
        kinds_RT=kinds_RT,
        weights_RT=weights_RT,
        positions_RT=torch.arange(length).expand(rows, length).clone(),
        segments_RT=zeros.clone() if segments is None else torch.tensor(segments, dtype=torch.int32),
        visible_lo_RT=zeros.clone(),
        visible_hi_RT=zeros.clone(),
        sink_lo_RT=zeros.clone(),
        sink_hi_RT=zeros.clone(),
        origins_RT=torch.full_like(kinds_RT.long(), -1),
        **plain_places(torch.arange(length).expand(rows, length)),
        frames_NCHW=torch.zeros(0, 3, 2, 2, dtype=torch.uint8),
        frame_rows_N=torch.zeros(0, dtype=torch.int64),
        frame_slots_N=torch.zeros(0, dtype=torch.int64),
        frame_positions_RF=torch.zeros(rows, 0, dtype=torch.int64),
        frame_counts_R=torch.zeros(rows, dtype=torch.int64),
    )


def random_batch(seed: int, rows: int = 4, length: int = 17) -> Batch:
    """Every kind occurs, data weights are mixed, half of the tokens are anchors, some labels have a contrast; the last
    columns of the later rows are padding."""
    generator = torch.Generator().manual_seed(seed)
    kinds_RT = torch.randint(0, len(Kind), (rows, length), generator=generator)
    segments_RT = torch.randint(0, 2, (rows, length), generator=generator).sort(dim=1).values
    for row in range(1, rows):
        kinds_RT[row, length - row :] = Kind.IGNORED
        segments_RT[row, length - row :] = -1
    labels_RT = torch.randint(6, VOCABULARY, (rows, length), generator=generator)
    labels_RT[(kinds_RT == Kind.IDLE_SILENCE) | (kinds_RT == Kind.STOP_SILENCE)] = SILENCE
    labels_RT[kinds_RT == Kind.IGNORED] = IGNORED_LABEL
    weights_RT = torch.randint(1, 4, (rows, length), generator=generator) / 2
    batch = batch_of(kinds_RT.tolist(), labels_RT.tolist(), weights_RT.tolist(), segments_RT.tolist())
    batch.ids_RT[torch.rand(rows, length, generator=generator) < 0.5] = ANCHOR
    contrasts_RT = torch.randint(6, VOCABULARY, (rows, length), generator=generator)
    batch.contrasts_RT = contrasts_RT.masked_fill(torch.rand(rows, length, generator=generator) < 0.6, -1)
    return batch


def random_logits(seed: int, batch: Batch, scale: float = 2.0) -> torch.Tensor:
    """float32 [T, R, V] with a gradient."""
    generator = torch.Generator().manual_seed(1000 + seed)
    rows, length = batch.ids_RT.shape
    return (scale * torch.randn(length, rows, VOCABULARY, generator=generator)).requires_grad_()


def random_decisions(seed: int, batch: Batch) -> torch.Tensor:
    """float32 [T, R] with a gradient: what a decision head says."""
    generator = torch.Generator().manual_seed(2000 + seed)
    rows, length = batch.ids_RT.shape
    return (2.0 * torch.randn(length, rows, generator=generator)).requires_grad_()


def rows_of(batch: Batch, chosen: slice) -> Batch:
    """Some rows of a batch without frames."""
    names = [name for name in vars(batch) if name.endswith(("_RT", "_RF", "_R"))]
    return Batch(**(vars(batch) | {name: getattr(batch, name)[chosen] for name in names}))
