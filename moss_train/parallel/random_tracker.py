"""The random states that megatron-core keeps beside torch's own: one for each kind of parallel region."""

from collections.abc import Mapping

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker


def tracker_states() -> dict[str, torch.Tensor]:
    """Name → state of every generator of megatron's tracker, on the CPU."""
    states = get_cuda_rng_tracker().get_states()
    return {name: (s.get_state() if isinstance(s, torch.Generator) else s).cpu() for name, s in states.items()}


def set_tracker_states(states: Mapping[str, torch.Tensor]) -> None:
    """Put back what `tracker_states` gave; generators of other names stay as they are."""
    tracker = get_cuda_rng_tracker()
    known = tracker.get_states()
    for name, state in states.items():
        if isinstance(known.get(name), torch.Generator):
            known[name].set_state(state.clone())
        else:
            known[name] = state.clone()
    tracker.set_states(known)
