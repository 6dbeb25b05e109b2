"""Which fields of DeepSpeed's JSON `engine.deepspeed` may hold, and with which values.

Said here: what DeepSpeed itself passes over or stumbles on late, and what would break a promise of ours. Other fields
are left to DeepSpeed's own classes (`deepspeed_library.require_deepspeed`). Nothing here imports DeepSpeed.
"""

from collections.abc import Mapping
from typing import Any

from moss_train.errors import ConfigError

#: What `engine.deepspeed` may hold. DeepSpeed passes over names it does not know, so that a misspelt one would do
#: nothing, silently. True: an object of fields; False: one value.
SECTIONS = {
    "aio": True,
    "bf16": True,
    "communication_data_type": False,
    "data_types": True,
    "flops_profiler": True,
    "fp16": True,
    "memory_breakdown": False,
    "timers": True,
    "wall_clock_breakdown": False,
    "zero_optimization": True,
}

_UNSEEN = "its reports are not shown; set tracking"

#: Of what DeepSpeed knows: where ours is set instead, or why it is not offered.
_ELSEWHERE = {
    "activation_checkpointing": "set engine.recompute",
    "amp": "set precision",
    "checkpoint": "checkpoints are written in our own format; set checkpoint",
    "comms_logger": _UNSEEN,
    "curriculum_learning": "the order of data is the blend's; set stages.<name>.data",
    "data_efficiency": "the order of data is the blend's; set stages.<name>.data",
    "dump_state": _UNSEEN,
    "gradient_allreduce_op": "gradients are summed, and the loss is divided by the global batch's normaliser",
    "gradient_predivide_factor": "gradients are summed, and the loss is divided by the global batch's normaliser",
    "optimizer": "set stages.<name>.optim",
    "pipeline": "set layout.pp, and engine.recompute",
    "scheduler": "set stages.<name>.optim",
    "sequence_parallel_size": "set layout.sp",
    "steps_per_print": _UNSEEN,
    "tensor_parallel": "set layout.tp",
    "torch_autocast": "set precision",
    "train_batch_size": "set stages.<name>.data",
}

_TYPES = ("fp32", "bf16", "fp16")
_FLAG, _COUNT, _NUMBER, _TEXT, _FIELDS = "true or false", "a whole number", "a number", "text", "an object of fields"
_ONE_OF = "one of a few"  # looked at on its own

#: Sections whose fields DeepSpeed reads without looking for others, or at their values.
_UNCHECKED: dict[str, dict[str, str]] = {
    "aio": {
        "block_size": _COUNT,
        "queue_depth": _COUNT,
        "intra_op_parallelism": _COUNT,
        "single_submit": _FLAG,
        "overlap_events": _FLAG,
        "use_gds": _FLAG,
    },
    "data_types": {"grad_accum_dtype": _ONE_OF},
    "flops_profiler": {
        "enabled": _FLAG,
        "recompute_fwd_factor": _NUMBER,
        "profile_step": _COUNT,
        "module_depth": _COUNT,
        "top_modules": _COUNT,
        "detailed": _FLAG,
        "output_file": _TEXT,
    },
    "timers": {"throughput": _FIELDS},
}

_OUR_CHECKPOINTS = "checkpoints are written in our own format; leave it out"
_KEPT_IN_FLOAT32 = "checkpoints hold weights and moments in float32; remove it"

#: Fields that are refused unless they are off.
_BROKEN = {
    ("zero_optimization", "zenflow"): "DeepSpeed 0.19.8 transposes the weights when it starts; remove it",
    ("zero_optimization", "cpu_offload"): "is DeepSpeed's old name; set offload_optimizer.device=cpu",
    ("zero_optimization", "cpu_offload_param"): "is DeepSpeed's old name; set offload_param.device=cpu",
    ("zero_optimization", "leaf_module"): "makes gradients of a layer come in another order; leave it out",
    ("zero_optimization", "zero_quantized_nontrainable_weights"): (
        "keeps 8 bits of frozen weights, which checkpoints must hold in full; remove it"
    ),
    ("zero_optimization", "cpu_offload_use_pin_memory"): "is DeepSpeed's old name; set offload_….pin_memory",
    ("zero_optimization", "elastic_checkpoint"): _OUR_CHECKPOINTS,
    ("zero_optimization", "gather_16bit_weights_on_model_save"): _OUR_CHECKPOINTS,
    ("zero_optimization", "stage3_gather_16bit_weights_on_model_save"): _OUR_CHECKPOINTS,
    ("zero_optimization", "stage3_gather_fp16_weights_on_model_save"): _OUR_CHECKPOINTS,
    ("bf16", "bf16_master_weights_and_grads"): _KEPT_IN_FLOAT32,
    ("bf16", "bf16_optimizer_states"): _KEPT_IN_FLOAT32,
    ("fp16", "fp16_master_weights_and_grads"): _KEPT_IN_FLOAT32,
}

