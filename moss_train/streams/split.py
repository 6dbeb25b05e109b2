"""Streams that are longer than a row, cut into parts that fit one.

A part is what a server goes on with that has evicted the frames before it: the system prefix, the dialogue so far
as plain text (without anchors and idle silences), and then the slots from the cut on with their own frames. What the
dialogue repeats is not trained, so every trained label of the stream is trained in exactly one part.

Cuts stand before an anchor, since nothing is predicted there: where possible the last anchor that fits and that no
reply runs into, else the last that fits. They depend on the sample, its media, the tokenizer, the configuration and
the budget alone, never on the random generator.
"""

import contextlib
from dataclasses import dataclass, field

import numpy as np

from moss_train.errors import ConfigError, SampleError
from moss_train.streams.compiled import CompiledStream
from moss_train.streams.compiler import check_known, compile_sample
from moss_train.streams.config import CompilerConfig
from moss_train.streams.media import MediaInfo
from moss_train.streams.schema import Reply, Sample, StreamSample
from moss_train.streams.stream_rows import (
    MAX_SAMPLE_FRAMES,
    StreamPlan,
    drawn,
    opening_ids,
    plan_stream,
    said_length,
    write_stream,
)
from moss_train.streams.timeline import TimelineSlot
from moss_train.streams.tokenizer import StreamTokenizer

#: most of a part's tokens that the dialogue so far may take, as a divisor of the budget
DIALOGUE_SHARE = 4
#: a part's number must fit the 16 bits it is stored in
MAX_PARTS = 32_767


@dataclass(frozen=True)
class RowBudget:
    """What one row holds."""

    max_tokens: int  #: text tokens, anchors included
    max_frames: int

    @staticmethod
    def of(pack_text_tokens: int | None, pack_frames: int | None) -> "RowBudget | None":
        """The budget that the options of a verb name; None when they name none. Raises ConfigError for half of one, and
        for one that holds nothing."""
        if pack_text_tokens is None and pack_frames is None:
            return None
        if pack_text_tokens is None or pack_frames is None:
            raise ConfigError("pack_text_tokens and pack_frames are one budget: give both or neither")
        for name, value in (("pack_text_tokens", pack_text_tokens), ("pack_frames", pack_frames)):
            if value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        return RowBudget(pack_text_tokens, pack_frames)


def compile_parts(
    sample: Sample,
    media: dict[str, MediaInfo],
    tokenizer: StreamTokenizer,
    config: CompilerConfig,
    budget: RowBudget | None,
    rng: np.random.Generator | None = None,
    variation: int | None = None,
) -> list[CompiledStream]:
    """The parts of a sample, in order; `[compile_sample(...)]` without a budget or where the whole fits it.

    Samples of other kinds are returned whole whether they fit or not. `variation` as for `compile_sample`; where the
    varied stream cannot be cut in as many parts as the sample itself, the sample itself is compiled. Raises SampleError
    as `compile_sample` does (but not for a stream that is longer than `compiler.max_frames`), and where one slot alone
    exceeds the budget.
    """
    if budget is None or not isinstance(sample, StreamSample):
        return [compile_sample(sample, media, tokenizer, config, rng, variation=variation)]
    check_known(sample, media)
    info = media[sample.media[0].id]
    plan = plan_stream(sample, info, tokenizer, config, MAX_SAMPLE_FRAMES)
    pieces = _pieces(plan, budget)
    if variation is not None:
        with contextlib.suppress(SampleError):
            varied = plan_stream(sample, info, tokenizer, config, MAX_SAMPLE_FRAMES, variation)
            varied_pieces = _pieces(varied, budget)
            if len(varied_pieces) == len(pieces):
                plan, pieces = varied, varied_pieces
    plan = drawn(plan, rng)
    return [write_stream(plan, piece.first, piece.end, piece.context, number) for number, piece in enumerate(pieces)]


@dataclass(frozen=True)
class _Piece:
    """What one part holds."""

    first: int  #: slots [first, end) of the timeline
    end: int
    context: list[int]  #: the dialogue so far, in ids


