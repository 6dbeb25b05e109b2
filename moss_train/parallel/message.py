"""The side channel: hidden states and projected frames in one tensor between pipeline stages.

Megatron's schedules send one float tensor of one shape per step. Every stage knows the shapes of every microbatch from
its own metadata, so the message is a flat run of vectors: the tokens of the hidden state, then the vision tokens of all
frames, then zeros up to the longest message of the step. Both parts keep their gradients on the way back.

Shape suffixes: T tokens (this rank's, under sequence parallelism), R rows, N frames held, P vision tokens of a frame,
H decoder width, S length of the message.
"""

from collections.abc import Sequence

import torch


def message_length(tokens: int, rows: int, frames: int, frame_tokens: int) -> int:
    """Vectors of a message with `tokens` × `rows` hidden states and `frames` × `frame_tokens` vision tokens."""
    return tokens * rows + frames * frame_tokens


def pack_message(hidden_TRH: torch.Tensor, features_NPH: torch.Tensor | None, length: int) -> torch.Tensor:
    """[S, 1, H] with S = `length`; features are None when the microbatch has no frames.

    While gradients are recorded the message takes part in them even if nothing before it is trained: the next stage
    sends its gradient in any case.
    """
    width = hidden_TRH.shape[-1]
    parts = [hidden_TRH.reshape(-1, 1, width)]
    if features_NPH is not None:
        parts.append(features_NPH.reshape(-1, 1, width))
    room = length - sum(part.shape[0] for part in parts)
    if room:
        parts.append(hidden_TRH.new_zeros(room, 1, width))
    message = torch.cat(parts)
    if torch.is_grad_enabled() and not message.requires_grad:
        message = message + message.new_zeros(1, requires_grad=True)
    return message


def unpack_message(
    message: torch.Tensor, hidden_shape: Sequence[int], features_shape: Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states [T, R, H] and features [N, P, H] of the shapes given; None for features when their shape is."""
    width = message.shape[-1]
    tokens = hidden_shape[0] * hidden_shape[1]
    vision = features_shape[0] * features_shape[1] if features_shape is not None else 0
    hidden, features, _ = message.split([tokens, vision, message.shape[0] - tokens - vision])
    return hidden.reshape(*hidden_shape[:2], width), (
        features.reshape(*features_shape[:2], width) if features_shape is not None else None
    )
