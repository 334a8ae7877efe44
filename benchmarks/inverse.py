"""Times the inverse of a Gram by sweeps against factorizations, and gives the errors.

    python benchmarks/inverse.py [--widths 576 1536 4096] [--repetitions N]

The Gram is that of random tokens, scaled to a unit diagonal, plus 0.7 on it, in float32. Times are
medians; all contenders run once in each repetition. One product of the Gram with itself is the unit
that the solvers count in. The error is the largest of |A X - I|.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from rich.console import Console
from rich.table import Table

from prox24.core.precision import PRECISION
from prox24.solvers.damping import inverse

PRODUCT, EIGENVECTORS = "product", "eigenvectors"


def product(matrix: Array) -> Array:
    """One product of the size of the inverse."""
    return jnp.matmul(matrix, matrix, precision=PRECISION)


def by_cholesky(matrix: Array) -> Array:
    """A factorization and two triangular solves."""
    factor = lax.linalg.cholesky(matrix, symmetrize_input=False)
    return jax.scipy.linalg.cho_solve((factor, True), jnp.eye(len(matrix), dtype=matrix.dtype))


CONTENDERS: dict[str, Callable[[Array], Array]] = {
    PRODUCT: product,
    "sweeps": inverse,
    "Cholesky": by_cholesky,
    "LU": jnp.linalg.inv,
    EIGENVECTORS: lambda matrix: jnp.linalg.eigh(matrix)[1],
}


def random_gram(width: int) -> Array:
    """Of twice as many tokens as features."""
    tokens = np.random.default_rng(0).standard_normal((2 * width, width), np.float32)
    tokens /= np.linalg.norm(tokens, axis=0)
    return jnp.asarray(tokens.T @ tokens + 0.7 * np.eye(width, dtype=np.float32))


def measure(width: int, repetitions: int) -> dict[str, tuple[float, float | None]]:
    """Seconds of each contender, and the error of those that invert."""
    gram = random_gram(width)
    programs = {name: jax.jit(run) for name, run in CONTENDERS.items()}
    results = {name: jax.block_until_ready(run(gram)) for name, run in programs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repetitions):
        for name, run in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(run(gram))
            seconds[name].append(time.perf_counter() - began)
    identity = np.eye(width)
    errors = {
        name: float(np.abs(np.asarray(gram, np.float64) @ np.asarray(result) - identity).max())
        for name, result in results.items()
        if name not in (PRODUCT, EIGENVECTORS)
    }
    return {name: (statistics.median(seconds[name]), errors.get(name)) for name in programs}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 1536, 4096])
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    if min(*arguments.widths, arguments.repetitions) < 1:
        parser.error("--widths and --repetitions are positive")
    table = Table(title=f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    table.add_column("")
    for title in ("width", "seconds", "/ product", "error"):
        table.add_column(title, justify="right")
    for width in arguments.widths:
        rows = measure(width, arguments.repetitions)
        for name, (seconds, error) in rows.items():
            ratio = f"{seconds / rows[PRODUCT][0]:.2f}"
            said = "" if error is None else f"{error:.1e}"
            table.add_row(name, str(width), f"{seconds:.4f}", ratio, said)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
