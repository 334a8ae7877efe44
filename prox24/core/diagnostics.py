"""What the Gram of a layer's inputs says about the features, before anything is pruned."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.scipy.special import entr


class GramDiagnostics(NamedTuple):
    """Figures of a Gram G = X^T X; each is a scalar, and docs/diagnostics.md says how to read them.

    C is the Gram scaled to unit diagonal, see `correlation`. Features that are zero in every token
    are dead: they are left out of every figure that is of C. If an entry of G is NaN or infinite,
    the floating figures are NaN and the bounds of the Kruskal rank are 0 and the input width. The
    zero Gram counts as diagonal, with a Kruskal rank of 0.

    Attributes:
      dead_features: features with 0 on the diagonal, int32.
      condition_number: largest over smallest eigenvalue of G, inf where G is singular to rounding.
      effective_rank: exp of the entropy of the eigenvalues of G; 0 for the zero Gram.
      scaled_condition_number: the condition number of C. Wanda's loss is at most this many times
        the least loss of any weight of the same pattern.
      off_diagonal_mass: sum of C_ij^2 over i != j, divided by the sum over all i, j.
      coherence: the largest |C_ij|, i != j.
      restricted_isometry: the constant of order 2 of the features scaled to unit length, exactly.
        It equals the coherence: two features have the Gram [[1, c], [c, 1]], with eigenvalues
        1 - |c| and 1 + |c|.
      kruskal_lower, kruskal_upper: int32 bounds on the Kruskal rank, the largest k such that every
        k features are linearly independent.
    """

    dead_features: Array
    condition_number: Array
    effective_rank: Array
    scaled_condition_number: Array
    off_diagonal_mass: Array
    coherence: Array
    restricted_isometry: Array
    kruskal_lower: Array
    kruskal_upper: Array


def diagnose(gram: Array) -> GramDiagnostics:
    """Computes every figure of a Gram; traceable.

    The arithmetic is elementwise but for two eigendecompositions in the dtype of the Gram. Their
    errors are of the order of eps times the largest eigenvalue, so an eigenvalue of at most
    in * eps times the largest counts as zero, eps being that of the dtype: a float32 Gram of 576
    features can show condition numbers up to 1 / (576 * 1.2e-7) = 14564.

    Args:
      gram: shape (in, in), float32 or float64, symmetric and positive semidefinite.

    Returns:
      `GramDiagnostics`; the floating figures have the dtype of `gram`.

    Raises:
      ValueError: the gram is not square, is empty, or has another dtype.

    Example:
      >>> figures = diagnose(jnp.array([[4.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 9.0]]))
      >>> float(figures.coherence), int(figures.kruskal_lower), int(figures.kruskal_upper)
      (0.5, 2, 3)
    """
    width = len(gram) if gram.ndim else 0
    if not width or gram.shape != (width, width):
        raise ValueError(f"gram {gram.shape} is not (in, in)")
    if gram.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"the gram is {gram.dtype}, not float32 or float64")
    gram = jnp.where(jnp.all(jnp.isfinite(gram)), gram, jnp.nan)
    rounding = _rounding(gram)
    dead = jnp.count_nonzero(jnp.diagonal(gram) == 0).astype(jnp.int32)
    live = width - dead
    eigenvalues = jnp.linalg.eigvalsh(gram)

    scaled = correlation(gram)
    scaled_eigenvalues = jnp.linalg.eigvalsh(scaled)
    off_diagonal = jnp.fill_diagonal(scaled, 0, inplace=False)
    off_mass = jnp.sum(jnp.square(off_diagonal))
    coherence = jnp.max(jnp.abs(off_diagonal))

    zeros = jnp.count_nonzero(scaled_eigenvalues <= rounding * jnp.max(scaled_eigenvalues))
    rank = live - zeros.astype(jnp.int32)
    # By Gershgorin, k columns of unit length are independent if (k - 1) coherence < 1.
    others = jnp.arange(width, dtype=gram.dtype)
    independent = jnp.count_nonzero(others * coherence < 1 - rounding).astype(jnp.int32)
    return GramDiagnostics(
        dead_features=dead,
        condition_number=condition_number(eigenvalues),
        effective_rank=effective_rank(eigenvalues),
        scaled_condition_number=condition_number(scaled_eigenvalues),
        off_diagonal_mass=off_mass / (off_mass + jnp.maximum(live, 1).astype(gram.dtype)),
        coherence=coherence,
        restricted_isometry=coherence,
        kruskal_lower=jnp.minimum(independent, rank),
        kruskal_upper=rank,
    )


def correlation(gram: Array) -> Array:
    """D^-1/2 G D^-1/2 with D = diag(G); a dead feature has 1 on the diagonal, as under `normalize`.

    Such a row adds an eigenvalue 1, which leaves the extreme ones in their place, since the
    eigenvalues of the others have the mean 1.

    Example:
      >>> correlation(jnp.array([[4.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])).tolist()
      [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    diagonal = jnp.diagonal(gram)
    dead = diagonal == 0
    deviation = jnp.sqrt(jnp.where(dead, 1, diagonal))
    return gram / (deviation[:, None] * deviation[None, :]) + jnp.diag(dead.astype(gram.dtype))


def condition_number(eigenvalues: Array) -> Array:
    """Largest over smallest of a semidefinite matrix's eigenvalues, inf if singular to rounding.

    Args:
      eigenvalues: shape (in,). The smallest counts as zero if it is at most in * eps * largest.

    Example:
      >>> float(condition_number(jnp.array([1.0, 2.0]))), float(condition_number(jnp.zeros(2)))
      (2.0, inf)
    """
    smallest, largest = jnp.min(eigenvalues), jnp.max(eigenvalues)
    singular = smallest <= _rounding(eigenvalues) * largest
    return jnp.where(singular, jnp.inf, largest / smallest)


def effective_rank(eigenvalues: Array) -> Array:
    """exp(-sum p log p) with p the eigenvalues divided by their sum; 0 if all are zero.

    It is n for n equal eigenvalues, 1 for rank one, and between 1 and the rank otherwise. Negative
    eigenvalues, which are rounding errors, count as zero.

    References:
      Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.

    Example:
      >>> round(float(effective_rank(jnp.array([3.0, 3.0, 0.0]))), 3)
      2.0
    """
    positive = jnp.maximum(eigenvalues, 0)
    total = jnp.sum(positive)
    return jnp.where(total == 0, 0, jnp.exp(jnp.sum(entr(positive / total))))


def _rounding(x: Array) -> float:
    """The bound in * eps on the relative rounding error of sums over a row of the Gram."""
    return len(x) * float(jnp.finfo(x.dtype).eps)
