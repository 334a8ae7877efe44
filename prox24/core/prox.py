"""The exact proximal operator of the 2:4 penalty, by one scalar root per support size.

Notation, on one block: y is the input with its signs removed and sorted, y1 >= y2 >= y3 >= y4;
z = y / y1, mu = lam y1 and v = mu z = lam y are the input without units; the minimiser w is
w = y1 omega and u = mu omega = lam w. Everything is planar: each name is an array over all blocks.
docs/theory.md derives the equations.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from prox24.core.pattern import PatternLike, as_pattern, from_planes, ranks, to_planes

# A support of three or four entries is a strict local minimum only where every 2x2 minor of the
# Hessian is positive; that bounds v1 by 2. Larger inputs are thresholded without solving anything.
LARGEST_SCALED_INPUT = 2.0
# A shrinkage that removes any entry: entries are at most 1 in units of the largest.
REMOVED = 2.0
NEWTON_STEPS = {"float32": 8, "float64": 12}

Block4 = tuple[Array, Array, Array, Array]


def prox(y: ArrayLike, lam: ArrayLike, pattern: PatternLike = (2, 4), axis: int = -1) -> Array:
    """prox_{lam R}(y) = argmin_w 1/2 |w - y|^2 + lam R(w), exactly, on every block.

    R is `prox24.penalty`. The minimiser keeps the signs and the order of y and has two, three or
    four nonzeros in a block; each support size has at most one candidate, found by Newton's method
    on one convex scalar equation, and the candidate of least objective wins (ties: the sparser).
    Entries that are kept without shrinkage come back bit for bit, and lam = 0 is the identity.

    Args:
      y: array whose length along `axis` is a multiple of 4; float64, float32, or a 16-bit type,
        which is computed in float32 and rounded once.
      lam: nonnegative scalar, of the unit 1/y; traced, so one compilation serves every value.
      pattern: (2, 4).
      axis: the axis along which the blocks of 4 run.

    Returns:
      Array of the shape and dtype of `y`. A NaN makes its own block NaN and no other.

    Raises:
      ValueError: another pattern than 2:4, or 4 does not divide the length along `axis`.

    References:
      "A Proximal Operator for Inducing 2:4-Sparsity", arXiv 2501.18015, which poses the problem
      and solves it by gradient descent; the scalar equations are derived in docs/theory.md.

    Example:
      >>> prox(jnp.array([1.0, -0.8, 0.6, 0.4]), 1.0).tolist()
      [1.0, -0.800000011920929, 0.0, 0.0]
    """
    check_prox_pattern(pattern)
    y = jnp.asarray(y)
    dtype = jnp.float64 if y.dtype == jnp.float64 else jnp.float32
    a, b, c, d = to_planes(y.astype(dtype), pattern, axis)
    return from_planes(prox_planes((a, b, c, d), lam), axis).astype(y.dtype)


def check_prox_pattern(pattern: PatternLike) -> None:
    """Raises ValueError, saying what serves instead, unless `pattern` is 2:4."""
    if as_pattern(pattern) != (2, 4):
        raise ValueError(
            f"prox supports the pattern 2:4, not {as_pattern(pattern)}; "
            "magnitude, wanda and sparsegpt support any N:M"
        )


def prox_planes(y: Block4, lam: ArrayLike) -> Block4:
    """The proximal operator on blocks in planar form, for callers that keep their data planar.

    Args:
      y: four arrays of one shape and dtype (float32 or float64), the entries of each block.
      lam: nonnegative scalar.

    Returns:
      Four arrays like those of `y`: the minimisers of `prox`.

    Example:
      >>> y = tuple(jnp.full((1,), value) for value in (1.0, 0.8, 0.6, 0.4))
      >>> [round(float(w[0]), 3) for w in prox_planes(y, 0.3)]
      [0.911, 0.681, 0.404, 0.021]
    """
    magnitudes = jnp.abs(y[0]), jnp.abs(y[1]), jnp.abs(y[2]), jnp.abs(y[3])
    largest, shrinkage = _shrinkage(magnitudes, jnp.asarray(lam, y[0].dtype))
    rank = ranks(magnitudes)

    def restore(i: int) -> Array:
        by_rank = jnp.where(
            rank[i] < 2,
            jnp.where(rank[i] == 0, shrinkage[0], shrinkage[1]),
            jnp.where(rank[i] == 2, shrinkage[2], shrinkage[3]),
        )
        shrunk = magnitudes[i] - largest * by_rank
        w = jnp.where(shrunk >= jnp.finfo(shrunk.dtype).tiny, jnp.copysign(shrunk, y[i]), 0)
        w = jnp.where(by_rank == 0, y[i], w)
        return jnp.where(jnp.isnan(largest), largest, w)

    return restore(0), restore(1), restore(2), restore(3)


def _shrinkage(magnitudes: Block4, lam: Array) -> tuple[Array, Block4]:
    """The largest magnitude of each block, and |y| - |w| in units of it, by rank."""
    ordered = _sort(magnitudes)
    largest = ordered[0]
    unit = jnp.where(largest > 0, largest, 1)
    z = ordered[0] / unit, ordered[1] / unit, ordered[2] / unit, ordered[3] / unit
    mu = jnp.minimum(lam * largest, LARGEST_SCALED_INPUT)

    dense = _dense_candidate(z, mu)
    triple = _triple_candidate(z, mu)
    dense_objective = _objective(z, mu, dense)
    triple_objective = _objective(z, mu, triple)
    pair_objective = (z[2] * z[2] + z[3] * z[3]) / 2

    # Every candidate is a feasible point, so one found where no stationary point exists only
    # loses. The comparisons are written so that NaN loses too, and the sparser wins a tie.
    solvable = mu < LARGEST_SCALED_INPUT
    is_dense = solvable & (dense_objective < pair_objective)
    is_dense &= ~(triple_objective <= dense_objective)
    is_triple = solvable & (triple_objective < pair_objective) & ~is_dense

    def choose(i: int) -> Array:
        pair = 0 if i < 2 else REMOVED
        shrinkage = jnp.where(is_dense, dense[i], jnp.where(is_triple, triple[i], pair))
        shrinkage = jnp.where(shrinkage < z[i], shrinkage, REMOVED)
        # Without a penalty nothing moves, not even entries too small for the units of z.
        return jnp.where(lam > 0, shrinkage, 0)

    return largest, (choose(0), choose(1), choose(2), choose(3))


def _sort(block: Block4) -> Block4:
    """Descending order, by a network of five compare-exchanges."""
    a, b, c, d = block
    a, b = jnp.maximum(a, b), jnp.minimum(a, b)
    c, d = jnp.maximum(c, d), jnp.minimum(c, d)
    a, c = jnp.maximum(a, c), jnp.minimum(a, c)
    b, d = jnp.maximum(b, d), jnp.minimum(b, d)
    b, c = jnp.maximum(b, c), jnp.minimum(b, c)
    return a, b, c, d


def _objective(z: Block4, mu: Array, shrinkage: Block4) -> Array:
    """1/2 |omega - z|^2 + mu e3(omega) at omega = z - shrinkage, in units of y1 squared."""
    t1, t2, t3, t4 = shrinkage
    w1, w2, w3, w4 = _map(jnp.subtract, z, shrinkage)
    distance = (t1 * t1 + t2 * t2 + t3 * t3 + t4 * t4) / 2
    return distance + mu * (w1 * w2 * (w3 + w4) + w3 * w4 * (w1 + w2))


def _triple_candidate(z: Block4, mu: Array) -> Block4:
    """Shrinkage of the candidate with three nonzeros.

    Stationarity makes w_i (z_i - w_i) = mu w1 w2 w3 the same for the three. With
    delta = 2 w3 - z3, the equation for delta is convex, positive at z3, and its larger root is the
    minimiser, so Newton descends from z3 monotonically.
    """
    z1, z2, z3, z4 = z
    a_offset = (z1 - z3) * (z1 + z3) + jnp.finfo(mu.dtype).tiny
    b_offset = (z2 - z3) * (z2 + z3) + jnp.finfo(mu.dtype).tiny
    delta = z3
    for _ in range(NEWTON_STEPS[mu.dtype.name]):
        a = jnp.sqrt(delta * delta + a_offset)
        b = jnp.sqrt(delta * delta + b_offset)
        value = mu * (z1 + a) * (z2 + b) - 2 * (z3 - delta)
        # The derivative times a b, so that the step takes one division.
        slope = mu * delta * (b * (z2 + b) + a * (z1 + a)) + 2 * a * b
        delta = delta - value * (a * b) / slope
    w1 = (z1 + jnp.sqrt(delta * delta + a_offset)) / 2
    w2 = (z2 + jnp.sqrt(delta * delta + b_offset)) / 2
    w3 = jnp.maximum(z3 + delta, 0) / 2
    return _map(jnp.minimum, (mu * w2 * w3, mu * w1 * w3, mu * w1 * w2, z4), z)


def _dense_candidate(z: Block4, mu: Array) -> Block4:
    """Shrinkage of the candidate with four nonzeros.

    With s = sum(u) and E = e2(u) = (sum(v) - s) / 2, stationarity is
    D_i^2 = (1 - s)^2 + 4 (v_i - E) for D_i = 1 - s + 2 u_i, and sum(D) = 4 - 2 s is one equation.
    Its unknown x is s where
    c_4 = 1 + 4 v_4 - 2 sum(v) is nonnegative, and D_4, of either sign, where it is not. In both
    cases the equation is convex, nonnegative at the start, and Newton descends to the larger root.
    """
    v1, v2, v3, v4 = v = mu * z[0], mu * z[1], mu * z[2], mu * z[3]
    total = v1 + v2 + v3 + v4
    c4 = 1 + 4 * v4 - 2 * total
    in_s = c4 >= 0
    tiny = jnp.finfo(mu.dtype).tiny
    # D_i = sqrt(x^2 + offset_i) for i < 4, and last = sqrt(x^2 + |c4|) is D_4 or s.
    base = jnp.where(in_s, 1 - 2 * total, -4 * v4) + tiny
    offset1, offset2, offset3 = base + 4 * v1, base + 4 * v2, base + 4 * v3
    offset4 = jnp.abs(c4) + tiny
    x_weight = jnp.where(in_s, 1, 0.5).astype(mu.dtype)
    last_weight = jnp.where(in_s, 0.5, 1).astype(mu.dtype)

    def radicals(x: Array) -> Block4:
        square = x * x
        return (
            jnp.sqrt(square + offset1),
            jnp.sqrt(square + offset2),
            jnp.sqrt(square + offset3),
            jnp.sqrt(square + offset4),
        )

    x = jnp.where(in_s, total, 1)
    for _ in range(NEWTON_STEPS[mu.dtype.name]):
        d1, d2, d3, last = radicals(x)
        value = x_weight * x - 2 + last_weight * last + (d1 + d2 + d3) / 2
        # The derivative over the common denominator of its four fractions: one division a step.
        d12, d3_last = d1 * d2, d3 * last
        numerator = ((d1 + d2) * d3_last + last * d12) / 2 + last_weight * d12 * d3
        denominator = d12 * d3_last
        x = x - value * denominator / (x_weight * denominator + x * numerator)

    d1, d2, d3, last = radicals(x)
    s = jnp.where(in_s, x, last)
    d4 = jnp.where(in_s, last, x)
    scale = 1 / jnp.maximum(mu, tiny)

    def omega(i: int, d: Array) -> Array:
        # Two forms of one root; each cancels where the other does not.
        large = (s >= 1) | (d <= 0)
        u = jnp.where(
            large, (d - 1 + s) / 2, (2 * v[i] - total + s) / jnp.where(large, 1, d + 1 - s)
        )
        return jnp.clip(u * scale, 0, z[i])

    w = omega(0, d1), omega(1, d2), omega(2, d3), omega(3, d4)
    # The root leaves an error of some 1e-7 in u, however small u is. One application of the
    # stationarity condition turns it into an error of 1e-7 relative to y1.
    return _dense_shrinkage(z, w, mu)


def _dense_shrinkage(z: Block4, w: Block4, mu: Array) -> Block4:
    """mu e2 of the three other entries, for each entry, but never more than the entry."""
    w1, w2, w3, w4 = w
    shrinkage = (
        mu * (w2 * w3 + w4 * (w2 + w3)),
        mu * (w1 * w3 + w4 * (w1 + w3)),
        mu * (w1 * w2 + w4 * (w1 + w2)),
        mu * (w1 * w2 + w3 * (w1 + w2)),
    )
    return _map(jnp.minimum, shrinkage, z)


def _map(function: Callable[[Array, Array], Array], a: Block4, b: Block4) -> Block4:
    return function(a[0], b[0]), function(a[1], b[1]), function(a[2], b[2]), function(a[3], b[3])
