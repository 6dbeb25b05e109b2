"""Where the tokens of a stream stand and what they see: rotary positions, ranges of frames and of earlier tokens.

The rules are those of a growing row, so that a row written by the compiler and one that grows live, token by token,
are the same. Shape suffixes: T tokens, F frames.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

#: how tokens and frames are numbered for rotary positions, see `Sight.positions`
POSITION_SCHEMES = ("shared", "decoupled")


@dataclass(frozen=True)
class Places:
    """Arrays of some tokens of one stream, int32; tokens and frames count from the stream's beginning."""

    positions: np.ndarray  #: [T], rotary position among the tokens
    cross_positions: np.ndarray  #: [T], rotary position among the frames, of the token's cross-attention query
    visible_lo: np.ndarray  #: [T], frames [visible_lo, visible_hi) are seen, and the first sinks below visible_hi
    visible_hi: np.ndarray  #: [T]
    text_lo: np.ndarray  #: [T], tokens from text_lo to the token itself are seen, and the first text sinks
    frame_positions: np.ndarray  #: [F], rotary position of each frame whose anchor is among the tokens


@dataclass(frozen=True)
class Sight:
    """What the tokens of one stream may see. Fields as in `CompilerConfig`; None: no window."""

    window: int | None = None
    sinks: int = 0
    text_window: int | None = None
    text_sinks: int = 0
    #: `shared`: a frame stands where its anchor stands in the text (MOSS-Video-Preview). `decoupled`: text and frames
    #: have an axis each; an anchor takes no place in the text, frame f stands at f, and a token looks at the frames
    #: from where the latest of them stands (TaYS' group positions)
    positions: str = "shared"

    @staticmethod
    def of(config: Any, rng: np.random.Generator | None = None) -> "Sight":
        """The sight of a stream compiled with a `CompilerConfig`; `rng` draws what has a range in its `augment`."""

        def value(name: str, limits: list[int] | None) -> int | None:
            if limits is None or rng is None:
                return getattr(config, name)
            return int(rng.integers(limits[0], limits[1], endpoint=True))

        ranges = config.augment
        window, sinks = value("window", ranges.window_range), value("sinks", ranges.sink_range)
        text_window = value("text_window", ranges.text_window_range)
        return Sight(window, sinks, text_window, value("text_sinks", ranges.text_sink_range), config.positions)

    @staticmethod
    def whole(config: Any) -> "Sight":
        """The sight of a sample whose media were given as a whole, before what is said of them: windows and sinks are
        for streams, of which there is no end."""
        return Sight(positions=config.positions)

    def places(self, is_anchor_T: np.ndarray, tokens_before: int = 0, frames_before: int = 0) -> Places:
        """The places of tokens that follow `tokens_before` tokens, `frames_before` of them anchors."""
        count = len(is_anchor_T)
        index_T = np.arange(tokens_before, tokens_before + count, dtype=np.int32)
        hi_T = frames_before + np.cumsum(is_anchor_T, dtype=np.int32)
        lo_T = np.zeros_like(hi_T) if self.window is None else np.maximum(0, hi_T - np.int32(self.window))
        text_lo_T = np.zeros_like(index_T)
        if self.text_window is not None:
            text_lo_T = np.maximum(0, index_T + 1 - np.int32(self.text_window))
        if self.positions == "shared":
            positions_T, cross_T = index_T, index_T
            frames_F = index_T[is_anchor_T]
        else:
            # anchors at or before a token, itself excepted, take no place
            positions_T = index_T - (hi_T - is_anchor_T.astype(np.int32))
            cross_T = np.maximum(0, hi_T - 1)
            frames_F = hi_T[is_anchor_T] - 1
        return Places(positions_T, cross_T, lo_T, hi_T, text_lo_T, frames_F)
