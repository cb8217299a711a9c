"""Reads settings from outside: `--set`, and the JSON of manifests, checkpoints and caches."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from comask.config import Config, require
from comask.errors import ConfigError, one_line
from comask.files import parse_json

T = TypeVar("T")
LARGEST = 2**63 - 1


def from_dict(kind: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Makes a dataclass from nested plain values, such as those of `dataclasses.asdict` or JSON.

    Raises:
        ConfigError: for an unknown name (the nearest one is suggested), a missing name, or a value that
            does not fit.
    """
    hints = get_type_hints(kind)
    require(isinstance(values, Mapping), prefix.rstrip(".") or "all", "an object", values)
    for name in values:
        if name not in hints:
            raise ConfigError(_unknown(prefix + name, [prefix + known for known in hints]))
    for entry in dataclasses.fields(kind):  # type: ignore[arg-type]
        default = entry.default, entry.default_factory
        if default == (dataclasses.MISSING, dataclasses.MISSING) and entry.name not in values:
            raise ConfigError(f"{prefix}{entry.name}: is missing")
    return kind(
        **{name: _converted(prefix + name, value, hints[name]) for name, value in values.items()}
    )


def override(config: Config, assignments: tuple[str, ...]) -> Config:
    """Returns `config` with `key=value` assignments applied; the keys are dotted names.

    Raises:
        ConfigError: for a malformed assignment, an unknown key or a value that does not fit.
    """
    values = dataclasses.asdict(config)
    known = _known(values)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(
                f"--set {assignment}: expected key=value, as in model.msfem_branches=2"
            )
        if key not in known:
            raise ConfigError(_unknown(key, known))
        part, name = key.split(".")
        try:
            values[part][name] = parse_json(text)
        except ValueError:
            values[part][name] = {"True": True, "False": False}.get(text, text)
    return from_dict(Config, _with_auto(values))


def read_config(file: Path, base: Config) -> Config:
    """Returns `base` with the settings of a file: a run's `config.json`, or YAML of the same form.

    Raises:
        ConfigError: when the file cannot be read, for an unknown setting or a value that does not fit.
    """
    import yaml  # reads JSON as well

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file}: cannot be read: {one_line(error)}") from error
    values = dataclasses.asdict(base)
    known = _known(values)
    if not isinstance(content, dict) or not all(isinstance(p, dict) for p in content.values()):
        raise ConfigError(
            f"--config {file}: expected the parts {', '.join(values)}, each with settings, as 'comask "
            f"train --print-config' shows them"
        )
    for part, settings in content.items():
        for name, value in settings.items():
            if f"{part}.{name}" not in known:
                raise ConfigError(f"--config {file}: {_unknown(f'{part}.{name}', known)}")
            if isinstance(value, str) and isinstance(values[part][name], float):
                with suppress(ValueError):
                    value = float(value)  # YAML 1.1 has no number 1e-4, which it reads as text
            values[part][name] = value
    try:
        return from_dict(Config, _with_auto(values))
    except ConfigError as error:
        raise ConfigError(f"--config {file}: {error}") from error


def _known(values: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [f"{part}.{name}" for part, names in values.items() for name in names]


def _with_auto(values: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the values with the number for `train.batch_size=auto`."""
    if values["train"]["batch_size"] == "auto":
        values["train"]["batch_size"] = 0
    return values


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown setting {name}" + (f": did you mean {near[0]}?" if near else "")


def _converted(name: str, value: Any, hint: Any) -> Any:
    """Converts `value` to the annotated type or raises ConfigError; JSON has no tuples and no 1.0."""
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, f"{name}.")  # type: ignore[arg-type]
    origin = get_origin(hint)
    if origin is UnionType and hint == (int | str):  # an id, which may be an integer of any size
        require(type(value) in (int, str), name, "an integer or a string", value)
        return value
    if origin is UnionType:  # a type or None
        return None if value is None else _converted(name, value, get_args(hint)[0])
    if origin is dict:
        require(isinstance(value, dict), name, "an object", value)
        return {key: _converted(f"{name}.{key}", v, get_args(hint)[1]) for key, v in value.items()}
    if origin is list:
        require(isinstance(value, list), name, "a list", value)
        return [_converted(f"{name}[{i}]", v, get_args(hint)[0]) for i, v in enumerate(value)]
    if origin is Literal:
        known = ", ".join(map(str, get_args(hint)))
        require(
            value in get_args(hint) and not isinstance(value, bool), name, f"one of {known}", value
        )
        return value
    if origin is tuple:
        require(isinstance(value, list | tuple), name, "a list such as [1, 2]", value)
        item, *rest = get_args(hint)
        if rest != [...]:
            require(len(value) == 1 + len(rest), name, f"{1 + len(rest)} numbers", value)
        return tuple(_converted(f"{name}[{i}]", entry, item) for i, entry in enumerate(value))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and hint in (int, float):
        # Integers of any size can be compared, but not converted to float; NaN fails the comparison.
        require(-LARGEST <= value <= LARGEST, name, "a finite number of 64 bits", value)
    if hint is float and number:
        return float(value)
    exact = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    require(exact, name, f"a value of type {hint.__name__}", value)
    return value
