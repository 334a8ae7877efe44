"""Times the inverse of a Gram by sweeps against factorizations, and gives the errors.

    python benchmarks/inverse.py [--widths 576 1536 4096] [--repetitions N]

The Gram is that of random tokens, scaled to a unit diagonal, plus 0.7 on it, in float32. Times are
medians, in seconds and in products of the Gram with itself. The error is the largest of |A X - I|.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from common import environment, medians, parser_of, positive, show
from jax import Array, lax

from prox24._core.precision import PRECISION
from prox24._solvers.damping import inverse


def product(matrix: Array) -> Array:
    return jnp.matmul(matrix, matrix, precision=PRECISION)


def by_cholesky(matrix: Array) -> Array:
    """A factorization and two triangular solves."""
    factor = lax.linalg.cholesky(matrix, symmetrize_input=False)
    return jax.scipy.linalg.cho_solve((factor, True), jnp.eye(len(matrix), dtype=matrix.dtype))


INVERSES = {"sweeps": inverse, "Cholesky": by_cholesky, "LU": jnp.linalg.inv}
CONTENDERS = {
    "product": product,
    **INVERSES,
    "eigenvectors": lambda matrix: jnp.linalg.eigh(matrix)[1],
}


def random_gram(width: int) -> Array:
    """Of twice as many tokens as features."""
    tokens = np.random.default_rng(0).standard_normal((2 * width, width), np.float32)
    tokens /= np.linalg.norm(tokens, axis=0)
    return jnp.asarray(tokens.T @ tokens + 0.7 * np.eye(width, dtype=np.float32))


def measure(width: int, repetitions: int) -> list[tuple[str, ...]]:
    """A line of the table for each contender."""
    gram = random_gram(width)
    programs = {name: functools.partial(jax.jit(run), gram) for name, run in CONTENDERS.items()}
    results = {name: np.asarray(run()) for name, run in programs.items()}
    seconds, rows = medians(programs, repetitions), []
    for name, result in results.items():
        error = np.abs(np.asarray(gram, np.float64) @ result - np.eye(width)).max()
        ratio = seconds[name] / seconds["product"]
        cells = str(width), f"{seconds[name]:.4f}", f"{ratio:.2f}"
        rows.append((name, *cells, f"{error:.1e}" if name in INVERSES else ""))
    return rows


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--widths", type=positive, nargs="+", default=[576, 1536, 4096])
    parser.add_argument("--repetitions", type=positive, default=5)
    arguments = parser.parse_args()
    rows = [row for width in arguments.widths for row in measure(width, arguments.repetitions)]
    show(("", "width", "seconds", "/ product", "error"), rows, title=environment())


if __name__ == "__main__":
    main()
