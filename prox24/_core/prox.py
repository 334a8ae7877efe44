"""The exact proximal operator on arrays of any layout."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from prox24._core import planes, tpu
from prox24._core.pattern import PatternLike, as_pattern


def prox(y: ArrayLike, lam: ArrayLike, pattern: PatternLike = (2, 4), axis: int = -1) -> Array:
    """prox_{lam R}(y) = argmin_w 1/2 |w - y|^2 + lam R(w), exactly, on every block.

    R is `prox24.penalty`. The minimiser keeps the signs and the order of y. For 2:M it keeps two
    or more entries of a block; each support size has at most one candidate, found by Newton's
    method on one convex scalar equation, and the candidate of least objective wins (ties: the
    sparser). For 1:M it is in closed form. Entries that are kept without shrinkage come back bit
    for bit, and lam = 0 is the identity. A unit of several entries enters R by its Euclidean norm:
    it keeps its direction, and its norm is that of the operator of the norms.

    Differentiable in `y` and `lam`, once or more, by the implicit function theorem on the support
    of the minimiser; where supports tie, the derivative is that of the one returned. Blocks are
    independent, so the result is sharded as `y` is, without communication.

    Args:
      y: array whose length along `axis` is a multiple of M units; float64, float32, or a
        16-bit type, which is computed in float32 and rounded once.
      lam: nonnegative, traced or not. A scalar, or an array that broadcasts to the shape of y with
        its length along `axis` divided by that of a block: shape (out, 1) is one penalty per row of
        an (out, in) weight. Its unit is 1/y for 2:M; for 1:M it has none.
      pattern: (1, M) or (2, M), or `prox24.Pattern` with units of several entries.
      axis: the axis along which the blocks of M run: -1 for weights (out, in), -2 for Flax kernels
        (in, out) and for convolution kernels (height, width, in, out).

    Returns:
      Array of the shape and dtype of `y`. In an array, a NaN or a negative `lam` makes its own
      block NaN and no other; a block that holds an infinity may be NaN as well. CPUs read subnormal
      entries as zeros, and may return those that are pruned as they are.

    Raises:
      ValueError: another pattern, no such axis, M does not divide its length, `lam` does not
        broadcast to the blocks, `y` is not floating-point, or `lam` is a negative number.

    References:
      "A Proximal Operator for Inducing 2:4-Sparsity", arXiv 2501.18015, which poses the problem
      and solves it by gradient descent; the scalar equations are derived in docs/theory.md.

    Example:
      >>> import jax.numpy as jnp
      >>> prox(jnp.array([1.0, -0.8, 0.6, 0.4]), 1.0).tolist()
      [1.0, -0.800000011920929, 0.0, 0.0]
    """
    pattern = as_pattern(pattern)
    planes.check_kept(pattern.kept, pattern.group)
    if isinstance(lam, int | float) and lam < 0:
        raise ValueError(f"lam is {lam}; a penalty is nonnegative")
    y, lam = jnp.asarray(y), jnp.asarray(lam)
    if tpu.serves(y, lam, pattern, axis):
        return _prox_of_rows(y, lam.astype(jnp.float32), pattern.kept, pattern.group)
    return tpu.planar(y, lam, *pattern, axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
@functools.partial(jax.jit, static_argnums=(2, 3))
def _prox_of_rows(y: Array, lam: Array, kept: int, group: int) -> Array:
    return tpu.prox_p.bind(y, lam, kept=kept, group=group)


@_prox_of_rows.defjvp
def _prox_of_rows_jvp(
    kept: int, group: int, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    return jax.jvp(lambda y, lam: tpu.planar(y, lam, kept, group), primals, tangents)
