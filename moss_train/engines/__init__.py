"""Engines: everything between a microbatch and a changed weight. `build_engine` is the only way in."""

from moss_train.engines.config import EngineConfig
from moss_train.engines.protocol import Engine


def build_engine(config: EngineConfig) -> Engine:
    """The engine that `config` names, not yet set up. Process groups must be initialised before its `setup`."""
    config.validate()
    # Imported here so that reading a configuration does not load megatron-core, and DeepSpeed only where it is used.
    if config.name == "deepspeed":
        from moss_train.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config)
    from moss_train.engines.megatron import MegatronEngine

    return MegatronEngine(config)
