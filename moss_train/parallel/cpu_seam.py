"""The CPU seam: the real megatron-core 0.16.1 on CPU with gloo.

Megatron-core names CUDA in a few dozen places (device literals, `torch.cuda.current_device()`, CUDA random
states). Without CUDA each of them raises, so redirecting them to the CPU changes no behaviour that works;
with CUDA no device is redirected. On both, megatron's optimizer gets an Adam whose state it can restore when neither
Transformer Engine nor Apex is installed. Plain function patches are used because a `TorchFunctionMode` is
inactive inside `.backward()`, where recomputation needs it. Every patch below is one that a training step hits.
"""

import functools
import logging
import os

import torch
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "empty_like", "zeros_like", "ones_like")
_installed = False


def install() -> None:
    """Redirect megatron-core's CUDA calls to the CPU where there is no CUDA, and mend its optimizer where it has no
    FusedAdam. Does nothing when called again.

    Must run before the first import of `megatron`: importing `moss_train.parallel` does it.
    """
    global _installed
    if _installed:
        return
    _installed = True
    if not torch.cuda.is_available():
        _redirect_to_cpu()
    _patch_optimizer()


def _redirect_to_cpu() -> None:
    # Megatron's `jit_fuser` is torch.compile, which wants a C++ compiler and minutes on a CPU.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    _patch_devices()
    _patch_random_states()
    _patch_tensor_type_names()
    _patch_autocast_wrappers()
    _patch_recompute()


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _without_cuda_device(factory):
    @functools.wraps(factory)
    def wrapped(*args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return wrapped


def _patch_devices() -> None:
    torch.cuda.current_device = lambda: _CPU
    torch.cuda.synchronize = lambda *args, **kwargs: None
    # `with torch.device("meta")` knows the factories by identity and reads them once; let it read the real ones,
    # which the wrapped ones call, or models could not be built on the meta device any more.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _without_cuda_device(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


def _patch_random_states() -> None:
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)


class _TypeName(str):
    """'torch.FloatTensor' that also equals 'torch.cuda.FloatTensor': megatron's optimizer compares type names."""

    __hash__ = str.__hash__

    def __eq__(self, other):
        return str(self) == (other.replace("torch.cuda.", "torch.") if isinstance(other, str) else other)

    def __ne__(self, other):
        return not self == other


def _patch_tensor_type_names() -> None:
    original = torch.Tensor.type

    def named_type(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        return _TypeName(result) if isinstance(result, str) else result

    torch.Tensor.type = named_type


def _patch_autocast_wrappers() -> None:
    # megatron binds custom_fwd/bwd to device_type="cuda" at import; on CPU the autocast state to follow is "cpu".
    def for_cpu(original):
        @functools.wraps(original)
        def wrapped(fwd=None, *, device_type, **kwargs):
            return original(fwd, device_type="cpu" if device_type == "cuda" else device_type, **kwargs)

        return wrapped

    torch.amp.custom_fwd = for_cpu(torch.amp.custom_fwd)
    torch.amp.custom_bwd = for_cpu(torch.amp.custom_bwd)


def _patch_recompute() -> None:
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    logger = logging.getLogger(megatron_random.__name__)
    logger.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _patch_optimizer() -> None:
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    from moss_train.parallel.fused_layout_adam import FusedLayoutAdam

    # torch's AdamW keeps its step count per parameter, which megatron-core 0.16.1 can neither set up nor restore.
    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam = FusedLayoutAdam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distributed.Adam = FusedLayoutAdam
        distributed.HAVE_APEX_OR_TE = True
        distributed.USING_APEX_OPTIMIZER = True
