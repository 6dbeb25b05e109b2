"""Compiled streams and their frames become one `Batch`: laid end to end in rows, padded on the right."""

from collections.abc import Sequence

import numpy as np
import torch

from moss_train.data.batch import ALL_FRAMES, Batch, FrameShare
from moss_train.data.packing import cut_frames
from moss_train.streams.compiled import IGNORED_LABEL, CompiledStream

#: one stream of a row: its tokens, and its frames uint8 [F, 3, S, S], those of this process's share alone
RowStream = tuple[CompiledStream, torch.Tensor]


def collate(
    rows: Sequence[Sequence[RowStream]],
    image_size: int | None = None,
    sources: Sequence[Sequence[str]] | None = None,
    share: FrameShare = ALL_FRAMES,
    bounds: tuple[int, ...] = (),
    origins: Sequence[Sequence[int]] | None = None,
) -> Batch:
    """One microbatch of `rows`; a row is the list of its streams and may be empty (then it is padding alone).

    `image_size` S sizes the frame tensor when no stream has frames; None takes it from the streams. `sources` are
    the names that go into `Batch.sources`, `origins` the numbers that go into `Batch.origins_RT`, without them -1.
    `share` and `bounds` (`Batch.frame_bounds`) say which of the frames are
    given: of each stream those that lie in [bounds[share.rank], bounds[share.rank + 1]) of all frames in order, which
    may be none; without them all are. The batch is T tokens wide, T the longest row's, at least 1; padding has id 0.
    Raises ValueError when a stream's frames do not fit its requests.
    """
    rows = [list(row) for row in rows] or [[]]
    _check_frames([pair for row in rows for pair in row], share, bounds)
    height = len(rows)
    width = max(1, *(sum(len(stream.ids) for stream, _ in row) for row in rows))
    depth = max(sum(len(stream.frames) for stream, _ in row) for row in rows)

    ids = np.zeros((height, width), np.int64)
    labels = np.full((height, width), IGNORED_LABEL, np.int64)
    kinds = np.zeros((height, width), np.uint8)
    weights = np.zeros((height, width), np.float32)
    positions = np.zeros((height, width), np.int64)
    segments = np.full((height, width), -1, np.int32)
    origin = np.full((height, width), -1, np.int64)
    cross_positions = np.zeros((height, width), np.int64)
    contrasts = np.full((height, width), -1, np.int64)
    visible_lo, visible_hi, sink_lo, sink_hi = (np.zeros((height, width), np.int32) for _ in range(4))
    text_lo, text_sink_lo, text_sink_hi = (np.zeros((height, width), np.int32) for _ in range(3))
    frame_positions = np.zeros((height, depth), np.int64)
    frame_counts = np.zeros(height, np.int64)
    for row, streams in enumerate(rows):
        start = first = 0
        for segment, (stream, _) in enumerate(streams):
            here = np.s_[row, start : start + len(stream.ids)]
            ids[here] = stream.ids
            labels[here] = stream.labels
            kinds[here] = stream.kinds
            weights[here] = stream.weights
            positions[here] = stream.positions
            cross_positions[here] = stream.cross_positions
            contrasts[here] = stream.contrasts
            segments[here] = segment
            if origins is not None:
                origin[here] = origins[row][segment]
            visible_lo[here] = stream.visible_lo + first
            visible_hi[here] = stream.visible_hi + first
            # Sinks inside the window are seen through it already; the two ranges stay disjoint.
            sink_lo[here] = first
            sink_hi[here] = np.minimum(stream.sinks, np.minimum(stream.visible_lo, stream.visible_hi)) + first
            text_lo[here] = stream.text_lo + start
            text_sink_lo[here] = start
            text_sink_hi[here] = np.minimum(stream.text_sinks, stream.text_lo) + start
            frame_positions[row, first : first + len(stream.frames)] = stream.frame_positions
            start += len(stream.ids)
            first += len(stream.frames)
        frame_counts[row] = first

    counts = frame_counts.tolist()
    return Batch(
        ids_RT=torch.from_numpy(ids),
        labels_RT=torch.from_numpy(labels),
        kinds_RT=torch.from_numpy(kinds),
        weights_RT=torch.from_numpy(weights),
        positions_RT=torch.from_numpy(positions),
        cross_positions_RT=torch.from_numpy(cross_positions),
        contrasts_RT=torch.from_numpy(contrasts),
        segments_RT=torch.from_numpy(segments),
        visible_lo_RT=torch.from_numpy(visible_lo),
        visible_hi_RT=torch.from_numpy(visible_hi),
        sink_lo_RT=torch.from_numpy(sink_lo),
        sink_hi_RT=torch.from_numpy(sink_hi),
        text_lo_RT=torch.from_numpy(text_lo),
        text_sink_lo_RT=torch.from_numpy(text_sink_lo),
        text_sink_hi_RT=torch.from_numpy(text_sink_hi),
        origins_RT=torch.from_numpy(origin),
        frames_NCHW=_join_frames([frames for row in rows for _, frames in row], image_size),
        frame_rows_N=torch.from_numpy(np.repeat(np.arange(height), counts)),
        frame_slots_N=torch.from_numpy(np.concatenate([np.arange(count) for count in counts])),
        frame_positions_RF=torch.from_numpy(frame_positions),
        frame_counts_R=torch.from_numpy(frame_counts),
        frame_bounds=bounds,
        keys=tuple(tuple(stream.key for stream, _ in row) for row in rows),
        sources=tuple(tuple(names) for names in sources) if sources is not None else tuple(() for _ in rows),
    )


def padding_of_batches(batches: Sequence[Batch]) -> tuple[float, float]:
    """Share of all places for text, and of all places for frames, that no stream fills; 0 where there is none."""
    held = np.zeros(4)
    for batch in batches:
        segments_RT, places_RF = batch.segments_RT, batch.frame_positions_RF
        frames = int(batch.frame_counts_R.sum())
        held += [int((segments_RT >= 0).sum()), segments_RT.numel(), frames, places_RF.numel()]
    tokens, token_places, frames, frame_places = held.tolist()
    return (1 - tokens / token_places if token_places else 0.0), (1 - frames / frame_places if frame_places else 0.0)


def _check_frames(streams: list[RowStream], share: FrameShare, bounds: tuple[int, ...]) -> None:
    """ValueError unless the given frames are those that the share holds."""
    counts = [len(stream.frames) for stream, _ in streams]
    if bounds and (len(bounds) != share.ranks + 1 or bounds[-1] != sum(counts)):
        raise ValueError(f"bounds {bounds} do not cut {sum(counts)} frames in {share.ranks} shares")
    first, end = share.of(bounds) if bounds else (0, sum(counts))
    for (stream, frames), part in zip(streams, cut_frames(counts, first, end), strict=True):
        if len(frames) != len(part):
            raise ValueError(f"stream {stream.key!r} asks for {len(part)} frames and was given {len(frames)}")


def _join_frames(parts: list[torch.Tensor], image_size: int | None) -> torch.Tensor:
    """[N, 3, S, S] of all given frames in order."""
    with_frames = [part for part in parts if len(part)]
    if with_frames:
        # One clip alone is not copied: a batch's frames are read, never written.
        return with_frames[0] if len(with_frames) == 1 else torch.cat(with_frames)
    size = image_size or (parts[0].shape[-1] if parts else 1)
    return torch.zeros((0, 3, size, size), dtype=torch.uint8)
