"""Options of a verb: a dataclass filled from `key=value` arguments, checked by type and by name.

A field without default must be given. Values of text fields are taken as they stand, all others are read as YAML
(`null`, `true`, `1e-4`, `[a, b]`), so that `question=Why: now?` needs no quoting.
"""

import ast
import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moss_train.errors import ConfigError

Options = TypeVar("Options")
Settings = TypeVar("Settings")

_OVERRIDES = "overrides"  #: in a field's metadata: the dataclass some of whose fields it overrides


def parse_options(options_class: type[Options], arguments: Sequence[str]) -> Options:
    """An instance of the dataclass `options_class` with `key=value` arguments applied (dots reach nested fields).

    Calls `validate()` on the result when the class has one without further parameters.
    Raises ConfigError for a malformed argument, an unknown or doubled key, a value of the wrong type and a
    missing required field.
    """
    config = OmegaConf.structured(options_class)
    seen: set[str] = set()
    for argument in arguments:
        key, text = split_argument(argument)
        check_path(options_class, key)
        if key in seen:
            raise ConfigError(f"{key}= is given twice")
        seen.add(key)
        try:
            nested = _value(type_at(options_class, key), text)
            for part in reversed(key.split(".")):
                nested = {part: nested}
            config = OmegaConf.merge(config, nested)  # unlike update, merge can create a typed entry of a dict field
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"{key}={text}: {first_line(error)}") from error
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        documentation = field_documentation(options_class)
        lines = [f"{key}=…  ({documentation[key]})" if documentation.get(key) else f"{key}=…" for key in missing]
        raise ConfigError("missing " + ", ".join(lines))
    try:
        options = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from error
    validate = getattr(options, "validate", None)
    if validate is not None and not inspect.signature(validate).parameters:
        validate()
    return options  # type: ignore[return-value]


def overrides_of(settings_class: type) -> Any:
    """A field, to be annotated `dict[str, Any]`, that holds the fields of `settings_class` which were given. The verb
    learns the settings that they override later, and applies them by `with_overrides`. Names are checked and described
    like those of a nested dataclass."""
    return dataclasses.field(default_factory=dict, metadata={_OVERRIDES: settings_class})


def with_overrides(settings: Settings, given: dict[str, Any], name: str) -> Settings:
    """A copy of the dataclass `settings` with the fields `given`; `name` is what they are called below.

    Raises ConfigError for an unknown field and a value of the wrong type; `validate` is the caller's to call.
    """
    legal = [f"{name}.{field.name}" for field in fields(settings)]  # type: ignore[arg-type]
    config = OmegaConf.structured(settings)
    for key, value in given.items():
        path = f"{name}.{key}"
        if path not in legal:
            raise ConfigError(unknown_name(path, path, legal))
        try:
            config[key] = value
        except OmegaConfBaseException as error:
            raise ConfigError(f"{path}={value}: {first_line(error)}") from error
    return OmegaConf.to_object(config)  # type: ignore[return-value]


def split_argument(argument: str) -> tuple[str, str]:
    """`key=value` as its two parts; ConfigError when it is not of this form."""
    key, separator, text = argument.partition("=")
    if not separator or not key:
        raise ConfigError(f"{argument!r} is not of the form key=value")
    return key.removeprefix("--"), text


def check_path(root: type, path: str) -> None:
    """Raise ConfigError, naming the closest legal names, unless the dotted `path` exists below dataclass `root`.

    Keys of dict fields are free, whatever stands below them is checked again.
    """
    node: Any = root
    walked: list[str] = []
    for part in path.split("."):
        node = _strip_optional(node)
        if is_dataclass(node):
            names = [field.name for field in fields(node)]
            if part not in names:
                raise ConfigError(unknown_name(path, ".".join([*walked, part]), _legal(names, walked), root))
            node = _types(node)[part]
        elif get_origin(node) is dict:
            node = get_args(node)[1]
        elif node is Any or node is dict:
            return
        else:
            raise ConfigError(f"{path}: {'.'.join(walked)} is a single value and has no field {part!r}")
        walked.append(part)


def unknown_name(given: str, wrong: str, legal: Iterable[str], root: type | None = None, what: str = "key") -> str:
    """The text of the error for the `what` called `wrong` (part of `given`), with the closest `legal` names."""
    legal = list(legal)
    close = difflib.get_close_matches(wrong, legal, n=3, cutoff=0.6)
    if not close and root is not None:
        # The field may exist elsewhere in the tree: `lr=` for `optim.lr=`.
        last = given.rsplit(".", 1)[-1]
        close = [path for path in all_paths(root) if path.rsplit(".", 1)[-1] == last][:3]
    if close:
        return f"unknown {what} {wrong!r}; did you mean {' or '.join(close)}?"
    return f"unknown {what} {wrong!r}; legal here: {', '.join(legal) or 'none'}"


