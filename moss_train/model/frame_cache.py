"""Keys and values of the frames that running streams hold, and which frames stay.

A frame's keys and values depend on the frame and its position alone and are never changed, so a frame that leaves costs
nothing to the others, and the order in which frames lie in memory does not matter: a new frame takes the place of one
that left. With a window the cache is therefore a ring of `sinks + window` frames; without, it grows.

A frame that was added is *staged* until the first token that sees it is fed; only then does it join, and may make
another one leave. So tokens that stand before its anchor, fed in the same step, still see what they saw in training.

Shape suffixes: R rows, L new tokens, S places for frames, N new frames, P vision tokens of a frame, A query heads,
B key/value heads, D head width; AD = heads and width joined.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from moss_train.model.attention import attend_grouped

_FIRST_PLACES = 16  #: of a cache that grows
_BLOCK_TOKENS = 128  #: most tokens of one masked attention call


class KeepPolicy(Protocol):
    """Which frames of a stream stay in its cache."""

    most: int | None  #: most frames ever held, for which room is made at once; None: no bound, the cache grows

    def leaving(self, held: Sequence[int], arriving: int) -> Sequence[int]:
        """Numbers of the frames that leave when frame `arriving` joins.

        `held`: numbers of the frames held, ascending; frames count from the stream's beginning. Called once for each
        frame, in order; must depend on its arguments alone, since every process of a parallel layout asks for itself.
        """


@dataclass(frozen=True)
class KeepAll:
    """Every frame stays."""

    most: int | None = None

    def leaving(self, held: Sequence[int], arriving: int) -> Sequence[int]:
        return ()


@dataclass(frozen=True)
class KeepWindow:
    """The first `sinks` frames and the latest `window` stay: all that a model trained with this window looks at."""

    window: int
    sinks: int = 0

    @property
    def most(self) -> int:
        """Frames held when the ring is full."""
        return self.sinks + self.window

    def leaving(self, held: Sequence[int], arriving: int) -> Sequence[int]:
        return held[self.sinks : max(self.sinks, len(held) + 1 - self.window)]


@dataclass
class _Staged:
    """Keys and values [N, B, P, D] by layer, of frames that were added in one call."""

    of_layer: dict[int, tuple[torch.Tensor, torch.Tensor]]


@dataclass
class _Row:
    """The frames of one stream."""

    held: list[int] = field(default_factory=list)  #: numbers, ascending
    place_of: dict[int, int] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)  #: places below `used` that nobody has
    used: int = 0  #: places ever taken
    joined: int = 0  #: frames that were seen by a token
    staged: list[tuple[_Staged, int]] = field(default_factory=list)  #: added since, in order

    @property
    def added(self) -> int:
        return self.joined + len(self.staged)

    def join(self, policy: KeepPolicy) -> int:
        """Take in the next staged frame's number; returns its place."""
        number = self.joined
        for left in list(policy.leaving(self.held, number)):
            if left not in self.place_of:
                raise ValueError(f"{policy} lets frame {left} leave, which is not held; held are {self.held}")
            del self.held[bisect_left(self.held, left)]
            self.free.append(self.place_of.pop(left))
        if self.free:
            place = self.free.pop()
        else:
            place, self.used = self.used, self.used + 1
        self.held.append(number)
        self.place_of[number] = place
        self.joined += 1
        return place

    def sees_all(self, lo: int, hi: int, sinks: int) -> bool:
        """Whether a token with frames [lo, hi) and below hi the first `sinks` sees every place in use."""
        if self.free or not self.held or hi <= self.held[-1]:
            return False
        first = bisect_left(self.held, sinks)
        return first == len(self.held) or lo <= self.held[first]


@dataclass
class _Commit:
    """Frames that join the cache together: rows and places, and where their keys and values are staged."""

    rows: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    sources: list[tuple[_Staged, int]] = field(default_factory=list)

    def write(self, layer: int, cache: torch.Tensor, which: int) -> None:
        for row, place, (staged, index) in zip(self.rows, self.places, self.sources, strict=True):
            cache[row, :, place] = staged.of_layer[layer][which][index]


@dataclass
class _Phase:
    """Tokens that see the same frames join, and what they see."""

    commit: _Commit
    tokens: slice  #: of the new tokens; empty when frames only join
    used: int  #: places that are read
    mask_RLK: torch.Tensor | None = None  #: K = used × P; None: everything that is read is seen
    blind_RL1: torch.Tensor | None = None  #: tokens that see nothing; None: there is none
    own_RL1: torch.Tensor | None = None  #: tokens of the slice that are this phase's; None: all


@dataclass
class FramePlan:
    """One step's cross-attention, the same in every layer."""

    phases: list[_Phase]
    sees_RL: np.ndarray  #: bool: the token sees a frame


