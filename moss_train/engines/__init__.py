"""Engines: everything between a microbatch and a changed weight. `build_engine` is the only way in."""

from moss_train.engines.config import EngineConfig
from moss_train.engines.protocol import Engine
from moss_train.parallel.config import LayoutConfig


def build_engine(config: EngineConfig) -> Engine:
    """The engine that `config` names, not yet set up. Process groups must be initialised before its `setup`."""
    config.validate()
    # Imported here so that reading a configuration does not load megatron-core, and DeepSpeed only where it is used.
    if config.name == "deepspeed":
        from moss_train.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config)
    from moss_train.engines.megatron import MegatronEngine

    return MegatronEngine(config)


def require_engine(config: EngineConfig, layout: LayoutConfig, precision: str) -> None:
    """Raise ConfigError unless this machine has what the engine needs, and its library takes the configuration.

    For what `engine_rules.check_engine` has passed. Before any work: it makes nothing, and needs no process groups.
    """
    if config.name == "deepspeed":
        from moss_train.engines.deepspeed_library import require_deepspeed
        from moss_train.engines.deepspeed_settings import deepspeed_settings

        require_deepspeed(deepspeed_settings(config, layout, precision, clip=0.0))
