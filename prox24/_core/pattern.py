"""Sparsity patterns: N of every M consecutive entries, or a fraction of all entries."""

import dataclasses
import operator
from typing import ClassVar, NamedTuple


class Pattern(NamedTuple):
    """N:M sparsity: `kept` units of every `group` consecutive ones may be nonzero.

    Attributes:
      kept: N.
      group: M.
      unit: number of consecutive entries that are kept or pruned together. `Pattern(2, 4, 2)` keeps
        two pairs of every four: the pattern of 4-bit numbers for the sparse tensor cores of
        NVIDIA's Blackwell.

    Example:
      >>> print(Pattern(2, 4), Pattern(2, 4, unit=2), Pattern(2, 4, unit=2).width)
      2:4 2:4x2 8
    """

    kept: int
    group: int
    unit: int = 1

    @property
    def width(self) -> int:
        """The entries of a block."""
        return self.group * self.unit

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}" + (f"x{self.unit}" if self.unit > 1 else "")


PatternLike = tuple[int, int] | Pattern | str
"""A pattern, as functions take it."""


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Sparsity without a pattern: a fraction `sparsity` of the entries is zero, 0 <= sparsity < 1.

    The method decides whether entries compete within a row or within the whole matrix.

    Raises:
      ValueError: the fraction is out of range.

    Example:
      >>> str(Unstructured(0.5)), Unstructured(0.5).kept(10), Unstructured(0.29).kept(100)
      ('50%', 5, 71)
    """

    sparsity: float
    width: ClassVar[int] = 1  # There are no blocks, so any length fits.

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity {self.sparsity} is not a fraction of at least 0, below 1")

    def __str__(self) -> str:
        return f"{100 * self.sparsity:g}%"

    def kept(self, size: int) -> int:
        """The number of entries kept out of `size`; the number of zeros is rounded down."""
        # Rounding alone may put the product below a whole number.
        return size - int(round(size * self.sparsity, 6))


def as_pattern(pattern: PatternLike) -> Pattern:
    """Reads (N, M) or a text "N:M" or "N:MxU"; raises ValueError unless 1 <= N <= M."""
    if isinstance(pattern, str):
        read = as_any_pattern(pattern)
        if isinstance(read, Unstructured):
            raise ValueError(f"pattern {pattern} is not N:M")
        return read
    try:
        kept, group, unit = pattern if isinstance(pattern, Pattern) else (*pattern, 1)
        found = Pattern(*map(operator.index, (kept, group, unit)))
    except (TypeError, ValueError):
        share = "; a share of zeros is prox24.Unstructured" if isinstance(pattern, float) else ""
        raise ValueError(f"pattern {pattern} is not N:M, a pair of integers{share}") from None
    if not 1 <= found.kept <= found.group:
        raise ValueError(f"pattern {found} is not N:M with 1 <= N <= M")
    if found.unit < 1:
        raise ValueError(f"the unit of a pattern is {found.unit}, not 1 or more entries")
    return found


AnyPattern = Pattern | Unstructured


def as_any_pattern(pattern: "PatternLike | Unstructured | str") -> AnyPattern:
    """Reads a pattern: (N, M), `Unstructured`, or a text "N:M", "N:MxU" or "P%".

    Raises ValueError for anything else.
    """
    if isinstance(pattern, Unstructured):
        return pattern
    if not isinstance(pattern, str):
        return as_pattern(pattern)
    try:
        if pattern.endswith("%"):
            return Unstructured(float(pattern.removesuffix("%")) / 100)
        shape, *unit = pattern.split("x", 1)
        kept, group = shape.split(":")
        return as_pattern(Pattern(int(kept), int(group), *map(int, unit)))
    except ValueError as error:
        raise ValueError(
            f"{pattern!r} is neither N:M with 1 <= N <= M, nor N:MxU with units of U entries, nor "
            "a percentage below 100%"
        ) from error
