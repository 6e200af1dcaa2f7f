"""Settings: a preset, then a YAML file, then `--set a.b=c`, checked into a frozen dataclass; and back to YAML."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import os
import textwrap
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

STRICT = ConfigDict(extra="forbid")  # set as __pydantic_config__ on every settings dataclass

T = TypeVar("T")


class UsageError(ValueError):
    """What the user gave is wrong; the words say what to give."""


class NothingThere(UsageError, FileNotFoundError):
    """What the user named is not there."""


class _Loader(yaml.SafeLoader):
    """Plain YAML without aliases: a few lines of them can stand for more values than there is memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*{self.peek_event().anchor}) are refused: write the value out")
        return super().compose_node(parent, index)


def load(preset: T, file: str | Path | None = None, overrides: Iterable[str] = ()) -> T:
    """Return `preset` with the YAML (or JSON) `file` and then the `a.b=c` overrides laid over it.

    Values are YAML (`--set split.holdout='[a.mp4]'`). Raises UsageError naming the key and the nearest known one when a
    key is unknown or a value has the wrong type; NothingThere when `file` is absent.
    """
    values: dict[str, Any] = dataclasses.asdict(preset)  # type: ignore[call-overload]
    cls = type(preset)
    if file is not None:
        layer = parse_yaml(_text(file), f"Config file {file}")
        if not isinstance(layer, Mapping):
            raise UsageError(f"Config file {file} must hold a mapping of settings, found {type(layer).__name__}.")
        _merge(values, layer, cls, "")
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign or not key:
            raise UsageError(f"--set takes key=value, such as selection.min_sharpness=80; got {item!r}.")
        layer = parse_yaml(text, f"--set {item}")
        for part in reversed(key.split(".")):
            layer = {part: layer}
        _merge(values, layer, cls, "")
    return from_dict(cls, values)


def layered(preset: T, layer: Mapping[Any, Any]) -> T:
    """Return `preset` with `layer` laid over it. UsageError as of `load`."""
    values: dict[str, Any] = dataclasses.asdict(preset)  # type: ignore[call-overload]
    _merge(values, layer, type(preset), "")
    return from_dict(type(preset), values)


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Return the settings `cls` with these `values`, nested as in `dataclasses.asdict`. UsageError names a bad one."""
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or cls.__name__
        if first["type"] == "value_error":  # of a settings class as a whole: its words name setting and value
            words = first["msg"].removeprefix("Value error, ")
            raise UsageError(words if words.startswith(where) else f"Setting {where}: {words}") from None
        raise UsageError(f"Setting {where}: {first['msg']} (got {first['input']!r}).") from None


def template(settings: Any) -> str:
    """Return a settings dataclass as YAML that `load` reads, with the comments that stand above its fields."""
    above = _comments(type(settings))
    lines: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        lines += above[field.name]
        if dataclasses.is_dataclass(value):
            lines += [f"{field.name}:", textwrap.indent(template(value), "  ").rstrip("\n")]
        else:
            lines.append(f"{field.name}: {_on_one_line(value)}")
    return "\n".join(lines) + "\n"


def changes(settings: Any, base: Any) -> list[str]:
    """Return where `settings` differ from `base`, of the same class, as `a.b=c` that `--set` takes."""
    found: list[str] = []
    for field in dataclasses.fields(settings):
        value, other = getattr(settings, field.name), getattr(base, field.name)
        if dataclasses.is_dataclass(value):
            found += [f"{field.name}.{change}" for change in changes(value, other)]
        elif value != other:
            found.append(f"{field.name}={_on_one_line(value)}")
    return found


def _on_one_line(value: Any) -> str:
    return yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**6).strip()[1:-1]


def _comments(cls: type) -> dict[str, list[str]]:
    """Return by field the comment lines directly above it in the source of the dataclass `cls`."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = [line.strip() for line in source.splitlines()]
    (node,) = ast.parse(source).body
    found: dict[str, list[str]] = {}
    for item in getattr(node, "body", []):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            first = end = item.lineno - 1
            while lines[first - 1].startswith("#"):
                first -= 1
            found[item.target.id] = lines[first:end]
    return found


def _text(file: str | Path) -> str:
    try:
        return Path(file).read_text()
    except FileNotFoundError:
        raise NothingThere(f"No config file {file}. Print one to start from: python -m factory config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Config file {file} cannot be read as text: {error}") from None


def parse_yaml(text: str, where: str) -> Any:
    """Return what YAML `text` holds. UsageError, beginning with `where`, when it is none."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{where} is not valid YAML: {error}") from None


def _merge(values: dict[str, Any], layer: Mapping[Any, Any], cls: type, prefix: str) -> None:
    """Lay `layer` over `values` in place, refusing keys that the dataclass `cls` does not have."""
    hints = typing.get_type_hints(cls)
    for key, value in layer.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = f" Did you mean {prefix}{near[0]}?" if near else f" Known here: {', '.join(sorted(hints))}."
            raise UsageError(f"Unknown setting {prefix}{key}.{hint}")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            _merge(values[key], value, hints[key], f"{prefix}{key}.")  # type: ignore[arg-type]
        else:
            values[key] = value


def absolute(path: str, option: str) -> str:
    """Return `path` as an absolute path; in a Ray job refuse a relative one, since jobs run in a throw-away folder."""
    if "://" in path or os.path.isabs(path):
        return path
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise UsageError(
            f"{option} {path!r} is relative, but a Ray job runs in a throw-away upload folder. Give the absolute path: "
            f'{option} "$PWD/{path}" in the shell that submits the job.'
        )
    return os.path.abspath(path)
