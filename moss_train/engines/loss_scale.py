"""DeepSpeed's adaptive loss scale in the form in which megatron's is saved, so that either engine goes on from it."""

import math
from typing import Any


def scaler_of(optimizer: Any) -> Any:
    """The loss scaler of one of DeepSpeed's ZeRO optimizers. At its least scale it shall not end the run: a budget of
    skipped steps does (`guards`)."""
    scaler = optimizer.loss_scaler
    if scaler.dynamic:
        scaler.raise_error_at_min_scale = False
    return scaler


def can_fall(scaler: Any) -> bool:
    """Whether the scale answers overflows, and is not at its lowest yet."""
    return bool(scaler.dynamic and scaler.cur_scale > scaler.min_scale)


def saved(scaler: Any, copies: int) -> dict[str, float | int]:
    """The state of an adaptive scale as JSON: the scale, steps since its last change, overflows before it falls.

    copies: by what the loss is multiplied beside the scale, which megatron's is not.
    """
    return {
        "scale": float(scaler.cur_scale) * copies,
        "growth_tracker": max(0, scaler.cur_iter - scaler.last_overflow_iter - 1) % scaler.scale_window,
        "hysteresis_tracker": int(scaler.cur_hysteresis),
    }


def restore(scaler: Any, state: dict[str, Any], copies: int) -> None:
    """Take up what `saved`, or megatron's scaler, gave; perhaps on another number of processes. The scale stays a power
    of 2, and at least the least."""
    scaler.cur_scale = max(2.0 ** math.floor(math.log2(float(state["scale"]) / copies)), scaler.min_scale)
    scaler.cur_iter, scaler.last_overflow_iter = int(state["growth_tracker"]), -1
    scaler.cur_hysteresis = max(1, int(state["hysteresis_tracker"]))
