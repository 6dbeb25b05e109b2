"""The model's decisions with the reference's past: what training optimises, measured on held-out streams.

Also the proof that serving equals training: `incremental_logits` runs a compiled stream through the key-value caches.

Shape suffixes: R rows, T tokens, V vocabulary, L tokens fed at once, C colour channels, H, W pixels, F frames.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from moss_train.data.batch import Batch
from moss_train.evaluate.decoder import forbidden_tokens
from moss_train.evaluate.metrics.language import frames_to_roll, turns_of
from moss_train.evaluate.transcript import RolledForward, StreamTranscript
from moss_train.streams.compiled import IGNORED_LABEL, CompiledStream, Kind
from moss_train.streams.config import CompilerConfig
from moss_train.streams.row import RowWriter
from moss_train.streams.sight import Sight
from moss_train.streams.tokenizer import StreamTokenizer

#: labels of what is heard of a reply, and of its end; think units and what is known to be wrong are not judged
_JUDGED = (Kind.TEXT, Kind.ONSET, Kind.REVISION, Kind.STOP_SILENCE)


@torch.inference_mode()
def teacher_forced_transcripts(
    model: Any,
    batch: Batch,
    compiled: Sequence[CompiledStream],
    transcripts: Sequence[StreamTranscript],
    tokenizer: StreamTokenizer,
    speak_threshold: float | None = None,
) -> list[StreamTranscript]:
    """The transcripts with the model's side filled from one forward pass.

    `batch` holds one stream a row, row r being `compiled[r]`. In a slot where the reference speaks, the model's text is
    the most probable token at each position of the reference's text; where it is silent, the one token that the model
    would have begun with. A slot whose decision is silence says nothing, so that a reply missed at its first slot is
    not completed by the reference's later ones. `speak_threshold` as in `DecodeConfig`.
    """
    logits_TRV = model(batch.to(next(model.parameters()).device))
    finished = []
    for row, (stream, transcript) in enumerate(zip(compiled, transcripts, strict=True)):
        logits_TV = logits_TRV[: len(stream.ids), row, : tokenizer.vocabulary_size].float()
        finished.append(_fill(transcript, _Reading(stream, logits_TV, tokenizer, speak_threshold)))
    return finished


class _Reading:
    """What is read from the logits of one stream."""

    def __init__(
        self,
        stream: CompiledStream,
        logits_TV: torch.Tensor,
        tokenizer: StreamTokenizer,
        speak_threshold: float | None,
    ):
        self.stream, self.tokenizer = stream, tokenizer
        self.silence = tokenizer.special.silence
        judged_T = np.isin(stream.kinds, _JUDGED)
        places = torch.from_numpy(np.flatnonzero(judged_T)).to(logits_TV.device)
        labels = torch.from_numpy(stream.labels[judged_T].astype(np.int64)).to(logits_TV.device)
        nll = F.cross_entropy(logits_TV[places], labels, reduction="none") if len(places) else labels.float()
        best = logits_TV[places].argmax(-1)
        #: position → (cross-entropy of its label, whether the label is the most probable token)
        self.labels = dict(
            zip(places.tolist(), zip(nll.double().tolist(), (best == labels).tolist(), strict=True), strict=True)
        )
        forbidden = torch.tensor(forbidden_tokens(tokenizer), device=logits_TV.device)
        logits_TV = logits_TV.index_fill(1, forbidden, -torch.inf)
        self.predicted = logits_TV.argmax(-1).tolist()
        at_slots = torch.tensor([slot.position for slot in stream.slots], device=logits_TV.device)
        self.silence_probabilities = logits_TV[at_slots].softmax(-1)[:, self.silence].tolist()
        if speak_threshold is not None:
            self._decide(logits_TV, speak_threshold)

    def _decide(self, logits_TV: torch.Tensor, speak_threshold: float) -> None:
        """At slots in which no reply runs the threshold says whether to speak."""
        for slot, probability in zip(self.stream.slots, self.silence_probabilities, strict=True):
            if slot.state == "continue":
                continue
            self.predicted[slot.position] = self.silence
            if probability < speak_threshold:
                row_V = logits_TV[slot.position].clone()
                row_V[self.silence] = -torch.inf
                self.predicted[slot.position] = int(row_V.argmax())

    def text_span(self, position: int) -> list[int]:
        """The positions whose labels are the text of the slot that is decided at `position`; [] for a silent slot."""
        labels, kinds, span = self.stream.labels, self.stream.kinds, []
        while position < len(labels) and labels[position] not in (IGNORED_LABEL, self.silence):
            if kinds[position] != Kind.THINK:
                span.append(position)
            position += 1
        return span


def _fill(transcript: StreamTranscript, reading: _Reading) -> StreamTranscript:
    predicted, silence, stream = reading.predicted, reading.silence, reading.stream
    slots = []
    begun: str | None = None  # the reference's reply whose first slot the model did not miss
    for slot, record, probability in zip(stream.slots, transcript.slots, reading.silence_probabilities, strict=True):
        if slot.note == "blocked":  # nothing is decided there, and nothing was trained
            slots.append(replace(record, state="silence", text="", ends=False, silence_probability=None))
            continue
        span = reading.text_span(slot.position)
        speaks = predicted[slot.position] != silence
        said = [token for token in (predicted[t] for t in span or [slot.position]) if token != silence]
        state = "silence"
        if speaks:
            state = "continue" if record.reference_state == "continue" and begun == record.reference_event else "speak"
        if record.reference_state == "speak":
            begun = record.reference_event if speaks else None
        stops = bool(span) and record.reference_ends and predicted[span[-1] + 1] == silence
        places = [*span, span[-1] + 1] if span and record.reference_ends else span
        judged = [reading.labels[place] for place in places if place in reading.labels]
        right = [is_right for _, is_right in judged]
        slots.append(
            replace(
                record,
                state=state,
                text=reading.tokenizer.decode(said) if speaks else "",
                ends=speaks and (stops or not record.reference_speaks),
                silence_probability=probability,
                tokens=len(said) if speaks else 0,
                labels=len(judged),
                labels_right=right.index(False) if False in right else len(right),
                labels_nll=math.fsum(nll for nll, _ in judged),
            )
        )
    return replace(transcript, slots=tuple(slots))


@dataclass(frozen=True)
class MissedTurn:
    """A turn whose reply the model began at none of its slots, and the row that shows it further frames."""

    stream: int  #: number of its transcript among those given
    slot: int  #: in which the reference begins the reply
    row: CompiledStream
    anchors: tuple[int, ...]  #: positions in the row at which it may still speak


def missed_turns(
    compiled: Sequence[CompiledStream],
    transcripts: Sequence[StreamTranscript],
    tokenizer: StreamTokenizer,
    compiler: CompilerConfig,
) -> list[MissedTurn]:
    """The missed turns of teacher-forced transcripts that have further frames to show: the reference's row up to the
    decision at which the reply begins, then silence and anchor for each such frame (see `metrics.language`)."""
    missed = []
    for number, (stream, transcript) in enumerate(zip(compiled, transcripts, strict=True)):
        for turn in turns_of(transcript):
            frames = frames_to_roll(transcript, turn)
            if frames == 0 or turn.first_spoken(transcript) is not None:
                continue
            position = stream.slots[turn.reply.slot].position
            writer = RowWriter(tokenizer)
            writer.untrained(stream.ids[: position + 1].tolist())
            for _ in range(frames):
                writer.untrained([tokenizer.special.silence, tokenizer.special.anchor])
            seen = sum(token == tokenizer.special.anchor for token in writer.ids)
            row = writer.compiled(stream.key, stream.kind, stream.frames[:seen], compiler, Sight.of(compiler))
            missed.append(MissedTurn(number, turn.reply.slot, row, tuple(range(position + 2, len(row.ids), 2))))
    return missed


@torch.inference_mode()
def rolled_forward(
    model: Any,
    batch: Batch,
    missed: Sequence[MissedTurn],
    tokenizer: StreamTokenizer,
    speak_threshold: float | None = None,
) -> list[RolledForward]:
    """What the model does in `missed` when the silence goes on; `batch` holds the row of one in each of its rows."""
    logits_TRV = model(batch.to(next(model.parameters()).device))
    forbidden = torch.tensor(forbidden_tokens(tokenizer), device=logits_TRV.device)
    silence, rolled = tokenizer.special.silence, []
    for row, turn in enumerate(missed):
        logits_NV = logits_TRV[list(turn.anchors), row, : tokenizer.vocabulary_size].float()
        logits_NV = logits_NV.index_fill(1, forbidden, -torch.inf)
        if speak_threshold is None:
            speaks = (logits_NV.argmax(-1) != silence).tolist()
        else:
            speaks = (logits_NV.softmax(-1)[:, silence] < speak_threshold).tolist()
        spoke_after = speaks.index(True) + 1 if True in speaks else None
        rolled.append(RolledForward(turn.slot, len(turn.anchors), spoke_after))
    return rolled


@torch.inference_mode()
def incremental_logits(model: Any, stream: CompiledStream, frames_FCHW: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of a compiled stream, run through the caches in the order in which its tokens see its frames.

    Each frame is added just before the first token that may see it; between two frames the tokens are fed at once.
    Equal to the full forward up to rounding, for any layout, jittered or windowed.
    """
    device = next(model.parameters()).device
    length = len(stream.ids)
    state = model.start_streams(1, length, max(1, len(stream.frames)))
    pieces = []
    start = added = 0
    while start < length:
        seen = int(stream.visible_hi[start])
        if seen > added:
            model.add_frames(
                state,
                frames_FCHW[added:seen].to(device),
                torch.zeros(seen - added, dtype=torch.long, device=device),
                torch.as_tensor(stream.frame_positions[added:seen], dtype=torch.long, device=device),
            )
            added = seen
        end = start + 1
        while end < length and stream.visible_hi[end] == seen:
            end += 1

        def row(values: Any, dtype: torch.dtype, part: slice = slice(start, end)) -> torch.Tensor:
            return torch.as_tensor(values[part], dtype=dtype, device=device)[None]

        logits_RLV = model.extend(
            state,
            row(stream.ids, torch.long),
            row(stream.positions, torch.long),
            torch.tensor([end - start], device=device),
            visible_lo_RL=row(stream.visible_lo, torch.int32),
            visible_hi_RL=row(stream.visible_hi, torch.int32),
            sinks=stream.sinks,
            cross_positions_RL=row(stream.cross_positions, torch.long),
            text_lo_RL=row(stream.text_lo, torch.int32),
            text_sinks=stream.text_sinks,
        )
        pieces.append(logits_RLV[0])
        start = end
    return torch.cat(pieces)


def largest_deviation(model: Any, batch: Batch, stream: CompiledStream, frames_FCHW: torch.Tensor) -> float:
    """Largest absolute difference of the logits at the slots, incremental against teacher-forced.

    `batch` holds `stream` alone in its only row.
    """
    at_slots = [slot.position for slot in stream.slots]
    with torch.inference_mode():
        full_TV = model(batch.to(next(model.parameters()).device))[:, 0]
    step_TV = incremental_logits(model, stream, frames_FCHW)
    return float((full_TV[at_slots] - step_TV[at_slots]).abs().max())
