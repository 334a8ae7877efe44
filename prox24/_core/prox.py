"""The exact proximal operator on arrays of any layout."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from prox24._core import planes, tpu
from prox24._core.pattern import PatternLike, as_pattern
from prox24._core.precision import working_dtype


def prox(y: ArrayLike, lam: ArrayLike, pattern: PatternLike = (2, 4), axis: int = -1) -> Array:
    """prox_{lam R}(y) = argmin_w 1/2 |w - y|^2 + lam R(w), exactly, on every block.

    R is `prox24.penalty`. The minimiser keeps the signs and the order of y. Entries kept without
    shrinkage come back bit for bit, and lam = 0 is the identity.

    For 2:M the minimiser keeps two or more entries of a block. Each support size has at most one
    candidate, found by Newton's method on one convex scalar equation. The candidate of least
    objective wins; in a tie, the sparser one. For 1:M the minimiser has a closed form.

    A unit of several entries enters R by its Euclidean norm. The unit keeps its direction, and the
    operator on the norms gives its norm.

    The operator is differentiable in `y` and `lam`, once or more, by the implicit function theorem
    on the support of the minimiser. If supports tie, the derivative belongs to the returned
    support. At a block of zeros it is the identity for 2:M. Blocks are independent, so the result
    is sharded like `y`, without communication.

    Args:
      y: array of float64, float32 or a 16-bit type. The work on 16-bit types is in float32, rounded
        once. The length along `axis` is a multiple of M units.
      lam: nonnegative, traced or not: a scalar, or an array that broadcasts to the shape of y with
        `axis` divided by the length of a block. Shape (out, 1) is one penalty per row of an
        (out, in) weight. For 2:M the unit of lam is 1/y; for 1:M lam has no unit.
      pattern: (1, M) or (2, M), or `prox24.Pattern` with units of several entries.
      axis: the axis along which the blocks of M run. It is -1 for weights (out, in). It is -2 for
        Flax kernels (in, out) and for convolution kernels (height, width, in, out).

    Returns:
      Array of the shape and dtype of `y`. A NaN in `y` or in `lam`, or a negative number in an
      array `lam`, makes only its own block NaN. A block with an infinity may be NaN too. CPUs read
      subnormal entries as zeros, and may return pruned subnormal entries unchanged.

    Raises:
      ValueError: the pattern is neither 1:M nor 2:M, the axis does not exist, or M does not divide
        its length. Also if `y` is not floating-point, `lam` is a negative number or does not
        broadcast to the blocks, or an explicit axis of a mesh cuts blocks.

    References:
      "A Proximal Operator for Inducing 2:4-Sparsity", arXiv 2501.18015, poses the problem and
      solves it by gradient descent. The scalar equations are derived in docs/theory.md.

    Example:
      >>> import jax.numpy as jnp
      >>> prox(jnp.array([1.0, -0.8, 0.6, 0.4]), 1.0).tolist()
      [1.0, -0.800000011920929, 0.0, 0.0]
    """
    pattern = as_pattern(pattern)
    planes.check_kept(pattern.kept, pattern.group)
    if isinstance(lam, int | float) and lam < 0:
        raise ValueError(f"lam is {lam}; a penalty is nonnegative")
    y = jnp.asarray(y)
    lam = jnp.asarray(lam, working_dtype(y.dtype))  # One program serves numbers of every type.
    if tpu.serves(y, lam, pattern, axis):
        return _prox_of_rows(y, lam, pattern.kept, pattern.group)
    return _planar(y, lam, *pattern, axis)


_planar = jax.jit(tpu.planar, static_argnums=(2, 3, 4, 5))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
@functools.partial(jax.jit, static_argnums=(2, 3))
def _prox_of_rows(y: Array, lam: Array, kept: int, group: int) -> Array:
    return tpu.prox_p.bind(y, lam, kept=kept, group=group)


@_prox_of_rows.defjvp
def _prox_of_rows_jvp(
    kept: int, group: int, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    return jax.jvp(lambda y, lam: tpu.planar(y, lam, kept, group), primals, tangents)
