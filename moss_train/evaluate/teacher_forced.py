"""The model's decisions with the reference's past: what training optimises, measured on held-out streams.

Also the proof that serving equals training: `incremental_logits` runs a compiled stream through the key-value caches.

Shape suffixes: R rows, T tokens, V vocabulary, L tokens fed at once, C colour channels, H, W pixels, F frames.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from moss_train.data.batch import Batch
from moss_train.evaluate.decoder import forbidden_tokens
from moss_train.evaluate.transcript import StreamTranscript
from moss_train.streams.compiled import IGNORED_LABEL, CompiledStream
from moss_train.streams.tokenizer import StreamTokenizer


@torch.inference_mode()
def teacher_forced_transcripts(
    model: Any,
    batch: Batch,
    compiled: Sequence[CompiledStream],
    transcripts: Sequence[StreamTranscript],
    tokenizer: StreamTokenizer,
) -> list[StreamTranscript]:
    """The transcripts with the model's side filled from one forward pass.

    `batch` holds one stream a row, row r being `compiled[r]`. In a slot where the reference speaks, the model's text is
    the most probable token at each position of the reference's text; where it is silent, the one token that the model
    would have begun with. A slot whose decision is silence says nothing, so that a reply missed at its first slot is
    not completed by the reference's later ones.
    """
    logits_TRV = model(batch.to(next(model.parameters()).device))
    forbidden = torch.tensor(forbidden_tokens(tokenizer), device=logits_TRV.device)
    finished = []
    for row, (stream, transcript) in enumerate(zip(compiled, transcripts, strict=True)):
        logits_TV = logits_TRV[: len(stream.ids), row, : tokenizer.vocabulary_size].float()
        logits_TV = logits_TV.index_fill(1, forbidden, -torch.inf)
        predicted = logits_TV.argmax(-1).tolist()
        at_slots = torch.tensor([slot.position for slot in stream.slots], device=logits_TV.device)
        silence = logits_TV[at_slots].softmax(-1)[:, tokenizer.special.silence].tolist()
        finished.append(_fill(stream, transcript, predicted, silence, tokenizer))
    return finished


def _fill(
    stream: CompiledStream,
    transcript: StreamTranscript,
    predicted: Sequence[int],
    silence_probabilities: Sequence[float],
    tokenizer: StreamTokenizer,
) -> StreamTranscript:
    silence = tokenizer.special.silence
    slots = []
    begun: str | None = None  # the reference's reply whose first slot the model did not miss
    for slot, record, probability in zip(stream.slots, transcript.slots, silence_probabilities, strict=True):
        if slot.note == "blocked":  # nothing is decided there, and nothing was trained
            slots.append(replace(record, state="silence", text="", ends=False, silence_probability=None))
            continue
        span = _text_span(stream, slot.position, silence)
        speaks = predicted[slot.position] != silence
        said = [token for token in (predicted[t] for t in span or [slot.position]) if token != silence]
        state = "silence"
        if speaks:
            state = "continue" if record.reference_state == "continue" and begun == record.reference_event else "speak"
        if record.reference_state == "speak":
            begun = record.reference_event if speaks else None
        stops = bool(span) and record.reference_ends and predicted[span[-1] + 1] == silence
        slots.append(
            replace(
                record,
                state=state,
                text=tokenizer.decode(said) if speaks else "",
                ends=speaks and (stops or not record.reference_speaks),
                silence_probability=probability,
            )
        )
    return replace(transcript, slots=tuple(slots))


def _text_span(stream: CompiledStream, position: int, silence: int) -> list[int]:
    """The positions whose labels are the text of the slot that is decided at `position`; [] for a silent slot."""
    span = []
    while position < len(stream.labels) and stream.labels[position] not in (IGNORED_LABEL, silence):
        span.append(position)
        position += 1
    return span


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
