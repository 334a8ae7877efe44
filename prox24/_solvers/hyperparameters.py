"""Immutable objects of hyperparameters: solvers, refits and schedules, as arguments of programs."""

import dataclasses
import numbers
from collections.abc import Iterable
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")

REGISTERED: dict[str, type] = {}
"""The classes that a recipe can hold in JSON, by name. Names from other packages begin with their
module."""


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def hyperparameters(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass and a pytree: one program serves all values of its fields.

    A recipe's JSON can hold its objects, by the name of the class. Fields with metadata
    {"static": True} are compiled in.

    Different classes have different tree structures. With `jax.tree_util.register_dataclass`
    (jaxlib 0.10.2 and 0.12.0), classes with equally many fields have equal structures. For about
    one pair of classes in a hundred, whose hashes begin alike, `jax.jit` then runs the program of
    the other class.

    Args:
      cls: a class with annotated fields, like a dataclass. Class variables are no fields.

    Returns:
      The class.

    Example:
      >>> @hyperparameters
      ... class Rate:
      ...     value: float
      >>> @hyperparameters
      ... class Scale:
      ...     value: float
      >>> jax.tree.leaves(Rate(0.5))
      [0.5]
      >>> jax.tree.structure(Rate(0.5)) == jax.tree.structure(Scale(0.5))
      False
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # mypy sees no dataclass here
    static = [field.name for field in fields if field.metadata.get("static")]
    traced = [field.name for field in fields if not field.metadata.get("static")]
    floats = {field.name for field in fields if field.type in (float, "float")}

    def leaf(value: T, name: str) -> Any:
        given = getattr(value, name)
        # An int has another dtype, and so would compile another program.
        return float(given) if name in floats and isinstance(given, int) else given

    def flatten_with_keys(value: T) -> tuple[Iterable[tuple[Any, Any]], Any]:
        keyed = [(jax.tree_util.GetAttrKey(name), leaf(value, name)) for name in traced]
        return keyed, (cls, *(getattr(value, name) for name in static))

    def unflatten(structure: Any, children: Iterable[Any]) -> T:
        values = dict(zip(traced, children, strict=True))
        return cls(**values, **dict(zip(static, structure[1:], strict=True)))

    own = cls.__module__.startswith("prox24.")
    REGISTERED[cls.__name__ if own else f"{cls.__module__}.{cls.__qualname__}"] = cls
    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls


def check_numbers(value: Any) -> None:
    """Raises ValueError unless the numbers of prox24's own object are nonnegative, counts whole.

    Numbers of another package's class may mean anything.
    """
    if not type(value).__module__.startswith("prox24."):
        return
    for field in dataclasses.fields(value):
        given = getattr(value, field.name)
        if dataclasses.is_dataclass(given):
            check_numbers(given)
        else:
            kind = numbers.Integral if field.type in (int, "int") else numbers.Real
            check_number(f"{type(value).__name__}.{field.name}", given, kind)


def check_number(name: str, value: Any, kind: type = numbers.Real) -> None:
    """Raises ValueError for a negative number, NaN, a text, or a number of another kind."""
    if not isinstance(value, numbers.Real | str):  # An array may be traced, or on other devices.
        return
    if not isinstance(value, kind) or isinstance(value, str) or not float(value) >= 0:
        whole = "whole " if kind is numbers.Integral else ""
        raise ValueError(f"{name} is {value!r}, not a nonnegative {whole}number")
