"""DeepSpeed's JSON, made from our configuration, and what of it a user may add (`engine.deepspeed`).

A field that follows from our configuration can be set there alone: to set it in `engine.deepspeed` too is an error,
also when both agree today. Nothing here imports DeepSpeed.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from moss_train.engines.config import EngineConfig
from moss_train.errors import ConfigError
from moss_train.parallel.config import LayoutConfig

Settings = dict[str, Any]

#: Sections of DeepSpeed's JSON that `engine.deepspeed` may hold. DeepSpeed passes over names it does not know, so that
#: a misspelt one would do nothing, silently.
SECTIONS = (
    "aio",
    "bf16",
    "comms_logger",
    "communication_data_type",
    "data_types",
    "dump_state",
    "flops_profiler",
    "fp16",
    "memory_breakdown",
    "steps_per_print",
    "timers",
    "wall_clock_breakdown",
    "zero_optimization",
)

#: Of what DeepSpeed knows: where ours is set instead, or why it is not offered.
_ELSEWHERE = {
    "activation_checkpointing": "set engine.recompute",
    "amp": "set precision",
    "checkpoint": "checkpoints are written in our own format; set checkpoint",
    "curriculum_learning": "the order of data is the blend's; set stages.<name>.data",
    "data_efficiency": "the order of data is the blend's; set stages.<name>.data",
    "gradient_allreduce_op": "gradients are summed, and the loss is divided by the global batch's normaliser",
    "gradient_predivide_factor": "gradients are summed, and the loss is divided by the global batch's normaliser",
    "optimizer": "set stages.<name>.optim",
    "pipeline": "set layout.pp, and engine.recompute",
    "scheduler": "set stages.<name>.optim",
    "sequence_parallel_size": "set layout.sp",
    "tensor_parallel": "set layout.tp",
    "torch_autocast": "set precision",
    "train_batch_size": "set stages.<name>.data",
}

#: Fields of `zero_optimization` that are known not to work here.
_BROKEN = {
    "zenflow": "DeepSpeed 0.19.8 transposes the weights when it starts",
    "cpu_offload": "is DeepSpeed's old name; set offload_optimizer.device=cpu",
    "cpu_offload_param": "is DeepSpeed's old name; set offload_param.device=cpu",
    "leaf_module": "makes gradients of a layer come in another order; leave it out",
    "zero_quantized_nontrainable_weights": "keeps 8 bits of frozen weights, which checkpoints must hold in full",
    "elastic_checkpoint": "checkpoints are written in our own format; leave it out",
}

#: Those that need CUDA.
_CUDA_ONLY = ("zero_quantized_weights", "zero_quantized_gradients")

_OFFLOADS = ("offload_optimizer", "offload_param")


def deepspeed_settings(engine: EngineConfig, layout: LayoutConfig, precision: str, clip: float) -> Settings:
    """The whole dictionary that DeepSpeed gets. ConfigError as `check_settings`.

    precision: fp32, bf16 or fp16. clip: largest norm of the gradient, 0 is off.
    """
    own = _own(engine, layout, precision, clip)
    return _merged(_merged(_defaults(precision), _passed(engine)), own)


def check_settings(engine: EngineConfig, layout: LayoutConfig, precision: str, cuda: bool | None = None) -> None:
    """Raise ConfigError, naming the field of `engine.deepspeed` and the remedy, for the first that cannot be.

    cuda: whether there is a CUDA device; None asks torch.
    """
    passed, own = _passed(engine), set(_leaves(_own(engine, layout, precision, clip=0.0)))
    for section in passed:
        if section in _ELSEWHERE:
            raise ConfigError(f"engine.deepspeed.{section}: is not set here; {_ELSEWHERE[section]}")
        if section not in SECTIONS and (section,) not in own:
            raise ConfigError(f"engine.deepspeed.{section}: legal names are {', '.join(SECTIONS)}")
    for path in _leaves(passed):
        if path in own:
            raise ConfigError(
                f"engine.deepspeed.{'.'.join(path)}={_value(passed, path)!r}: follows from {_SOURCES[path]}; set that, "
                "and remove this one"
            )
    for section in ("fp16", "bf16"):
        if section in passed and section != precision:
            raise ConfigError(
                f"engine.deepspeed.{section}: means nothing with precision={precision}; set precision={section}, or "
                "remove it"
            )
    _check_zero(passed.get("zero_optimization", {}), layout.zero, torch.cuda.is_available() if cuda is None else cuda)


def fields_on_disk(settings: Settings) -> list[str]:
    """The fields that have DeepSpeed keep something on a disk."""
    zero = settings.get("zero_optimization") or {}
    return [
        f"engine.deepspeed.zero_optimization.{part}.device=nvme"
        for part in _OFFLOADS
        if (zero.get(part) or {}).get("device") == "nvme"
    ]


def _check_zero(zero: Any, stage: int, cuda: bool) -> None:
    where = "engine.deepspeed.zero_optimization"
    if not isinstance(zero, Mapping):
        raise ConfigError(f"{where}={zero!r}: must be an object of fields")
    for name, why in _BROKEN.items():
        if zero.get(name):
            raise ConfigError(f"{where}.{name}={zero[name]!r}: {why}")
    for name in _CUDA_ONLY:
        if zero.get(name) and not cuda:
            raise ConfigError(f"{where}.{name}={zero[name]!r}: needs CUDA, which there is none of; remove it")
    if zero.get("allgather_bucket_size", 0) % 2:
        raise ConfigError(f"{where}.allgather_bucket_size={zero['allgather_bucket_size']!r}: must be even")
    for part in _OFFLOADS:
        offload = zero.get(part) or {}
        if not isinstance(offload, Mapping):
            raise ConfigError(f"{where}.{part}={offload!r}: must be an object with a device")
        device = offload.get("device", "none")
        if device not in ("none", "cpu", "nvme"):
            raise ConfigError(f"{where}.{part}.device={device!r}: legal values are none, cpu, nvme")
        if device != "none" and part == "offload_param" and stage != 3:
            raise ConfigError(f"{where}.{part}.device={device!r}: needs layout.zero=3, which shares out parameters")
        if device == "nvme" and part == "offload_param":
            raise ConfigError(
                f"{where}.{part}.device='nvme': parameters read back from a disk do not fit their gathering in "
                "DeepSpeed 0.19.8; set cpu, or offload_optimizer.device=nvme"
            )
        if device == "nvme" and offload.get("fast_init"):
            raise ConfigError(f"{where}.{part}.fast_init=true: reads past the ends of blocks of a disk; remove it")
        if device == "nvme" and stage != 3:
            raise ConfigError(f"{where}.{part}.device='nvme': needs layout.zero=3; set that, or cpu")
        if device == "nvme" and not offload.get("nvme_path"):
            raise ConfigError(f"{where}.{part}.nvme_path: must be a folder on a local disk, of this run alone")
        if offload.get("super_offload"):
            raise ConfigError(f"{where}.{part}.super_offload=true: has an optimizer of its own; remove it")


#: Where each field that is ours comes from.
_SOURCES: dict[tuple[str, ...], str] = {
    ("train_micro_batch_size_per_gpu",): "stages.<name>.data",
    ("gradient_accumulation_steps",): "stages.<name>.data",
    ("gradient_clipping",): "stages.<name>.optim.clip",
    ("prescale_gradients",): "the loss's own normaliser",
    ("zero_allow_untested_optimizer",): "stages.<name>.optim",
    ("zero_force_ds_cpu_optimizer",): "stages.<name>.optim",
    ("zero_optimization", "stage"): "layout.zero",
    ("zero_optimization", "overlap_comm"): "engine.overlap_grad_reduce",
    ("zero_optimization", "memory_efficient_linear"): "the model's own layers",
    ("zero_optimization", "ignore_unused_parameters"): "the engine, which uses all parameters in every step",
    ("bf16", "enabled"): "precision",
    ("bf16", "check_grad_overflow"): "the rule that steps which are not finite are not taken",
    ("fp16", "enabled"): "precision",
    ("fp16", "loss_scale"): "engine.loss_scale",
    ("fp16", "initial_scale_power"): "engine.initial_loss_scale",
}


def _own(engine: EngineConfig, layout: LayoutConfig, precision: str, clip: float) -> Settings:
    own: Settings = {
        # Counted by our loader: a step has as many microbatches as its global batch needs, and the engine says which
        # is the last.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Without ZeRO DeepSpeed tells no gradient norm, so the engine measures and clips itself.
        "gradient_clipping": clip if layout.zero else 0.0,
        "prescale_gradients": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": layout.zero,
            "overlap_comm": engine.overlap_grad_reduce,
            # It would replace torch.nn.functional.linear in the whole process.
            "memory_efficient_linear": False,
            "ignore_unused_parameters": True,
        },
    }
    if layout.pp > 1:
        # Messages go whole: DeepSpeed's halves are wrong with sequence parallelism, silently.
        own["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False, "activation_checkpoint_interval": 0}
    if layout.dualpipev:
        own["gradient_accumulation_steps"] = 2 * layout.pp  # it insists, when it starts
    if precision == "bf16":
        own["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if precision == "fp16":
        own["fp16"] = {
            "enabled": True,
            "loss_scale": engine.loss_scale or 0.0,  # 0 adapts it
            "initial_scale_power": round(math.log2(engine.initial_loss_scale)),
        }
    return own


def _defaults(precision: str) -> Settings:
    """What DeepSpeed gets unless `engine.deepspeed` says otherwise: gradients are summed in float32, as megatron's, and
    through a bucket of 200 MB instead of its 2 GB."""
    defaults: Settings = {
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"reduce_bucket_size": 50_000_000},
    }
    if precision == "fp16":
        defaults["fp16"] = {"loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1.0}
    return defaults


def _passed(engine: EngineConfig) -> Settings:
    return _plain(engine.deepspeed)


def _plain(value: Any) -> Any:
    return {str(key): _plain(one) for key, one in value.items()} if isinstance(value, Mapping) else value


def _leaves(settings: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name)


def _value(settings: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        settings = settings[name]
    return settings


def _merged(under: Settings, over: Settings) -> Settings:
    merged = dict(under)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if both else value
    return merged
