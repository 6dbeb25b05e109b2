"""What the stream compiler makes of one sample: the token row that the model trains on.

Shape suffixes: T tokens of the stream, F frames of the stream.
"""

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

IGNORED_LABEL = -100


class Kind(IntEnum):
    """What a label teaches. The objective's weight of a label is looked up by its kind."""

    IGNORED = 0  #: not trained: prompts, anchors, turn ends of a stream, unknown silence
    TEXT = 1  #: a reply token that is neither of the below
    ONSET = 2  #: the first token of a reply that follows silence (the decision to speak)
    IDLE_SILENCE = 3  #: silence while no reply runs
    STOP_SILENCE = 4  #: the silence that ends a reply
    REVISION = 5  #: every token of a reply that supersedes an earlier one, its first included
    STALE = 6  #: a reply that is known to be wrong or silence on a stale answer
    THINK = 7  #: a token of a think unit, its marks included: never heard, so no decision to speak


@dataclass(frozen=True)
class FrameRequest:
    """One frame to be shown: the picture of medium `media_id` on screen at `time_s` of its own clock.

    Stills are requested with `time_s = 0.0`.
    """

    media_id: str
    time_s: float


@dataclass(frozen=True)
class Slot:
    """What stands after one anchor (or, with `frame = -1`, after the header of an assistant turn)."""

    frame: int  #: index of the anchor's frame in `frames`; -1 for the slot that opens a turn
    position: int  #: index t of the token whose prediction is this slot's decision; behind the slot's think units
    time_s: float  #: arrival time of the frame; for `frame = -1` the time of the user turn (0.0 for the first)
    state: str  #: "silence", "speak" (a reply starts), "continue" (a running reply goes on) or "unknown"
    text: str  #: the text said in this slot, without special tokens; "" when silent
    ends: bool  #: True when the reply is complete in this slot (a stop silence follows the text)
    event_id: str | None  #: the reply's event, None when silent
    #: why its silence is not like others: "confirm" (something changes, the answer holds), "stale" (the answer is
    #: wrong), "unknown" (not known to be right), "blocked" (its frame arrived during a reply), "thinned" (left out by
    #: `keep_silence`); "" otherwise
    note: str = ""


@dataclass(frozen=True)
class CompiledStream:
    """One stream, ready to be packed. All arrays are numpy; nothing here knows pixels or process groups.

    `labels[t]` is the token that position t must predict: the next-token shift is already applied, so
    labels never cross a stream when rows are packed. `labels[t] == IGNORED_LABEL` iff `kinds[t] == 0`.
    `weights[t]` is above 0 iff the label is trained.
    `visible_lo/hi[t]` are the half-open range of this stream's frames that token t may attend to;
    frames below `sinks` are visible too as soon as they have arrived (are below `visible_hi`).
    Of this stream's tokens, token t may attend to `text_lo[t]` to t and to the first `text_sinks`.
    """

    key: str
    kind: str  #: "caption", "conversation" or "stream"
    ids: np.ndarray  #: int32 [T]
    labels: np.ndarray  #: int32 [T], IGNORED_LABEL where nothing is trained
    kinds: np.ndarray  #: uint8 [T], values of `Kind`
    weights: np.ndarray  #: float32 [T], the compiler policy's factor (1.0 by default); the objective multiplies its own
    visible_lo: np.ndarray  #: int32 [T]
    visible_hi: np.ndarray  #: int32 [T]
    text_lo: np.ndarray  #: int32 [T]
    positions: np.ndarray  #: int32 [T], rotary position of each token
    cross_positions: np.ndarray  #: int32 [T], that of its cross-attention query, among the frames
    frame_positions: np.ndarray  #: int32 [F], rotary position of each frame
    #: int32 [T], -1 or the token that a superseded reply has where its revision has `labels[t]`: the first in which
    #: they differ, behind a common beginning
    contrasts: np.ndarray
    frames: tuple[FrameRequest, ...]  #: F requests, in arrival order
    sinks: int = 0
    text_sinks: int = 0
    slots: tuple[Slot, ...] = field(default_factory=tuple)  #: empty unless kind is "stream"
    part: int = 0  #: which part of the sample's stream this is, where it was split (see split.py)
