"""The roles of solvers and refits: callable objects of hyperparameters with three traits."""

import enum
import inspect
from typing import Protocol, runtime_checkable

from jax import Array

from prox24._core.pattern import AnyPattern, Pattern, Unstructured
from prox24._solvers.problem import Candidate, LayerProblem, Normalized, Refitted


class Patterns(enum.Enum):
    """The patterns that a method can make; `pattern in patterns` tests for one pattern.

    Example:
      >>> from prox24 import Pattern
      >>> Pattern(3, 4) in Patterns.GROUPED, Pattern(3, 4) in Patterns.ONE_OR_TWO
      (True, False)
    """

    ANY = "any N:M and any share of zeros"
    GROUPED = "any N:M"
    ONE_OR_TWO = "1:M and 2:M"

    def __contains__(self, pattern: object) -> bool:
        if self is Patterns.ANY:
            return True
        if isinstance(pattern, Unstructured):
            return False
        return self is Patterns.GROUPED or getattr(pattern, "kept", None) in (1, 2)


def n_of_m(pattern: AnyPattern) -> Pattern:
    """The pattern as N:M, for a method whose `patterns` exclude all others."""
    assert isinstance(pattern, Pattern), pattern
    return pattern


class Traits(Protocol):
    """Facts about a method before it runs: class attributes, or properties."""

    @property
    def patterns(self) -> Patterns:
        """The patterns that the method can make."""

    @property
    def needs_definite(self) -> bool:
        """Whether the method factors or inverts the Gram; damping is raised until it can."""

    @property
    def shares_columns(self) -> bool:
        """Whether no device needs the whole Gram when devices share its columns."""


@runtime_checkable
class Solver(Traits, Protocol):
    """Finds a mask, and weights on it.

    Decorate a class with `prox24.hyperparameters`, and give it the three traits and this call.
    `prox24.solve`, recipes and `prox24.prune` then take its objects (docs/adding-a-solver.md).
    """

    def __call__(self, problem: LayerProblem, pattern: AnyPattern, damping: Array) -> Candidate:
        """Finds a candidate; traceable.

        Args:
          problem: weight (out, in) and gram (in, in), both float32 or both float64.
          pattern: one of `patterns`; static.
          damping: scalar, relative to the mean of the Gram's diagonal.
        """


@runtime_checkable
class Refit(Traits, Protocol):
    """Updates the kept weights, and may move the mask within the pattern."""

    def __call__(
        self, problem: Normalized, weight: Array, mask: Array, pattern: AnyPattern
    ) -> Refitted:
        """Refits a weight; traceable.

        Args:
          problem: normalized: the Gram's diagonal is 1.
          weight: of the normalized problem, shape (out, in), zero outside the mask.
          mask: bool, shape (out, in).
          pattern: one of `patterns`; static.
        """


TRAITS = ("patterns", "needs_definite", "shares_columns")


def implements(cls: type, role: type) -> bool:
    """Whether the objects of a class have the role of `Solver` or `Refit`.

    The traits and the call decide. The calls of both roles differ in the number of their arguments.
    """
    if not all(hasattr(cls, trait) for trait in (*TRAITS, "__call__")):
        return False
    arguments = inspect.signature(role.__call__).parameters
    try:
        inspect.signature(cls.__call__).bind(*arguments)
    except TypeError:
        return False
    return True
