"""`prox24.proximal_gradient` beside scikit-learn: objectives, iterations, seconds.

    python benchmarks/descent.py

The lasso and L1 logistic regression, in float64, on correlated random features. An objective is
given relative to the lower one of its problem. Seconds of prox24 are those of a second call.
"""

import functools
from collections.abc import Callable

import common
import jax
import jax.numpy as jnp
import numpy as np
from common import positive
from sklearn.linear_model import Lasso, LogisticRegression

import prox24


def soft(w, lam, scaling):
    return jnp.sign(w) * jnp.maximum(jnp.abs(w) - lam * scaling, 0)


def descend(fun: Callable[..., jax.Array], start: jax.Array, lam: float) -> prox24.Descended:
    return prox24.proximal_gradient(fun, start, soft, lam, tolerance=1e-8, max_steps=20_000)


def measure(rows: int, columns: int) -> list[list[str]]:
    """The rows of the table."""
    rng, table = np.random.default_rng(0), []
    x = rng.normal(size=(rows, columns)) + 0.5 * rng.normal(size=(rows, 1))
    true = rng.normal(size=columns) * (rng.random(columns) < 0.1)
    y = x @ true + rng.normal(size=rows)
    labels, start = (y > 0).astype(float), jnp.zeros(columns)

    def squares(w: jax.Array) -> jax.Array:
        return jnp.sum((x @ w - y) ** 2) / (2 * rows)

    def logistic(w: jax.Array) -> jax.Array:
        return jnp.mean(jnp.logaddexp(0, x @ w) - labels * (x @ w))

    lasso = Lasso(alpha=0.1, fit_intercept=False, tol=1e-10, max_iter=100_000)
    given = {"fit_intercept": False, "solver": "liblinear", "tol": 1e-6, "max_iter": 1000}
    regression = LogisticRegression(l1_ratio=1, C=100 / rows, **given)
    for name, fun, lam, rival, targets in (
        ("lasso", squares, 0.1, lasso, y),
        ("logistic", logistic, 0.01, regression, labels),
    ):
        ours = functools.partial(jax.jit(functools.partial(descend, fun, lam=lam)), start)
        ours()
        seconds, descended = common.timed(ours)
        fit_seconds, fitted = common.timed(functools.partial(rival.fit, x, targets))
        found = [
            ("prox24", descended.params, descended.steps, seconds),
            ("scikit-learn", fitted.coef_.ravel(), np.max(fitted.n_iter_), fit_seconds),
        ]
        objectives = [float(fun(w) + lam * np.abs(w).sum()) for _, w, *_ in found]
        for (who, _, steps, took), objective in zip(found, objectives, strict=True):
            excess = objective / min(objectives) - 1
            table.append([name, who, f"{excess:.1e}", str(int(steps)), f"{took:.3f}"])
    return table


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--rows", type=positive, default=2000)
    parser.add_argument("--columns", type=positive, default=500)
    arguments = parser.parse_args()
    with jax.enable_x64(True):
        table = measure(arguments.rows, arguments.columns)
    common.show(("problem", "by", "objective", "iterations", "seconds"), table)
    print(common.environment())


if __name__ == "__main__":
    main()