class FrameCache:
    """The cross layers' caches of several streams."""

    def __init__(
        self,
        layers: Sequence[int],
        rows: int,
        heads: int,
        frame_tokens: int,
        head_size: int,
        policy: KeepPolicy,
        max_frames: int | None,
        like: torch.Tensor,
    ):
        """`like`: a tensor of the dtype and on the device that the caches shall have."""
        self.policy = policy
        self.max_frames = max_frames
        self._rows = [_Row() for _ in range(rows)]
        bounds = [bound for bound in (policy.most, max_frames) if bound is not None]
        self._bound = min(bounds) if bounds else None
        places = max(1, self._bound) if policy.most is not None else min([_FIRST_PLACES, *bounds])
        self._numbers_RS = np.full((rows, max(1, places)), -1, np.int64)
        shape = (rows, heads, max(1, places), frame_tokens, head_size)
        self.of_layer = {layer: tuple(like.new_zeros(shape) for _ in range(2)) for layer in layers}
        self._frame_tokens = frame_tokens

    @property
    def frames_R(self) -> np.ndarray:
        """Frames added to each row so far, those that left included."""
        return np.array([row.added for row in self._rows])

    @property
    def held_R(self) -> np.ndarray:
        """Frames that each row's cache holds, staged ones included."""
        return np.array([len(row.held) + len(row.staged) for row in self._rows])

    def stage(self, rows_N: Sequence[int], of_layer: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add frame n to row `rows_N[n]`; keys and values by layer are [N, B, P, D]."""
        if self.max_frames is not None:
            for row in set(rows_N):
                if self._rows[row].added + list(rows_N).count(row) > self.max_frames:
                    raise ValueError(f"row {row} holds max_frames={self.max_frames} frames already")
        staged = _Staged(of_layer)
        for index, row in enumerate(rows_N):
            self._rows[row].staged.append((staged, index))

    def plan(self, lengths_R: np.ndarray, lo_RL: np.ndarray, hi_RL: np.ndarray, sinks: int) -> FramePlan:
        """What a step of `lengths_R` tokens sees, and which frames join before which of its tokens.

        Raises ValueError when a token looks at a frame that was not added, or that left a window narrower than its own.
        """
        rows, new_tokens = hi_RL.shape
        real_RL = np.arange(new_tokens) < lengths_R[:, None]
        self._check(real_RL, lo_RL, hi_RL, sinks)
        joined_R1 = np.array([[row.joined] for row in self._rows])
        phase_RL = np.where(real_RL, np.maximum(0, hi_RL - joined_R1), 0)
        last = int(phase_RL.max(initial=0))
        sees_RL = np.zeros((rows, new_tokens), bool)
        phases: list[_Phase] = []
        # A token sees a frame iff it sees the one before, so with nobody leaving one mask does for all phases.
        together = last > 1 and isinstance(self.policy, KeepAll)
        if together:
            commit = self._join(phase_RL.max(1))
            for start in range(0, new_tokens, _BLOCK_TOKENS):
                tokens = slice(start, min(start + _BLOCK_TOKENS, new_tokens))
                phases.append(self._phase(commit, tokens, real_RL, lo_RL, hi_RL, sinks, sees_RL))
                commit = _Commit()
        for phase in range(0 if not together else last + 1, last + 1):
            commit = self._join((phase_RL.max(1) >= phase).astype(int)) if phase else _Commit()
            own_RL = real_RL & (phase_RL == phase)
            where = np.flatnonzero(own_RL.any(0))
            tokens = slice(int(where[0]), int(where[-1]) + 1) if len(where) else slice(0, 0)
            if len(where) or commit.rows:
                phases.append(self._phase(commit, tokens, own_RL, lo_RL, hi_RL, sinks, sees_RL))
        return FramePlan(phases, sees_RL)

    def attend(self, layer: int, q_RLAD: torch.Tensor, plan: FramePlan) -> torch.Tensor:
        """Attention of the new tokens over the frames they see, [R, L, AD]; zero where a token sees none."""
        keys, values = self.of_layer[layer]
        rows, new_tokens = q_RLAD.shape[:2]
        mixed_RLX: torch.Tensor | None = None
        for phase in plan.phases:
            for which, cache in enumerate((keys, values)):
                phase.commit.write(layer, cache, which)
            if not phase.used or phase.tokens.start == phase.tokens.stop:
                continue
            seen = [cache[:, :, : phase.used].flatten(2, 3) for cache in (keys, values)]
            part = attend_grouped(q_RLAD[:, phase.tokens], *seen, mask_RLK=phase.mask_RLK).flatten(2)
            if phase.blind_RL1 is not None:
                part = part.masked_fill(phase.blind_RL1, 0.0)
            if phase.own_RL1 is None and part.shape[1] == new_tokens:
                mixed_RLX = part
                continue
            if mixed_RLX is None:
                mixed_RLX = part.new_zeros(rows, new_tokens, part.shape[-1])
            before = mixed_RLX[:, phase.tokens]
            before.copy_(part if phase.own_RL1 is None else torch.where(phase.own_RL1, part, before))
        return q_RLAD.new_zeros(rows, new_tokens, q_RLAD.shape[2] * q_RLAD.shape[3]) if mixed_RLX is None else mixed_RLX

    def _check(self, real_RL: np.ndarray, lo_RL: np.ndarray, hi_RL: np.ndarray, sinks: int) -> None:
        added_R1 = np.array([[row.added] for row in self._rows])
        if (real_RL & (hi_RL > added_R1)).any():
            row = int(np.argmax((real_RL & (hi_RL > added_R1)).any(1)))
            raise ValueError(
                f"a token of row {row} looks at {int(hi_RL[row].max())} frames; {int(added_R1[row, 0])} were added"
            )
        if isinstance(self.policy, KeepWindow):
            window = self.policy.window
            gone_RL = (lo_RL < hi_RL - window) | ((sinks > self.policy.sinks) & (hi_RL > window))
            if (real_RL & gone_RL & (hi_RL > self.policy.most)).any():
                raise ValueError(
                    f"a token looks at frames that left: the cache keeps {self.policy.sinks} sinks and {window} frames"
                )

    def _join(self, counts_R: np.ndarray) -> _Commit:
        """The next `counts_R` staged frames of each row join."""
        commit = _Commit()
        for number, count in enumerate(counts_R.tolist()):
            row = self._rows[number]
            for _ in range(count):
                place = row.join(self.policy)
                self._make_room(place + 1)
                self._numbers_RS[number, place] = row.joined - 1
                commit.rows.append(number)
                commit.places.append(place)
                commit.sources.append(row.staged.pop(0))
            for place in row.free:
                self._numbers_RS[number, place] = -1
        return commit

    def _make_room(self, places: int) -> None:
        capacity = self._numbers_RS.shape[1]
        if places <= capacity:
            return
        larger = 2 * capacity if self._bound is None else min(2 * capacity, self._bound)
        if larger < places:
            raise ValueError(f"{self.policy} keeps {places} frames, more than its `most` of {self.policy.most}")
        self._numbers_RS = np.pad(self._numbers_RS, ((0, 0), (0, larger - capacity)), constant_values=-1)
        self.of_layer = {layer: tuple(grown(x, 2, larger) for x in caches) for layer, caches in self.of_layer.items()}

    def _phase(
        self,
        commit: _Commit,
        tokens: slice,
        own_RL: np.ndarray,
        lo_RL: np.ndarray,
        hi_RL: np.ndarray,
        sinks: int,
        sees_RL: np.ndarray,
    ) -> _Phase:
        """Marks in `sees_RL` which of the phase's own tokens see a frame."""
        own_RL = own_RL[:, tokens]
        lo_RL, hi_RL = lo_RL[:, tokens], hi_RL[:, tokens]
        speaking = [number for number in range(len(self._rows)) if own_RL[number].any()]
        used = max((self._rows[number].used for number in speaking), default=0)
        phase = _Phase(commit, tokens, used)
        if not used:
            return phase
        device = next(iter(self.of_layer.values()))[0].device if self.of_layer else torch.device("cpu")
        if not own_RL.all():
            phase.own_RL1 = torch.from_numpy(own_RL[..., None]).to(device)
        if all(
            self._rows[number].used == used
            and self._rows[number].sees_all(
                int(lo_RL[number][own_RL[number]].max()), int(hi_RL[number][own_RL[number]].min()), sinks
            )
            for number in speaking
        ):
            sees_RL[:, tokens] |= own_RL
            return phase
        numbers_R1S = self._numbers_RS[:, None, :used]
        lo, hi = lo_RL[..., None], hi_RL[..., None]
        visible_RLS = (numbers_R1S >= 0) & (numbers_R1S < hi) & ((numbers_R1S >= lo) | (numbers_R1S < sinks))
        blind_RL = ~visible_RLS.any(-1)
        if blind_RL[own_RL].all():
            phase.used = 0
            return phase
        sees_RL[:, tokens] |= own_RL & ~blind_RL
        if blind_RL.any():
            # A token without anything to see has no softmax; it looks anywhere and its result is set to zero.
            visible_RLS |= blind_RL[..., None]
            phase.blind_RL1 = torch.from_numpy(blind_RL[..., None]).to(device)
        phase.mask_RLK = torch.from_numpy(visible_RLS).to(device).repeat_interleave(self._frame_tokens, dim=2)
        return phase


def grown(cache: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """A copy with `size` places along `dim`, the new ones zero."""
    shape = list(cache.shape)
    shape[dim] = size
    larger = cache.new_zeros(shape)
    larger.narrow(dim, 0, cache.shape[dim]).copy_(cache)
    return larger
