"""The random states of one process as plain tensors, so that they travel in safetensors."""

import hashlib
import random
from collections.abc import Mapping

import numpy as np
import torch

from moss_train.errors import CheckpointError
from moss_train.parallel.random_tracker import set_tracker_states, tracker_states

_TRACKER = "megatron/"


def seed_random_state(seed: int) -> None:
    """Start every generator of this process from `seed`, so that what is captured later follows from it."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_anew(seed: int, step: int, rank: int) -> None:
    """Start every generator from a seed that follows from the run's, the step and the process: for a process that has
    no state in the checkpoint, because another number of processes wrote it."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    seed_random_state(int.from_bytes(digest[:8], "little") % 2**63)


def capture_random_state(rank: int = 0) -> dict[str, torch.Tensor]:
    """States of Python, numpy, torch, megatron's tracker and, where there is one, the CUDA device, named
    `random/<rank>/…`."""
    version, words, gauss = random.getstate()
    if version != 3:
        raise CheckpointError(f"Python's random state has version {version}; this code knows version 3")
    numpy_state = np.random.get_state(legacy=False)
    inner = numpy_state["state"]
    states = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*inner["key"].tolist(), inner["pos"], numpy_state["has_gauss"]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),
        "torch": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().cpu()
    states |= {f"{_TRACKER}{name}": state for name, state in tracker_states().items()}
    return {f"random/{rank}/{name}": state for name, state in states.items()}


def restore_random_state(tensors: Mapping[str, torch.Tensor], rank: int = 0) -> None:
    """Put back what `capture_random_state` gave. CheckpointError when a state of this rank is missing; that of a CUDA
    device may be, when there was none."""

    def state(name: str) -> torch.Tensor:
        full_name = f"random/{rank}/{name}"
        if full_name not in tensors:
            raise CheckpointError(f"the checkpoint lacks {full_name}: it was written by fewer processes")
        return tensors[full_name]

    gauss = state("python_gauss").tolist()
    python_state = (3, tuple(state("python").tolist()), gauss[0] if gauss else None)
    *key, position, has_gauss = state("numpy").tolist()
    numpy_state = {
        "bit_generator": "MT19937",
        "state": {"key": np.array(key, dtype=np.uint32), "pos": position},
        "has_gauss": has_gauss,
        "gauss": state("numpy_gauss").item(),
    }
    torch_state = state("torch").clone()
    prefix = f"random/{rank}/{_TRACKER}"
    tracked = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    has_cuda = torch.cuda.is_available() and f"random/{rank}/cuda" in tensors
    cuda_state = state("cuda").clone() if has_cuda else None
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    torch.random.set_rng_state(torch_state)
    if cuda_state is not None:
        torch.cuda.set_rng_state(cuda_state)
    set_tracker_states(tracked)
