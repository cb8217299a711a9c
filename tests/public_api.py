"""The public interface as text: what `docs/compatibility.md` promises and `api/public_api.txt` freezes.

A name is public when a module of `MODULES` lists it in `__all__` (`comask.errors` and `comask.config`
have none: all their classes are). So are members without an underscore in front, unless their signature
names a type that is not public itself.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import click

MODULES = (
    "comask", "comask.bundle", "comask.config", "comask.draw", "comask.errors", "comask.exchange",
    "comask.label_studio", "comask.preprocess", "comask.runtime", "comask.runtime.trt.flavor",
    "comask.runtime.trt.plugins",
    "comask.runtime.video", "comask.training",
)  # fmt: skip


class Bare(str):
    """An annotation, which is a string everywhere, without its quotes."""

    def __repr__(self) -> str:
        return str(self)


def public_names(module: ModuleType) -> list[str]:
    """What `module` offers."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return sorted(
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__
    )


def public() -> dict[str, dict[str, Any]]:
    """By module, the public objects by name."""
    modules = {name: importlib.import_module(name) for name in MODULES}
    return {
        name: {item: getattr(module, item) for item in public_names(module)}
        for name, module in modules.items()
    }


def python_interface() -> str:
    """Every public name with what it is called with."""
    found = public()
    known = {name for names in found.values() for name in names}
    aliases: dict[str, str] = {}
    lines = []
    for module, names in found.items():
        lines.append(f"\n[{module}]")
        for name, value in names.items():
            if inspect.isclass(value):
                lines += _class(name, value, known, aliases)
            elif inspect.isfunction(inspect.unwrap(value)):
                lines.append(f"{name}{_signature(value, aliases)}")
            elif typing.get_origin(value) is typing.Literal:
                aliases[name] = " | ".join(map(repr, typing.get_args(value)))
            else:
                lines.append(f"{name}: {type(value).__name__}")
    lines.append("\n[values that a parameter takes]")
    lines += [f"{name} = {values}" for name, values in sorted(aliases.items())]
    return "\n".join(lines).strip() + "\n"


def _class(name: str, kind: type, known: set[str], aliases: dict[str, str]) -> Iterator[str]:
    bases = [b.__name__ for b in kind.__bases__ if b is not object]
    yield f"class {name}({', '.join(bases)})" if bases else f"class {name}"
    if issubclass(kind, BaseException):
        return
    private = _own_types(kind) - known
    for member in _members(kind, aliases):
        if not private & set(re.findall(r"\w+", member)):
            yield f"    {member}"


def _members(kind: type, aliases: dict[str, str]) -> Iterator[str]:
    if dataclasses.is_dataclass(kind):
        for field in dataclasses.fields(kind):
            yield f"{field.name}: {field.type}{_default(field)}"
    elif "__init__" in vars(kind) and not getattr(kind, "_is_protocol", False):
        yield f"__init__{_signature(kind.__init__, aliases)}"
        yield from _attributes(kind)
    for name, member in sorted(vars(kind).items()):
        if name.startswith("_") and name not in ("__call__", "__getitem__"):
            continue
        if isinstance(member, classmethod | staticmethod):
            word = type(member).__name__
            yield f"{name}{_signature(member.__func__, aliases)}  # {word}"
        elif (getter := getattr(member, "fget", None) or getattr(member, "func", None)) is not None:
            yield f"{name}: {_returned(getter)}"
        elif inspect.isfunction(member):
            for form in typing.get_overloads(member) or [member]:
                yield f"{name}{_signature(form, aliases)}"


def _attributes(kind: type) -> Iterator[str]:
    """What `__init__` sets for everybody to read."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind.__init__)))  # type: ignore[misc]
    names = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    yield from sorted(name for name in names if not name.startswith("_"))


def _own_types(kind: type) -> set[str]:
    """Classes of comask that the module of `kind` defines or imports, also for annotations alone."""
    module = importlib.import_module(kind.__module__)
    tree = ast.parse(inspect.getsource(module))
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("comask"):
            names |= {alias.asname or alias.name for alias in node.names}
    # of the rest of what can be imported, an alias of Literal or of an array hides nothing
    return {n for n in names if inspect.isclass(getattr(module, n, type)) and n[:1].isupper()}


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {field.default!r}"
    if field.default_factory is not dataclasses.MISSING:
        return f" = {field.default_factory.__name__}()"
    return ""


def _returned(function: Any) -> str:
    return str(inspect.signature(function).return_annotation)


def _signature(function: Any, aliases: dict[str, str]) -> str:
    """Parameters, annotations and defaults; values of `Literal` aliases go to `aliases`."""
    found = inspect.signature(function)
    namespace = inspect.unwrap(function).__globals__
    texts = [p.annotation for p in found.parameters.values()] + [found.return_annotation]
    for word in {w for text in texts for w in re.findall(r"\w+", str(text))}:
        if typing.get_origin(namespace.get(word)) is typing.Literal:
            aliases[word] = " | ".join(map(repr, typing.get_args(namespace[word])))
    parameters = [
        p if p.annotation is p.empty else p.replace(annotation=Bare(p.annotation))
        for p in found.parameters.values()
        if p.name not in ("self", "cls")
    ]
    returned = found.return_annotation
    if returned is not found.empty:
        returned = Bare(returned)
    return str(found.replace(parameters=parameters, return_annotation=returned))


def command_line(commands: Mapping[str, click.Command]) -> str:
    """Every command's arguments and options."""
    lines = []
    for name, command in sorted(commands.items()):
        lines.append(f"\n[comask {name}]")
        lines += [_parameter(parameter) for parameter in command.params]
    return "\n".join(lines).strip() + "\n"


def _parameter(parameter: click.Parameter) -> str:
    told = parameter.to_info_dict()
    kind = told["type"]
    text = kind["param_type"]
    if "choices" in kind:
        text = "|".join(map(str, kind["choices"]))
    elif "min" in kind:
        least, most = ("" if kind[end] is None else f"{kind[end]:g}" for end in ("min", "max"))
        text += f" {least}..{most}"
    if isinstance(parameter, click.Argument):
        name = parameter.metavar or str(parameter.name).upper()
        return f"{name if parameter.required else f'[{name}]'}: {text}"
    marks = [mark for mark in ("required", "multiple", "envvar") if told[mark]]
    default = parameter.default
    if not isinstance(default, str | int | float | tuple) or default is False or default == ():
        default = None  # click marks a missing default in ways that change with its version
    return " ".join(
        [
            *(*parameter.opts, *parameter.secondary_opts),
            "flag" if told.get("is_flag") else f"{parameter.metavar or ''}: {text}".lstrip(),
            *([] if default is None or told.get("is_flag") else [f"= {default!r}"]),
            *marks,
        ]
    )


def shape(value: Any, names: Mapping[str, str], path: str = "") -> set[str]:
    """Keys and types of what JSON holds, one line a leaf: `[].bbox[]: number`.

    Args:
        value: that was read.
        names: what to call keys that are names of something: `circle` is a `<class>`.
        path: of `value`.
    """
    if isinstance(value, Mapping):
        inner = [shape(v, names, f"{path}.{names.get(k, k)}".lstrip(".")) for k, v in value.items()]
    elif isinstance(value, list):
        inner = [shape(v, names, f"{path}[]") for v in value]
    else:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        kind = "number" if number else "null" if value is None else type(value).__name__
        return {f"{path}: {kind}"}
    return set().union(*inner)