def _pieces(plan: StreamPlan, budget: RowBudget) -> list[_Piece]:
    """Where the stream is cut; nothing is written yet."""
    budget = RowBudget(budget.max_tokens, min(budget.max_frames, plan.config.max_frames))
    blocks = _blocks(plan)
    whole = len(plan.prefix) + sum(block.tokens for block in blocks)
    if whole <= budget.max_tokens and len(plan.arrivals) <= budget.max_frames:
        return [_Piece(0, len(plan.timeline), [])]
    pieces: list[_Piece] = []
    dialogue = _Dialogue(plan)
    begin = 0  # block
    while begin < len(blocks):
        room = budget.max_tokens - len(plan.prefix) - blocks[begin].tokens
        limit = min(budget.max_tokens // DIALOGUE_SHARE, room)
        context = dialogue.latest(limit, running=blocks[begin].goes_on) if begin else []
        end = _cut(plan, blocks, begin, budget, len(plan.prefix) + len(context))
        piece = _Piece(blocks[begin].first, blocks[end - 1].end, context)
        pieces.append(piece)
        if len(pieces) > MAX_PARTS:
            raise SampleError(plan.sample.key, f"takes more than {MAX_PARTS} parts of {_of(budget)}; raise the budget")
        dialogue.hear(plan.timeline[piece.first : piece.end])
        begin = end
    return pieces


@dataclass(frozen=True)
class _Block:
    """Slots that stay together: a frame's, and those of the user turns before the next frame."""

    first: int  #: slots [first, end) of the timeline
    end: int
    tokens: int
    goes_on: bool  #: a reply that began earlier runs into it


def _blocks(plan: StreamPlan) -> list[_Block]:
    """The timeline between its possible cuts; the opening turns belong to the first frame."""
    timeline = plan.timeline
    frames = [index for index, slot in enumerate(timeline) if slot.frame >= 0]
    bounds = [0, *frames[1:], len(timeline)]
    lengths = [len(opening_ids(plan, slot, index)) + said_length(slot) for index, slot in enumerate(timeline)]
    lengths[-1] += len(plan.template.close_turn())
    blocks = []
    for first, end in zip(bounds[:-1], bounds[1:], strict=True):
        piece = timeline[first].piece
        goes_on = piece is not None and not piece.starts
        blocks.append(_Block(first, end, sum(lengths[first:end]), goes_on))
    return blocks


def _cut(plan: StreamPlan, blocks: list[_Block], begin: int, budget: RowBudget, used: int) -> int:
    """The block before which the part that begins with block `begin` ends; `used` tokens stand before it."""
    fits = begin
    while fits < len(blocks) and fits - begin < budget.max_frames and used + blocks[fits].tokens <= budget.max_tokens:
        used += blocks[fits].tokens
        fits += 1
    if fits == begin:
        time_s = next(slot.time_s for slot in plan.timeline[blocks[begin].first :] if slot.frame >= 0)
        raise SampleError(
            plan.sample.key,
            f"the frame at {time_s} s and what is said until the next cannot be put in a row of {_of(budget)}: they "
            f"take {blocks[begin].tokens} tokens after {used} of the system text and the open turn; raise "
            "data.pack_text_tokens and data.pack_frames, or shorten the texts",
        )
    if fits == len(blocks):
        return fits
    free = [block for block in range(begin + 1, fits + 1) if not blocks[block].goes_on]
    return free[-1] if free else fits


def _of(budget: RowBudget) -> str:
    return f"{budget.max_tokens} tokens and {budget.max_frames} frames"


@dataclass
class _Turn:
    """A user turn, up to the header of the answer, and the replies to it, in ids."""

    opening: list[int]
    replies: list[list[list[int]]] = field(default_factory=list)  #: of each reply, its pieces
    last: Reply | None = None  #: the event of the last reply

    def length(self) -> int:
        return len(self.opening) + sum(len(piece) for reply in self.replies for piece in reply)

    def shortened(self, limit: int, running: bool) -> "_Turn":
        """The turn with as many of its last replies as fit `limit` ids; of one that still runs, of its last pieces."""
        kept: list[list[list[int]]] = []
        room = limit - len(self.opening)
        for reply in reversed(self.replies):
            length = sum(map(len, reply))
            if length > room:
                if running and not kept:
                    kept = [_last_that_fit(reply, room)]
                break
            kept.insert(0, reply)
            room -= length
        return _Turn(self.opening, kept, self.last)


def _last_that_fit(pieces: list[list[int]], room: int) -> list[list[int]]:
    kept: list[list[int]] = []
    for piece in reversed(pieces):
        if len(piece) > room:
            break
        kept.insert(0, piece)
        room -= len(piece)
    return kept


class _Dialogue:
    """What has been said up to a cut."""

    def __init__(self, plan: StreamPlan):
        self._template = plan.template
        self._silence = [plan.tokenizer.special.silence]
        self._turns: list[_Turn] = []

    def hear(self, slots: list[TimelineSlot]) -> None:
        """Take note of slots in their order."""
        for slot in slots:
            if slot.opens_turn:
                self._turns.append(_Turn(self._template.user_turn(slot.question.text if slot.question else "")))
            if slot.piece is None:
                continue
            turn = self._turns[-1]
            if turn.last is not slot.piece.event:
                turn.replies.append([])
                turn.last = slot.piece.event
            turn.replies[-1].append([*slot.piece.ids, *(self._silence if slot.piece.stops else [])])

    def latest(self, limit: int, running: bool) -> list[int]:
        """The dialogue in at most `limit` ids: the oldest turns are dropped whole, and what is too long in the turn
        that is still open loses its oldest replies (one that is `running`, its oldest pieces). That turn's question
        stays, whatever its length."""
        close = self._template.close_turn()
        turns = [self._turns[-1].shortened(limit, running)]
        room = limit - turns[0].length()
        for turn in reversed(self._turns[:-1]):
            room -= turn.length() + len(close)
            if room < 0:
                break
            turns.insert(0, turn)
        ids: list[int] = []
        for index, turn in enumerate(turns):
            ids += [*(close if index else []), *turn.opening]
            ids += [token for reply in turn.replies for piece in reply for token in piece]
        return ids
