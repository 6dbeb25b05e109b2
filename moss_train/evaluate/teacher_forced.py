"""The model's decisions with the reference's past: what training optimises, measured on held-out streams.

What the model says of the reference's rows comes from `row_predictions`.

Shape suffixes: R rows, T tokens, V vocabulary, N places in a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from moss_train.errors import ConfigError
from moss_train.evaluate.config import DecodeConfig
from moss_train.evaluate.decoder import NO_HEAD, forbidden_tokens
from moss_train.evaluate.metrics.language import frames_to_roll, turns_of
from moss_train.evaluate.transcript import RolledForward, StreamTranscript
from moss_train.model.predictions import Predictions
from moss_train.streams.compiled import IGNORED_LABEL, CompiledStream, Kind
from moss_train.streams.config import CompilerConfig
from moss_train.streams.row import RowWriter
from moss_train.streams.sight import Sight
from moss_train.streams.tokenizer import StreamTokenizer

#: labels of what is heard of a reply, and of its end; think units and what is known to be wrong are not judged
_JUDGED = (Kind.TEXT, Kind.ONSET, Kind.REVISION, Kind.STOP_SILENCE)


@torch.inference_mode()
def teacher_forced_transcripts(
    predictions: Predictions,
    compiled: Sequence[CompiledStream],
    transcripts: Sequence[StreamTranscript],
    tokenizer: StreamTokenizer,
    decode: DecodeConfig,
) -> list[StreamTranscript]:
    """The transcripts with the model's side filled from what it says of the reference's rows.

    Row r of `predictions` is `compiled[r]`. In a slot where the reference speaks, the model's text is
    the most probable token at each position of the reference's text; where it is silent, the one token that the model
    would have begun with. A slot whose decision is silence says nothing, so that a reply missed at its first slot is
    not completed by the reference's later ones. Who decides at slots in which no reply runs is for `decode` to say:
    with `decide_by=head` the head does where a frame stands, which is what it was trained on.

    Raises ConfigError when the decision head shall decide and there is none.
    """
    speak_TR = _speak_probabilities(predictions, decode)
    finished = []
    for row, (stream, transcript) in enumerate(zip(compiled, transcripts, strict=True)):
        length = len(stream.ids)
        logits_TV = predictions.logits_TRV[:length, row, : tokenizer.vocabulary_size].float()
        speak_T = None if speak_TR is None else speak_TR[:length, row]
        finished.append(_fill(transcript, _Reading(stream, logits_TV, speak_T, tokenizer, decode)))
    return finished


def _speak_probabilities(predictions: Predictions, decode: DecodeConfig) -> torch.Tensor | None:
    """The decision head's P(speak), float32 [T, R], where it decides; None where tokens do."""
    if decode.decide_by == "tokens":
        return None
    if predictions.decisions_TR is None:
        raise ConfigError(NO_HEAD)
    return predictions.decisions_TR.sigmoid()


class _Reading:
    """What is read from the logits of one stream."""

    def __init__(
        self,
        stream: CompiledStream,
        logits_TV: torch.Tensor,
        speak_T: torch.Tensor | None,
        tokenizer: StreamTokenizer,
        decode: DecodeConfig,
    ):
        """`speak_T`: P(speak) where the decision head decides."""
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
        if speak_T is not None:
            self._decide_by_head(logits_TV, speak_T[at_slots].tolist(), decode.speaks_from)
        elif decode.speak_threshold is not None:
            for slot, probability in zip(stream.slots, self.silence_probabilities, strict=True):
                if slot.state != "continue":
                    self._decide(slot.position, probability < decode.speak_threshold, logits_TV)

    def _decide_by_head(self, logits_TV: torch.Tensor, speak: Sequence[float], speaks_from: float) -> None:
        """At frames in whose slots no reply runs."""
        for number, (slot, probability) in enumerate(zip(self.stream.slots, speak, strict=True)):
            if slot.state != "continue" and self.stream.ids[slot.position] == self.tokenizer.special.anchor:
                self.silence_probabilities[number] = 1.0 - probability
                self._decide(slot.position, probability >= speaks_from, logits_TV)

    def _decide(self, position: int, speaks: bool, logits_TV: torch.Tensor) -> None:
        """Whether the most probable text is said there, or nothing."""
        self.predicted[position] = self.silence
        if speaks:
            row_V = logits_TV[position].clone()
            row_V[self.silence] = -torch.inf
            self.predicted[position] = int(row_V.argmax())

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
    predictions: Predictions,
    missed: Sequence[MissedTurn],
    tokenizer: StreamTokenizer,
    decode: DecodeConfig,
) -> list[RolledForward]:
    """What the model does in `missed` when the silence goes on; row r of `predictions` is that of `missed[r]`."""
    logits_TRV, speak_TR = predictions.logits_TRV, _speak_probabilities(predictions, decode)
    forbidden = torch.tensor(forbidden_tokens(tokenizer), device=logits_TRV.device)
    silence, rolled = tokenizer.special.silence, []
    for row, turn in enumerate(missed):
        logits_NV = logits_TRV[list(turn.anchors), row, : tokenizer.vocabulary_size].float()
        logits_NV = logits_NV.index_fill(1, forbidden, -torch.inf)
        if speak_TR is not None:
            speaks = (speak_TR[list(turn.anchors), row] >= decode.speaks_from).tolist()
        elif decode.speak_threshold is None:
            speaks = (logits_NV.argmax(-1) != silence).tolist()
        else:
            speaks = (logits_NV.softmax(-1)[:, silence] < decode.speak_threshold).tolist()
        spoke_after = speaks.index(True) + 1 if True in speaks else None
        rolled.append(RolledForward(turn.slot, len(turn.anchors), spoke_after))
    return rolled
