"""Which layouts, precisions and options each engine has; said before anything is started."""

import math

from moss_train.engines.config import EngineConfig
from moss_train.engines.deepspeed_settings import check_settings, deepspeed_settings, takes_bf16_optimizer
from moss_train.errors import ConfigError
from moss_train.parallel.config import LayoutConfig

HALF = ("bf16", "fp16")


def check_engine(engine: EngineConfig, layout: LayoutConfig, precision: str) -> None:
    """Raise ConfigError, naming field, value and remedy, unless the engine can train in this layout and precision.

    What it says of single options holds for every engine; the rest is told apart by `engine.name`.
    """
    if engine.loss_scale is not None and precision != "fp16":
        raise ConfigError(
            f"engine.loss_scale={engine.loss_scale}: only fp16 scales the loss, this run has precision={precision}; "
            "set it to null"
        )
    if engine.name == "deepspeed":
        _check_deepspeed(engine, layout, precision)
    else:
        _check_megatron(engine, layout)


def check_optimizer(engine: EngineConfig, layout: LayoutConfig, optimizer: str, field: str = "optim.name") -> None:
    """Raise ConfigError unless the engine can run `optimizer` in this layout. `field` is what chose it."""
    if engine.name == "megatron" and layout.zero and optimizer != "adamw":
        raise ConfigError(f"{field}={optimizer}: megatron shards AdamW only; set layout.zero=0")


def _check_megatron(engine: EngineConfig, layout: LayoutConfig) -> None:
    if layout.zero > 1:
        raise ConfigError(
            f"layout.zero={layout.zero}: the megatron engine knows 0 and 1; set one of them, or engine.name=deepspeed"
        )
    if layout.dualpipev:
        raise ConfigError(
            "layout.pipeline_schedule=dualpipev: is DeepSpeed's; set auto (layout.vpp above 1 interleaves), or "
            "engine.name=deepspeed"
        )
    if engine.deepspeed:
        raise ConfigError("engine.deepspeed: is read by engine.name=deepspeed alone; set that, or remove it")
    if engine.overlap_param_gather and not layout.zero:
        raise ConfigError("engine.overlap_param_gather=true: gathers what layout.zero=1 shards; set that, or false")


def _check_deepspeed(engine: EngineConfig, layout: LayoutConfig, precision: str) -> None:
    if layout.pp > 1:
        _check_deepspeed_pipeline(engine, layout)
    if precision == "fp8":
        raise ConfigError("precision=fp8: is of the megatron engine; set precision=bf16, or engine.name=megatron")
    if precision in HALF and not layout.zero:
        raise ConfigError(
            f"layout.zero=0: with precision={precision} DeepSpeed takes a step of its own when it starts, which decays "
            "the weights; set layout.zero to 1, 2 or 3, or engine.name=megatron"
        )
    if engine.recompute.head_positions is not None and layout.zero == 3:
        raise ConfigError(
            f"engine.recompute.head_positions={engine.recompute.head_positions}: ZeRO 3 gathers its weights while "
            "the model runs alone; set it to null, or layout.zero below 3"
        )
    if engine.overlap_param_gather:
        raise ConfigError(
            "engine.overlap_param_gather=true: is of the megatron engine; set false (layout.zero=3 prefetches "
            "weights), or engine.name=megatron"
        )
    if engine.overlap_grad_reduce and not layout.zero:
        raise ConfigError(
            "engine.overlap_grad_reduce=true: without ZeRO DeepSpeed sums gradients after the backward pass; set it to "
            "false, or layout.zero above 0"
        )
    if precision == "fp16" and engine.loss_scale is None and not math.log2(engine.initial_loss_scale).is_integer():
        raise ConfigError(
            f"engine.initial_loss_scale={engine.initial_loss_scale}: the deepspeed engine takes powers of 2; set "
            f"{2.0 ** round(math.log2(engine.initial_loss_scale)):g}"
        )
    check_settings(engine, layout, precision)
    settings = deepspeed_settings(engine, layout, precision, clip=0.0)
    if engine.overlap_grad_reduce and takes_bf16_optimizer(settings):
        raise ConfigError(
            "engine.overlap_grad_reduce=true: with precision=bf16 and layout.zero=1 DeepSpeed sums gradients after the "
            "backward pass; set layout.zero=2, or false"
        )


def _check_deepspeed_pipeline(engine: EngineConfig, layout: LayoutConfig) -> None:
    if layout.zero > 1:
        raise ConfigError(
            f"layout.zero={layout.zero}: with pipeline stages (layout.pp={layout.pp}) DeepSpeed shards neither "
            "gradients nor weights; set layout.zero to 0 or 1, or layout.pp=1"
        )
    if layout.vpp > 1:
        raise ConfigError(
            f"layout.vpp={layout.vpp}: DeepSpeed has no interleaved schedule; set layout.vpp=1 (perhaps with "
            "layout.pipeline_schedule=dualpipev), or engine.name=megatron"
        )
    if layout.batch_p2p is not None:
        raise ConfigError(
            f"layout.batch_p2p={str(layout.batch_p2p).lower()}: says how the megatron engine sends; set it to null, or "
            "engine.name=megatron"
        )
    if engine.overlap_grad_reduce:
        raise ConfigError(
            f"engine.overlap_grad_reduce=true: with pipeline stages (layout.pp={layout.pp}) DeepSpeed sums gradients "
            "after the schedule; set it to false, or engine.name=megatron"
        )
