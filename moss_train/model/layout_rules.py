"""Which layouts a model of given sizes can be trained in; said before anything is started."""

from moss_train.errors import ConfigError
from moss_train.model.config import ModelConfig
from moss_train.parallel.config import LayoutConfig


def check_layout(config: ModelConfig, layout: LayoutConfig, world_size: int) -> None:
    """Raise ConfigError, naming field, value and a legal value, unless the model fits the layout."""
    layout.validate(world_size)
    text = config.text
    for name, size in (
        ("attention_heads", text.attention_heads),
        ("key_value_heads", text.key_value_heads),
        ("mlp_size", text.mlp_size),
        ("vocabulary_size", text.vocabulary_size),
    ):
        if size is not None and size % layout.tp:
            raise ConfigError(
                f"layout.tp={layout.tp}: does not divide model.text.{name}={size}; "
                f"legal values are {_list(_common_divisors(config))}"
            )
    if layout.pipeline_split is not None:
        if sum(layout.pipeline_split) != text.layers:
            raise ConfigError(
                f"layout.pipeline_split={list(layout.pipeline_split)}: adds up to {sum(layout.pipeline_split)}, but "
                f"model.text.layers={text.layers}"
            )
    elif layout.chunks > text.layers:
        legal = max(1, text.layers // layout.stage_chunks)
        fewer = "set layout.pipeline_schedule=auto" if layout.dualpipev else "lower layout.vpp"
        raise ConfigError(
            f"layout.pp={layout.pp} × {layout.stage_chunks} a process makes {layout.chunks} chunks of "
            f"model.text.layers={text.layers}: every chunk needs a layer; set layout.pp to {legal} or less, "
            f"{fewer}, or give layout.pipeline_split"
        )
    if layout.cp > 1 and config.attention == "dense":
        raise ConfigError("model.attention=dense: knows no layout.cp above 1; set model.attention=segments")


def _common_divisors(config: ModelConfig) -> list[int]:
    text = config.text
    sizes = [text.attention_heads, text.key_value_heads, text.mlp_size, text.vocabulary_size or 0]
    return [tp for tp in range(1, text.key_value_heads + 1) if all(size % tp == 0 for size in sizes)]


def _list(values: list[int]) -> str:
    return ", ".join(map(str, values))
