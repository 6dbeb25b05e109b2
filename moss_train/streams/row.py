"""A token row while it is written, and the arrays that come of it."""

from collections.abc import Sequence

import numpy as np

from moss_train.streams.compiled import IGNORED_LABEL, CompiledStream, FrameRequest, Kind, Slot
from moss_train.streams.config import CompilerConfig
from moss_train.streams.jitter import swap_anchors
from moss_train.streams.sight import Sight
from moss_train.streams.tokenizer import StreamTokenizer


class RowWriter:
    """Collects a row: ids and, for every token, what it teaches as a target (not yet shifted)."""

    def __init__(self, tokenizer: StreamTokenizer):
        self._special = tokenizer.special
        self.ids: list[int] = []
        self.kinds: list[Kind] = []

    def untrained(self, ids: Sequence[int]) -> None:
        self.trained(ids, Kind.IGNORED)

    def trained(self, ids: Sequence[int], kind: Kind) -> None:
        self.ids += ids
        self.kinds += [kind] * len(ids)

    def anchors(self, count: int) -> None:
        self.untrained([self._special.anchor] * count)

    def jitter(self, decisions: Sequence[bool]) -> None:
        def swap(first: int, second: int) -> None:
            for column in (self.ids, self.kinds):
                column[first], column[second] = column[second], column[first]

        special = self._special
        swap_anchors(self.ids, decisions, special.anchor, special.silence, special.end_header, swap)

    def compiled(
        self,
        key: str,
        kind: str,
        frames: tuple[FrameRequest, ...],
        config: CompilerConfig,
        slots: tuple[Slot, ...] = (),
        part: int = 0,
    ) -> CompiledStream:
        """Shifts the targets to the positions that predict them and derives visibility from the anchors."""
        ids_T = np.asarray(self.ids, dtype=np.int32)
        kinds_T = np.zeros(len(ids_T), dtype=np.uint8)
        kinds_T[:-1] = self.kinds[1:]
        labels_T = np.full(len(ids_T), IGNORED_LABEL, dtype=np.int32)
        labels_T[:-1] = ids_T[1:]
        labels_T[kinds_T == Kind.IGNORED] = IGNORED_LABEL
        sight = Sight.of(config)
        places = sight.places(ids_T == self._special.anchor)
        return CompiledStream(
            key=key,
            kind=kind,
            ids=ids_T,
            labels=labels_T,
            kinds=kinds_T,
            weights=(kinds_T != Kind.IGNORED).astype(np.float32),
            visible_lo=places.visible_lo,
            visible_hi=places.visible_hi,
            text_lo=places.text_lo,
            positions=places.positions,
            cross_positions=places.cross_positions,
            frame_positions=places.frame_positions,
            contrasts=np.full(len(ids_T), -1, dtype=np.int32),
            frames=frames,
            sinks=sight.sinks,
            text_sinks=sight.text_sinks,
            slots=slots,
            part=part,
        )
