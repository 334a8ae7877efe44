"""The proximal operator of e2, which keeps one entry of a block: a closed form on prefixes.

Everything is planar: each name is an array over all blocks. docs/theory.md derives the equations.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from prox24._core.blocks import descending, ranks


def shrink(magnitudes: Sequence[Array], lam: Array) -> list[Array]:
    """|w| of the minimiser, planar: argmin over w >= 0 of 1/2 |w - y|^2 + lam e2(w).

    Let |y| be in descending order, and let k entries be kept. The new sum of the kept entries is

        S = sum(w) = sum_j |y_j| / (1 + (k - 1) lam)

    over the kept j. Each kept entry becomes

        w_i = (|y_i| - lam S) / (1 - lam)
            = (|y_i| + lam / (1 - lam) sum_j (|y_i| - |y_j|)) / (1 + (k - 1) lam).

    For lam < 1 the objective is convex, and k is the largest number for which w_k > 0. For lam >= 1
    one entry is kept.

    Args:
      magnitudes: M arrays |y| of one shape and dtype, float32 or float64.
      lam: nonnegative, a scalar or an array of that shape, of that dtype, without a unit.

    Returns:
      M arrays with entries from 0 to |y|. Entries without shrinkage equal those of `magnitudes`. A
      block is NaN if one of its entries or its lam is NaN.
    """
    ordered = descending(magnitudes)
    # In units of the largest entry, so that no sum overflows.
    unit = jnp.where(ordered[0] > 0, ordered[0], 1)
    v = [entry / unit for entry in ordered]
    convex = lam < 1
    slack = jnp.where(convex, 1 - lam, 1)
    # This uses differences of entries, since differences from lam S would cancel for lam near 1.
    size, s, prefix, excess = jnp.ones_like(unit), v[0], v[0], jnp.zeros_like(unit)
    for k in range(2, len(v) + 1):
        prefix = prefix + v[k - 1]
        excess = excess + (k - 1) * (v[k - 2] - v[k - 1])
        positive = convex & (slack * v[k - 1] > lam * excess)
        size = jnp.where(positive, k, size)
        s = jnp.where(positive, prefix / (1 + (k - 1) * lam), s)

    def restore(magnitude: Array, rank: Array) -> Array:
        value = magnitude / unit
        gaps = sum(jnp.where(size > i, value - entry, 0) for i, entry in enumerate(v))
        w = (slack * value + lam * gaps) / (slack * (1 + (size - 1) * lam))
        # If little is removed, |y| - w = lam (S - w) loses no digits.
        lost = lam * jnp.maximum(s - w, 0)
        w = jnp.where(2 * lost <= value, magnitude - unit * lost, unit * w)
        # The difference is zero, or NaN if an entry or lam is NaN.
        whole = magnitude + (lam * v[0] - lam * v[0])
        w = jnp.where(size > 1, jnp.clip(w, 0, magnitude), whole)
        w = jnp.where(rank.astype(lam.dtype) < size, w, whole - whole)
        return jnp.where(lam > 0, w, whole)

    return [restore(*pair) for pair in zip(magnitudes, ranks(magnitudes), strict=True)]


def gradient(w: Sequence[Array]) -> list[Array]:
    """Gradient of e2 at w >= 0: for each entry the sum of the others.

    Args:
      w: M arrays of one shape.

    Returns:
      M arrays of that shape.
    """
    s = sum(w)
    return [s - entry for entry in w]


def solve(
    w: Sequence[Array], support: Sequence[Array], lam: Array, r: Sequence[Array]
) -> list[Array]:
    """H^-1 r on the support, for the Hessian H = (1 - lam) I + lam 11^T of `shrink`'s objective.

    It uses the Sherman-Morrison formula.

    Args:
      w: M arrays |w|, a minimiser; H does not depend on it.
      support: M bool arrays.
      lam: as in `shrink`, below 1.
      r: M arrays, zero off the support.

    Returns:
      M arrays, zero off the support.
    """
    del w
    size = sum(kept.astype(lam.dtype) for kept in support)
    total = sum(r) / (1 + (size - 1) * lam)
    return [
        jnp.where(kept, (x - lam * total) / (1 - lam), 0)
        for kept, x in zip(support, r, strict=True)
    ]
