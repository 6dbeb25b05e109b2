"""A token row while it is written, and the arrays that come of it."""

from collections.abc import Sequence

import numpy as np

from moss_train.streams.compiled import IGNORED_LABEL, CompiledStream, FrameRequest, Kind, Slot
from moss_train.streams.config import CompilerConfig
from moss_train.streams.jitter import move_anchors
from moss_train.streams.sight import Sight
from moss_train.streams.tokenizer import StreamTokenizer


class RowWriter:
    """Collects a row: ids and, for every token, what it teaches as a target (not yet shifted)."""

    def __init__(self, tokenizer: StreamTokenizer):
        self._special = tokenizer.special
        self.ids: list[int] = []
        self.kinds: list[Kind] = []
        self.weights: list[float] = []
        self.contrasts: list[int] = []  # the token that stands here in the reply that this one replaces, or -1

    def untrained(self, ids: Sequence[int]) -> None:
        self.trained(ids, Kind.IGNORED)

    def trained(self, ids: Sequence[int], kind: Kind, weight: float = 1.0) -> None:
        """`weight` 0 is the same as kind IGNORED."""
        kind = kind if weight > 0 else Kind.IGNORED
        self.ids += ids
        self.kinds += [kind] * len(ids)
        self.weights += [weight if kind is not Kind.IGNORED else 0.0] * len(ids)
        self.contrasts += [-1] * len(ids)

    def anchors(self, count: int) -> None:
        self.untrained([self._special.anchor] * count)

    def jitter(self, shifts: Sequence[int]) -> None:
        """Move each frame's anchor by so many tokens, negative earlier, as far as the rule of `jitter.py` lets it."""

        def swap(first: int, second: int) -> None:
            for column in (self.ids, self.kinds, self.weights, self.contrasts):
                column[first], column[second] = column[second], column[first]

        special = self._special
        deciding = [token for token in (special.end_header, special.anchor, special.think_end) if token is not None]
        closing = [token for token in (special.silence, special.end_of_turn, special.think_start) if token is not None]
        move_anchors(self.ids, shifts, special.anchor, deciding, closing, swap)

    def compiled(
        self,
        key: str,
        kind: str,
        frames: tuple[FrameRequest, ...],
        config: CompilerConfig,
        sight: Sight,
        slots: tuple[Slot, ...] = (),
        part: int = 0,
    ) -> CompiledStream:
        """Shifts the targets to the positions that predict them and derives visibility from the anchors.

        `sight` is that of `config`, drawn for this stream where it is drawn.
        """
        ids_T = np.asarray(self.ids, dtype=np.int32)
        kinds_T = np.zeros(len(ids_T), dtype=np.uint8)
        kinds_T[:-1] = self.kinds[1:]
        labels_T = np.full(len(ids_T), IGNORED_LABEL, dtype=np.int32)
        labels_T[:-1] = ids_T[1:]
        labels_T[kinds_T == Kind.IGNORED] = IGNORED_LABEL
        weights_T = np.zeros(len(ids_T), dtype=np.float32)
        weights_T[:-1] = self.weights[1:]
        contrasts_T = np.full(len(ids_T), -1, dtype=np.int32)
        contrasts_T[:-1] = self.contrasts[1:]
        contrasts_T[kinds_T == Kind.IGNORED] = -1
        places = sight.places(ids_T == self._special.anchor)
        visible_hi_T = places.visible_hi
        if config.visibility == "offline":
            visible_hi_T = np.full_like(visible_hi_T, len(frames))
        return CompiledStream(
            key=key,
            kind=kind,
            ids=ids_T,
            labels=labels_T,
            kinds=kinds_T,
            weights=weights_T,
            visible_lo=places.visible_lo,
            visible_hi=visible_hi_T,
            text_lo=places.text_lo,
            positions=places.positions,
            cross_positions=places.cross_positions,
            frame_positions=places.frame_positions,
            contrasts=contrasts_T,
            frames=frames,
            sinks=sight.sinks,
            text_sinks=sight.text_sinks,
            slots=slots,
            part=part,
        )