#: Fields of `zero_optimization` that need CUDA, and ZeRO 3.
_CUDA_ONLY = ("zero_quantized_weights", "zero_quantized_gradients")

#: Fields of `zero_optimization` that ZeRO 3 alone reads; those of `stage3_…` too, which DeepSpeed knows without it.
_STAGE3 = (
    "allgather_sequential",
    "gather_16bit_weights_on_model_save",
    "max_live_parameters",
    "max_reuse_distance",
    "model_persistence_threshold",
    "module_granularity_threshold",
    "param_persistence_threshold",
    "prefetch_bucket_size",
    "sub_group_size",
    "use_all_reduce_for_fetch_params",
    "zero_hpz_partition_size",
    *_CUDA_ONLY,
)

OFFLOADS = ("offload_optimizer", "offload_param")


def check_sections(passed: Mapping[str, Any], own: set[str]) -> None:
    """Raise ConfigError for the first section that is none, or not of its kind. `own`: names that are ours to set."""
    for section, value in passed.items():
        if section in _ELSEWHERE:
            raise ConfigError(f"engine.deepspeed.{section}: is not set here; {_ELSEWHERE[section]}")
        if section not in SECTIONS and section not in own:
            raise ConfigError(f"engine.deepspeed.{section}: legal names are {', '.join(SECTIONS)}")
        if SECTIONS.get(section) and not isinstance(value, Mapping):
            raise ConfigError(
                f"engine.deepspeed.{section}={value!r}: must be an object of fields; set one of them "
                f"(engine.deepspeed.{section}.<field>), or remove it"
            )


def check_values(passed: Mapping[str, Any], stage: int, precision: str, cuda: bool) -> None:
    """Raise ConfigError for the first field that cannot be. `passed` has been through `check_sections`."""
    for section in ("fp16", "bf16"):
        if section in passed and section != precision:
            raise ConfigError(
                f"engine.deepspeed.{section}: means nothing with precision={precision}; set precision={section}, or "
                "remove it"
            )
    for name in ("memory_breakdown", "wall_clock_breakdown"):
        if name in passed:
            _require(_FLAG, passed[name], f"engine.deepspeed.{name}")
    for section, kinds in _UNCHECKED.items():
        for name, value in passed.get(section, {}).items():
            field = f"engine.deepspeed.{section}.{name}"
            if name not in kinds:
                raise ConfigError(f"{field}={value!r}: legal names are {', '.join(kinds)}")
            _require(kinds[name], value, field)
    if passed.get("aio", {}).get("use_gds") and not cuda:
        raise ConfigError("engine.deepspeed.aio.use_gds=True: needs CUDA, and this machine has none; remove it")
    if "communication_data_type" in passed:
        _require_one_of(_TYPES, passed["communication_data_type"], "engine.deepspeed.communication_data_type")
    if "grad_accum_dtype" in passed.get("data_types", {}):
        legal = tuple(dict.fromkeys(("fp32", precision)))
        _require_one_of(
            legal, passed["data_types"]["grad_accum_dtype"], "engine.deepspeed.data_types.grad_accum_dtype",
            f" with precision={precision}",
        )  # fmt: skip
    for (section, name), why in _BROKEN.items():
        value = passed.get(section, {}).get(name)
        if value:
            raise ConfigError(f"engine.deepspeed.{section}.{name}={value!r}: {why}")
    _check_zero(passed.get("zero_optimization", {}), stage, cuda)


