"""DeepSpeed's JSON, made from our configuration and from what a user adds (`engine.deepspeed`; `deepspeed_fields`).

A field that follows from our configuration can be set there alone: to set it in `engine.deepspeed` too is an error,
also when both agree today. Nothing here imports DeepSpeed.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from moss_train.engines.config import EngineConfig
from moss_train.engines.deepspeed_fields import OFFLOADS, check_sections, check_values, check_with_stages
from moss_train.errors import ConfigError
from moss_train.parallel.config import LayoutConfig

Settings = dict[str, Any]


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
    check_sections(passed, {path[0] for path in own if len(path) == 1})
    for path, value in _nodes(passed):
        field = f"engine.deepspeed.{'.'.join(path)}"
        if path in own:
            raise ConfigError(f"{field}={value!r}: follows from {_SOURCES[path]}; set that, and remove this one")
        if value == "auto":
            raise ConfigError(f"{field}='auto': nothing here replaces the word; set a value, or remove it")
    check_values(passed, layout.zero, precision, torch.cuda.is_available() if cuda is None else cuda)
    if layout.pp > 1:
        check_with_stages(passed, layout.pp)


def takes_bf16_optimizer(settings: Settings) -> bool:
    """Whether DeepSpeed takes its BF16_Optimizer, which has no buckets and sums after the backward pass."""
    zero = settings["zero_optimization"]
    return (
        "bf16" in settings
        and zero["stage"] == 1
        and settings["data_types"]["grad_accum_dtype"] == "fp32"
        and (zero.get("offload_optimizer") or {}).get("device", "none") == "none"
    )


def fields_on_disk(settings: Settings) -> list[str]:
    """The fields that have DeepSpeed keep something on a disk."""
    zero = settings.get("zero_optimization") or {}
    return [
        f"engine.deepspeed.zero_optimization.{part}.device=nvme"
        for part in OFFLOADS
        if (zero.get(part) or {}).get("device") == "nvme"
    ]


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
    through a bucket of 200 MB instead of its 2 GB. Its throughput timer waits for the device every microbatch, for a
    line that is not shown."""
    defaults: Settings = {
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "timers": {"throughput": {"enabled": False}},
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


def _nodes(settings: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in settings.items():
        yield (*path, name), value
        if isinstance(value, Mapping):
            yield from _nodes(value, (*path, name))


def _merged(under: Settings, over: Settings) -> Settings:
    merged = dict(under)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if both else value
    return merged