def all_paths(root: type, prefix: str = "") -> list[str]:
    """The dotted paths of every field below `root`; the free keys of dict fields stand as `*`."""
    paths: list[str] = []
    hints = _types(root)
    for field in fields(root):  # type: ignore[arg-type]
        path, node = prefix + field.name, _strip_optional(hints[field.name])
        if get_origin(node) is dict and is_dataclass(_strip_optional(get_args(node)[1])):
            path, node = path + ".*", _strip_optional(get_args(node)[1])
        if is_dataclass(node):
            paths += all_paths(node, path + ".")  # type: ignore[arg-type]
        else:
            paths.append(path)
    return paths


def type_at(root: type, path: str) -> Any:
    """The declared type of the field at the dotted `path`; Any below untyped nodes."""
    node: Any = root
    for part in path.split("."):
        node = _strip_optional(node)
        if is_dataclass(node):
            node = _types(node)[part]
        elif get_origin(node) is dict:
            node = get_args(node)[1]
        else:
            return Any
    return node


def describe_options(options_class: type) -> str:
    """The options of a verb, one a line: `name=default  documentation`."""
    width = 34
    lines: list[str] = []
    for name, default, documentation in _option_rows(options_class):
        left = f"  {name}={default}"
        body = textwrap.wrap(documentation, 116 - width) or [""]
        if len(left) >= width:
            lines.append(left)
            left = ""
        lines.append(f"{left:<{width}} {body[0]}".rstrip())
        lines += [f"{'':<{width}} {line}" for line in body[1:]]
    return "\n".join(lines)


def _option_rows(options_class: type, prefix: str = "") -> list[tuple[str, str, str]]:
    documentation = field_documentation(options_class)
    hints = _types(options_class)
    rows: list[tuple[str, str, str]] = []
    for field in fields(options_class):  # type: ignore[arg-type]
        node = _strip_optional(hints[field.name])
        text = documentation.get(field.name, "")
        if _OVERRIDES in field.metadata:
            rows += [(path, "(the run's)", about) for path, _, about in _option_rows(node, f"{prefix}{field.name}.")]
        elif is_dataclass(node):
            rows += _option_rows(node, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        elif field.default is not MISSING:
            rows.append((prefix + field.name, _shown(field.default), text))
        elif field.default_factory is not MISSING:
            rows.append((prefix + field.name, _shown(field.default_factory()), text))
        else:
            rows.append((prefix + field.name, "…", f"Required. {text}".strip()))
    return rows


def field_documentation(options_class: type) -> dict[str, str]:
    """The string literal that stands under each field of a dataclass, base classes included."""
    found: dict[str, str] = {}
    for cls in reversed(options_class.__mro__):
        if not is_dataclass(cls):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except OSError:  # no source at hand (interactive definition): options are listed without documentation
            continue
        body = tree.body[0].body  # type: ignore[attr-defined]
        for field, following in zip(body, body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                found[field.target.id] = " ".join(following.value.value.split())
    return found


def first_line(error: BaseException) -> str:
    """The first line of an error's message; OmegaConf and Hydra add context lines nobody needs."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _types(node: type) -> dict[str, Any]:
    """The type of each field of a dataclass; of one of `overrides_of` the dataclass that it overrides."""
    overriding = {field.name: field.metadata[_OVERRIDES] for field in fields(node) if _OVERRIDES in field.metadata}
    return get_type_hints(node) | overriding


def _legal(names: list[str], walked: list[str]) -> list[str]:
    return [".".join([*walked, name]) for name in names]


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _strip_optional(node: Any) -> Any:
    if get_origin(node) in (Union, UnionType):
        rest = [argument for argument in get_args(node) if argument is not NoneType]
        return rest[0] if len(rest) == 1 else node
    return node


def _value(node: Any, text: str) -> Any:
    optional = node is not _strip_optional(node)
    if _strip_optional(node) in (str, Path):
        return None if optional and text == "null" else text
    return parse_yaml_value(text)


def parse_yaml_value(text: str) -> Any:
    """A value as OmegaConf reads it in YAML: `1e-4` is a number."""
    return OmegaConf.to_container(OmegaConf.create(f"value: {text}" if text else "value: ''"))["value"]  # type: ignore[index, call-overload]
