"""Settings of a run that `eval` and `stream` start from, with what the command line gives in their place."""

from collections.abc import Collection
from dataclasses import fields, replace
from typing import Any

from moss_train.cli_options import with_overrides
from moss_train.evaluate.config import DecodeConfig, EvaluationConfig

_THRESHOLD_OF = {"tokens": "speak_threshold", "head": "head_threshold"}  #: `decide_by` → the threshold that it reads


def check_decode(given: dict[str, Any]) -> None:
    """Raise ConfigError for what is wrong with `decode.*` whatever the run's settings are."""
    assumed = DecodeConfig(decide_by="head" if given.get("head_threshold") is not None else "tokens")
    with_overrides(assumed, given, "decode").validate()


def decode_settings(trained: DecodeConfig, given: dict[str, Any]) -> DecodeConfig:
    """How replies are read: as in the run, but for what is given. Where `decide_by` is given anew, the run's threshold
    of the other way is left out: it is not read any more."""
    decode = with_overrides(trained, given, "decode")
    if decode.decide_by != trained.decide_by:
        unread = _THRESHOLD_OF[trained.decide_by]
        if unread not in given:
            decode = replace(decode, **{unread: None})
    decode.validate()
    return decode


def evaluation_settings(trained: EvaluationConfig, given: dict[str, Any]) -> EvaluationConfig:
    """Batch and tolerances: as in the run, but for what is given. A limit that kept evaluation in training short is not
    taken over."""
    settings = with_overrides(replace(trained, limit=None), given, "settings")
    settings.validate()
    return settings


def told(name: str, settings: DecodeConfig | EvaluationConfig, given: Collection[str]) -> str:
    """The settings that apply, in one line; those that were given are marked."""
    values = [f"{field.name}={_shown(getattr(settings, field.name))}" for field in fields(settings)]
    marked = [f"{name}.{key}" for key in given]
    return f"{name}: {' '.join(values)} ({'given: ' + ', '.join(marked) if marked else 'as in the run'})"


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
