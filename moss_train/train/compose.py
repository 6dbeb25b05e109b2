"""Hydra's compose API around `RunConfig`: recipes and overrides in, one validated configuration out.

Every rank composes the configuration itself; nothing is written and no working directory is changed.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moss_train.checkpoint.files import replace_durably
from moss_train.cli_options import check_path, first_line, split_argument, type_at, unknown_name
from moss_train.errors import ConfigError
from moss_train.locations import shipped_directory
from moss_train.redact import redact
from moss_train.train.config import RunConfig

CONFIG_FILE = "config.yaml"  #: of a run's folder

#: Groups of recipe files that an override may choose from; `recipe=…` is one of them.
GROUPS = ("recipe", "model", "layout", "engine", "tracking", "data")
#: Those of which each stage has a choice of its own: `stages.<name>.objective=moss_vl`.
STAGE_GROUPS = ("objective",)


def compose_run(arguments: Sequence[str]) -> RunConfig:
    """The run that `key=value` overrides describe, validated.

    `recipe=`, `model=`, `layout=`, `engine=`, `tracking=` and `data=` choose files below `recipes/`, as does a name
    given to `stages.<stage>.objective=`; every other key is a field of `RunConfig`. `stages.*.…` sets a field of every
    stage, `~key` takes out a stage or a source of the recipe, and `recipes=DIR` adds a folder of one's own recipe
    files. Raises ConfigError for everything that is wrong with them.
    """
    overrides: list[tuple[str, str | None]] = []
    folders: list[str] = []
    for argument in arguments:
        if argument.startswith("~"):
            overrides.append((argument[1:], None))
            continue
        key, text = split_argument(argument)
        if key == "recipes":
            if not Path(text).is_dir():
                raise ConfigError(f"recipes={text}: no such folder")
            folders.append(str(Path(text).resolve()))
        else:
            overrides.append((key, text))
    for key, text in overrides:
        group = _group(key, text)
        if group is None:
            check_path(RunConfig, key)
        elif text is None or text not in available(group, folders):
            raise ConfigError(unknown_name(str(text), str(text), available(group, folders), what=group))
    if "recipe" not in dict(overrides):
        raise ConfigError(f"choose a recipe: recipe={' or recipe='.join(available('recipe', folders))}")
    # Which stages there are is known when all else is composed.
    known = [(key, text) for key, text in overrides if not _waits(key, text)]
    config = _compose(known, folders)
    if any(key == "data" for key, _ in overrides):
        plain = _compose([item for item in known if item[0] != "data"], folders)
        for stage in set(config.stages) - set(plain.stages):
            raise ConfigError(f"data={dict(overrides)['data']}: this recipe has no stage {stage!r} that could read it")
    if any(_waits(key, text) for key, text in overrides):
        stages = list(config.stages)
        expanded = [
            (key.replace("*", stage, 1), text) for key, text in overrides for stage in (stages if _wild(key) else [""])
        ]
        for key, text in expanded:
            # To choose a file for a stage that is not there would make one.
            if _waits(key, text) and (stage := key.split(".")[1]) not in stages:
                raise ConfigError(f"{key}={text}: this recipe has no stage {stage!r}")
        config = _compose(expanded, folders)
    try:
        run: RunConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from error
    if run.precision == "auto":
        run.precision = _fastest_precision()
    run.validate()
    return run


def _fastest_precision() -> str:
    """What `precision=auto` stands for on this machine."""
    import torch  # help must not wait for it

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"


def run_from_dict(resolved: dict[str, Any]) -> RunConfig:
    """The run whose resolved form was saved beside a checkpoint."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), resolved)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(f"saved configuration: {first_line(error)}") from error


def save_run(run: RunConfig, folder: Path) -> None:
    """Write the resolved run, secrets hidden, as the folder's `config.yaml`, whole or not at all."""
    text = yaml.safe_dump(redact(resolved_dict(run)), sort_keys=False, allow_unicode=True)
    replace_durably(folder / CONFIG_FILE, text.encode())


def load_run(folder: Path) -> RunConfig:
    """The run that trained in `folder`; ConfigError when it holds no readable `config.yaml`."""
    path = folder / CONFIG_FILE
    try:
        return run_from_dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not the configuration of a run ({first_line(error)})") from error


def resolved_dict(run: RunConfig) -> dict[str, Any]:
    """The plain form of a run, for saving and for comparing."""
    return OmegaConf.to_container(OmegaConf.structured(run), resolve=True)  # type: ignore[return-value]


def _wild(key: str) -> bool:
    return key.startswith("stages.*.")


def _waits(key: str, text: str | None) -> bool:
    """Whether an override is applied once the stages are known."""
    return _wild(key) or _group(key, text) in STAGE_GROUPS


