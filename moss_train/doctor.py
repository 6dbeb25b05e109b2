"""`moss-train doctor`: what is installed, which devices there are and what is missing for what."""

import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass

_NEEDED_FOR = {
    "torch": "everything",
    "megatron-core": "everything",
    "webdataset": "everything",
    "hydra-core": "everything",
    "tokenizers": "everything",
    "safetensors": "everything",
    "psutil": "megatron-core",
    "einops": "megatron-core",
    "decord": "video (extra `video`)",
    "av": "video (extra `video`)",
    "wandb": "tracking=offline and tracking=online (extra `wandb`)",
    "transformers": "comparison with Hugging Face's own model (extra `dev`)",
    "pytest": "tests (extra `dev`)",
    "deepspeed": "engine=deepspeed (extra `deepspeed`)",
    "megatron-energon": "a later release's comparison of loaders (extra `energon`)",
    "transformer-engine": "fused layers on NVIDIA GPUs (extra `gpu`)",
    "flash-attn": "fused attention on NVIDIA GPUs (extra `gpu`)",
}
_ESSENTIAL = [name for name, purpose in _NEEDED_FOR.items() if purpose in ("everything", "megatron-core")]


@dataclass
class DoctorOptions:
    """`moss-train doctor` takes no options."""


def doctor_command(options: DoctorOptions) -> int:
    """Print versions, devices and what is missing; exit code 1 when something essential is."""
    print(f"python             {platform.python_version()} on {platform.platform()}")
    print(f"moss_train         {_version('moss_train') or 'run from a source tree'}")
    missing = []
    for name, purpose in _NEEDED_FOR.items():
        version = _version(name)
        if version is None:
            missing.append(name)
        print(f"{name:<19}{version or 'missing':<16} {'' if version else 'needed for ' + purpose}".rstrip())
    print(f"processors         {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}")
    if importlib.util.find_spec("torch") is not None:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
        print(f"GPUs               {names or 'none: training runs on the processors with gloo'}")
    absent = [name for name in _ESSENTIAL if name in missing]
    if not absent:
        for part, choice in _implementations().items():
            print(f"{part:<19}{choice}")
    if absent:
        print(f"not ready: install {', '.join(absent)}")
        return 1
    print("ready")
    return 0


def _implementations() -> dict[str, str]:
    """Which implementation the model's parts take in bfloat16, and why."""
    import torch

    if not torch.cuda.is_available():
        reason = "there is no CUDA device"
        return {"layers": f"local: {reason}", "self-attention": f"torch's: {reason}", "fp8": f"no: {reason}"}
    import moss_train.parallel  # noqa: F401 - before megatron
    from moss_train.errors import ConfigError
    from moss_train.model.flash import flash_attention_problem
    from moss_train.model.modules import transformer_engine_problem
    from moss_train.model.precision import Precision

    device, head_size = torch.device("cuda", torch.cuda.current_device()), 128  # as in every released size
    layers = transformer_engine_problem()
    attention = flash_attention_problem(torch.bfloat16, device, head_size)
    try:
        Precision.named("fp8").check_supported(device)
        eight_bits = "yes"
    except ConfigError as error:
        eight_bits = f"no: {error}"
    return {
        "layers": f"local: {layers}" if layers else "Transformer Engine's",
        "self-attention": f"torch's: {attention}" if attention else "FlashAttention's, where streams are packed",
        "fp8": eight_bits,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
