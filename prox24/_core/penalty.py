"""The penalty, which is zero exactly on arrays of the pattern."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from prox24._core.blocks import split, unit_norms
from prox24._core.pattern import Pattern, PatternLike, as_pattern
from prox24._core.precision import working_dtype


def penalty(w: ArrayLike, pattern: PatternLike = (2, 4), axis: int = -1) -> Array:
    """R(w) = sum over blocks of e_{N+1}(|w|), the elementary symmetric polynomial of degree N+1.

    It is zero exactly if every block has at most N nonzeros. On a block of 2:4

        R(w) = |w1 w2 w3| + |w1 w2 w4| + |w1 w3 w4| + |w2 w3 w4|.

    Units of several entries enter by their Euclidean norms.

    Args:
      w: array whose length along `axis` is a multiple of M units.
      pattern: (N, M), any 1 <= N <= M (N = M gives 0), or `prox24.Pattern`.
      axis: the axis along which the blocks run.

    Returns:
      Scalar, float64 if `w` is float64, else float32. Its unit is the unit of w to the power N + 1.

    Raises:
      ValueError: the pattern is not N:M, the axis does not exist, or has no whole blocks.

    References:
      "A Proximal Operator for Inducing 2:4-Sparsity", arXiv 2501.18015, the regulariser of its
      section 3.

    Example:
      >>> float(penalty(jnp.array([1.0, -2.0, 3.0, 0.0])))
      6.0
    """
    return _penalty(jnp.asarray(w), as_pattern(pattern), axis)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _penalty(w: Array, pattern: Pattern, axis: int) -> Array:
    degree = pattern.kept + 1
    w = w.astype(working_dtype(w.dtype))
    magnitudes = unit_norms(split(w, pattern, axis), pattern.unit)
    # Horner's scheme for the product of (1 + |w_i| t): elementary[d] is e_d of the entries so far.
    elementary = [jnp.ones_like(magnitudes[0])] + [jnp.zeros_like(magnitudes[0])] * degree
    for magnitude in magnitudes:
        for d in range(degree, 0, -1):
            elementary[d] = elementary[d] + magnitude * elementary[d - 1]
    return jnp.sum(elementary[degree])