def _group(key: str, text: str | None) -> str | None:
    """The group of recipe files that an override chooses from; None when it sets a field."""
    if key in GROUPS:
        return key
    parts = key.split(".")
    is_choice = len(parts) == 3 and parts[0] == "stages" and parts[2] in STAGE_GROUPS
    return parts[2] if is_choice and text is not None and re.fullmatch(r"\w+", text) and text != "null" else None


def _compose(overrides: list[tuple[str, str | None]], folders: list[str]) -> DictConfig:
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    late = [(part, key, text) for key, text in overrides if text is not None and (part := _optional_part(key))]
    lines = [_line(key, text) for key, text in overrides if text is None or _optional_part(key) is None]
    if folders:
        lines.append(f"hydra.searchpath=[{','.join('file://' + folder for folder in folders)}]")
    # A plugin for object stores, where it is installed, logs a traceback for every folder that is no store.
    logging.getLogger("multistorageclient.contrib.hydra").setLevel(logging.CRITICAL)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(shipped_directory("recipes")), version_base="1.3"):
            config = compose("config", overrides=lines)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error
    for part, key, text in late:
        _set_part(config, part, key, text)
    return config


def _optional_part(key: str) -> str | None:
    """The part of the configuration at or above `key` that may be null, as `model.text.rope_scaling`; or None. Hydra
    cannot set a field of one that is."""
    names = key.split(".")
    paths = [] if key in GROUPS else [".".join(names[:count]) for count in range(1, len(names) + 1)]
    return next((path for path in paths if _dataclass_or_null(type_at(RunConfig, path)) is not None), None)


def _dataclass_or_null(kind: Any) -> type | None:
    kinds = get_args(kind)
    return next((one for one in kinds if is_dataclass(one)), None) if type(None) in kinds else None


def _set_part(config: DictConfig, part: str, key: str, text: str) -> None:
    """Apply an override of `part`, or of a field of it."""
    try:
        given = yaml.safe_load(text)
        for name in reversed(key.removeprefix(part).split(".")[1:]):
            given = {name: given}
        before = OmegaConf.select(config, part)
        if given is not None and not isinstance(given, dict):
            raise ConfigError(f"{key}={text}: must be null or a table such as {{name: value, …}}")
        start = before if before is not None else OmegaConf.structured(_dataclass_or_null(type_at(RunConfig, part)))
        parent, _, name = part.rpartition(".")
        OmegaConf.select(config, parent)[name] = None if given is None else OmegaConf.merge(start, given)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{key}={text}: {first_line(error)}") from error


def _line(key: str, text: str | None) -> str:
    """The override in Hydra's grammar. Keys that a dict field may gain (a source, a weight by kind) are merged in from
    the dict's own level, because OmegaConf cannot create a typed entry from below; stages must exist."""
    if text is None:
        return f"~{key}"
    group = _group(key, text)
    if group is not None:
        return f"{key}={text}" if key == group else f"+{group}@{key}={text}"
    value = _quoted(key, text)
    parts = key.split(".")
    for count in range(2 if parts[0] == "stages" else 1, len(parts)):
        parent = ".".join(parts[:count])
        if get_origin(type_at(RunConfig, parent)) is dict:
            below = parts[count:]
            return f"++{parent}=" + "".join(f"{{{part}:" for part in below) + value + "}" * len(below)
    if get_origin(type_at(RunConfig, key)) is dict and key.count(".") > (1 if parts[0] == "stages" else 0):
        return f"++{key}={value}"
    return f"{key}={value}"


def _quoted(key: str, text: str) -> str:
    """Text for text fields stands in quotes, so that `=`, spaces and commas mean themselves in Hydra's grammar."""
    if key in GROUPS or type_at(RunConfig, key) not in (str, str | None) or text[:1] in ("'", '"'):
        return text
    if text in ("null", "???"):
        return text
    escaped = text.replace("\\'", "\\\\'").replace("'", "\\'")
    return f"'{escaped}'"


def _explain(error: Exception) -> str:
    """Hydra's message as one line: which override, and why."""
    text = str(error).strip()
    found = re.search(r"Could not override 'stages\.(\w+)", text)
    if found:
        return f"this recipe has no stage {found[1]!r}"
    missing = re.search(r"\+\+stages\.(\w+).*not a subclass of StageConfig", f"{text} {error.__cause__}", re.DOTALL)
    if missing:
        return f"this recipe has no stage {missing[1]!r}"
    cause = error.__cause__
    lines = [first_line(error).removeprefix("Error merging override ")]
    if isinstance(error, OverrideParseException):
        lines.insert(0, error.override)
    if isinstance(cause, OmegaConfBaseException):
        lines.append(first_line(cause))
    return ": ".join(lines)


def available(group: str, folders: Sequence[str] = ()) -> list[str]:
    """The names that `group=` may choose from, shipped ones and those below `folders`."""
    roots = [shipped_directory("recipes"), *map(Path, folders)]
    return sorted({path.stem for root in roots for path in (root / group).glob("*.yaml")})
