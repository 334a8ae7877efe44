"""Whole numbers: counts and axes."""

import numbers
from typing import Any


def check_whole(name: str, count: Any) -> None:
    """Raises ValueError for a number that is no integer."""
    if not isinstance(count, numbers.Integral):
        raise ValueError(f"{name} {count!r} is not a whole number")
