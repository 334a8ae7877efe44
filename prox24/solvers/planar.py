"""A normalized problem whose input features are permuted so that plane i is a range of columns.

The product with the Gram then sees an ordinary matrix, the proximal operator sees contiguous
planes, and nothing is interleaved until the end.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from prox24.core import planes
from prox24.core.blocks import ranks
from prox24.core.pattern import Pattern, Unstructured
from prox24.solvers.problem import Normalized


def check_grouped(
    pattern: Pattern | Unstructured,
    method: str,
    instead: str = "magnitude, wanda and sparsegpt do",
) -> Pattern:
    """The pattern; raises ValueError, naming what serves instead, for sparsity without one."""
    if isinstance(pattern, Unstructured):
        raise ValueError(f"{method} supports patterns N:M, not unstructured {pattern}; {instead}")
    return pattern


def to_planes(problem: Normalized, pattern: Pattern) -> tuple[Array, Array]:
    """Weight (out, in) and Gram (in, in) with the columns of plane 0 first, then those of 1, ..."""
    order = jnp.concatenate(planes.split(jnp.arange(problem.weight.shape[1]), pattern))
    return problem.weight[:, order], problem.gram[order][:, order]


def from_planes(weight: Array, pattern: Pattern) -> Array:
    """Undoes the permutation of the columns of `to_planes`."""
    return planes.join(jnp.split(weight, pattern.group, axis=1))


def project(blocks: Sequence[Array], pattern: Pattern) -> list[Array]:
    """The N entries of largest magnitude of each block, zero elsewhere; planar."""
    places = ranks([jnp.abs(plane) for plane in blocks])
    return [
        jnp.where(place < pattern.kept, plane, 0)
        for plane, place in zip(blocks, places, strict=True)
    ]


def dense_blocks(blocks: Sequence[Array], pattern: Pattern) -> Array:
    """Marks the blocks with more than N nonzeros; bool, of the shape of a plane."""
    return _count([plane != 0 for plane in blocks]) > pattern.kept


def changed(blocks: Sequence[Array], before: Sequence[Array], pattern: Pattern) -> Array:
    """Entries that entered or left the support, per entry that the pattern keeps; a scalar."""
    moves = _count([(a != 0) != (b != 0) for a, b in zip(blocks, before, strict=True)])
    return jnp.sum(moves).astype(blocks[0].dtype) / (moves.size * pattern.kept)


def _count(marks: Sequence[Array]) -> Array:
    return functools.reduce(jnp.add, [mark.astype(jnp.int32) for mark in marks])
