"""Frozen dataclasses to JSON and back, exactly, checked field by field."""

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

from prox24._core.pattern import Pattern
from prox24._solvers.hyperparameters import REGISTERED
from prox24._solvers.protocol import Refit, Solver, implements
from prox24.errors import RecipeError


def encode(value: Any, place: str) -> Any:
    """The JSON form of a plain value, a pattern, a tuple of such values, or a registered class."""
    if isinstance(value, Pattern):
        return str(value)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return [encode(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, int | float | str):
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{place} is {value}, which JSON cannot hold")
        return value
    name = next((name for name, cls in REGISTERED.items() if cls is type(value)), None)
    if name is None:
        raise RecipeError(
            f"{place} is a {type(value).__name__}, which JSON cannot hold: it is no class that "
            "prox24.hyperparameters registered"
        )
    return {"name": name} | {
        field.name: encode(getattr(value, field.name), f"{place}.{field.name}")
        for field in dataclasses.fields(value)
    }


def decode(value: Any, expected: Any, place: str) -> Any:
    """The value of a field of type `expected`, from its JSON form."""
    options = _options(expected)
    if value is None and type(None) in options:
        return None
    plain = {int, float, bool, str, type(None)}
    if isinstance(value, Mapping) and not plain.issuperset(options):
        return _decode_object(value, options, place)
    for option in options:
        if option is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
        if option in (int, bool, str) and type(value) is option:
            return value
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            # Of equal kinds: tuple[float, ...] or tuple[float, float].
            kind = typing.get_args(option)[0]
            return tuple(decode(each, kind, f"{place}[{i}]") for i, each in enumerate(value))
    raise RecipeError(f"{place} is {value!r}, not {' or '.join(map(_called, options))}")


def _decode_object(value: Mapping[str, Any], options: tuple[Any, ...], place: str) -> Any:
    roles = [option for option in options if option in (Solver, Refit)]
    names = [
        name
        for name, cls in REGISTERED.items()
        if cls in options or Any in options or any(implements(cls, role) for role in roles)
    ]
    name = value.get("name", names[0] if len(names) == 1 else None)
    cls = REGISTERED[name] if name in names else None
    if cls is None:
        unknown = isinstance(name, str) and "." in name and name not in REGISTERED
        hint = "; import its module before" if unknown else ""
        raise RecipeError(
            f"{place} has the name {name!r}, which is not one of {', '.join(names)}{hint}"
        )
    given = {key: item for key, item in value.items() if key != "name"}
    return build(cls, given, place)


def build(cls: type[Any], given: Mapping[str, Any], place: str) -> Any:
    """An object of a dataclass; a missing field has its default."""
    hints = typing.get_type_hints(cls)
    fields = [field.name for field in dataclasses.fields(cls)]
    for key in given:
        if key not in fields:
            raise RecipeError(f"{place} has no field {key!r}; its fields are {', '.join(fields)}")
    values = {key: decode(item, hints[key], f"{place}.{key}") for key, item in given.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:  # a field is missing, or out of its range
        raise RecipeError(f"{place}: {error}") from error


def _options(expected: Any) -> tuple[Any, ...]:
    """The members of a union, flat."""
    if isinstance(expected, types.UnionType) or typing.get_origin(expected) is typing.Union:
        return tuple(each for part in typing.get_args(expected) for each in _options(part))
    return (expected,)


def _called(option: Any) -> str:
    return "null" if option is type(None) else getattr(option, "__name__", str(option))