def check_with_stages(passed: Mapping[str, Any], pipeline: int) -> None:
    """Raise ConfigError for what cannot be with pipeline stages. `passed` has been through `check_values`."""
    layout = f"with pipeline stages (layout.pp={pipeline})"
    remedy = "remove it, or set layout.pp=1"
    zero = passed.get("zero_optimization", {})
    for part in OFFLOADS:
        if (zero.get(part) or {}).get("device", "none") != "none":
            raise ConfigError(f"engine.deepspeed.zero_optimization.{part}: is not tried {layout}; {remedy}")
    crashes = f"DeepSpeed's timers crash in the first step {layout}; {remedy}"
    if passed.get("wall_clock_breakdown"):
        raise ConfigError(f"engine.deepspeed.wall_clock_breakdown=True: {crashes}")
    if passed.get("flops_profiler", {}).get("enabled"):
        raise ConfigError(f"engine.deepspeed.flops_profiler.enabled=True: {crashes}")


def _check_zero(zero: Mapping[str, Any], stage: int, cuda: bool) -> None:
    where = "engine.deepspeed.zero_optimization"
    for name in _CUDA_ONLY:
        if zero.get(name) and not cuda:
            raise ConfigError(f"{where}.{name}={zero[name]!r}: needs CUDA, and this machine has none; remove it")
    for name, value in zero.items():
        if stage != 3 and (name in _STAGE3 or name.startswith("stage3_")):
            raise ConfigError(f"{where}.{name}={value!r}: is read with layout.zero=3 alone; set that, or remove it")
    if zero.get("compute_grad_norm", True) is not True:
        raise ConfigError(
            f"{where}.compute_grad_norm={zero['compute_grad_norm']!r}: the gradient's norm is reported, and steps in "
            "which it is not finite are not taken; remove it"
        )
    if "allgather_bucket_size" in zero:
        bucket = zero["allgather_bucket_size"]
        _require(_COUNT, bucket, f"{where}.allgather_bucket_size")
        if bucket % 2:
            raise ConfigError(f"{where}.allgather_bucket_size={bucket!r}: must be even; set {bucket + 1}")
    for part in OFFLOADS:
        offload = zero.get(part)
        if offload is None:
            continue
        if not isinstance(offload, Mapping):
            raise ConfigError(f"{where}.{part}={offload!r}: must be an object with a device; set {part}.device")
        _check_offload(offload, part, f"{where}.{part}", stage)


def _check_offload(offload: Mapping[str, Any], part: str, where: str, stage: int) -> None:
    device = offload.get("device", "none")
    _require_one_of(("none", "cpu", "nvme"), device, f"{where}.device")
    if device != "none" and part == "offload_param" and stage != 3:
        raise ConfigError(f"{where}.device={device!r}: needs layout.zero=3, which shares out parameters; set that")
    if device == "cpu" and not stage:
        raise ConfigError(f"{where}.device='cpu': needs ZeRO; set layout.zero to 1, 2 or 3, or remove it")
    if device == "nvme" and part == "offload_param":
        raise ConfigError(
            f"{where}.device='nvme': parameters read back from a disk do not fit their gathering in "
            "DeepSpeed 0.19.8; set cpu, or offload_optimizer.device=nvme"
        )
    if device == "nvme" and offload.get("fast_init"):
        raise ConfigError(f"{where}.fast_init=true: reads past the ends of blocks of a disk; remove it")
    if device == "nvme" and stage != 3:
        raise ConfigError(f"{where}.device='nvme': needs layout.zero=3; set that, or cpu")
    path = offload.get("nvme_path")
    if device == "nvme" and not path:
        raise ConfigError(
            f"{where}.nvme_path={path!r}: must be a folder on a local disk, of this run alone; set it, or device=cpu"
        )
    if offload.get("super_offload"):
        raise ConfigError(f"{where}.super_offload=true: has an optimizer of its own; remove it")
    if part == "offload_optimizer" and offload.get("ratio", 1) != 1:
        raise ConfigError(
            f"{where}.ratio={offload['ratio']!r}: DeepSpeed steps the rest with an optimizer of its own; remove it"
        )


def _require(kind: str, value: Any, field: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        _FLAG: isinstance(value, bool),
        _COUNT: number and value == value // 1,
        _NUMBER: number,
        _TEXT: isinstance(value, str),
        _FIELDS: isinstance(value, Mapping),
        _ONE_OF: True,
    }
    if not fits[kind]:
        raise ConfigError(f"{field}={value!r}: must be {kind}; set it so, or remove it")


def _require_one_of(legal: tuple[str, ...], value: Any, field: str, where: str = "") -> None:
    if value not in legal:
        raise ConfigError(f"{field}={value!r}: legal values{where} are {', '.join(legal)}")
