"""`prox24.proximal_gradient` beside scikit-learn: objectives, iterations, seconds.

    python benchmarks/descent.py

The lasso and L1 logistic regression, in float64, on correlated random features. An objective is
given relative to the lower one of its problem. Seconds of prox24 are those of a second call.
"""

import time
from collections.abc import Callable

import common
import jax
import jax.numpy as jnp
import numpy as np
from common import positive
from sklearn.linear_model import Lasso, LogisticRegression

import prox24

Solve = Callable[[], tuple[np.ndarray, int]]


def soft(w, lam, scaling):
    return jnp.sign(w) * jnp.maximum(jnp.abs(w) - lam * scaling, 0)


def problems(rows: int, columns: int) -> dict[str, tuple[Callable, float, Solve]]:
    """By name the smooth function, the weight of the L1 norm, and scikit-learn's solution."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, columns)) + 0.5 * rng.normal(size=(rows, 1))
    true = rng.normal(size=columns) * (rng.random(columns) < 0.1)
    y = x @ true + rng.normal(size=rows)
    labels = (y > 0).astype(float)

    def lasso() -> tuple[np.ndarray, int]:
        model = Lasso(alpha=0.1, fit_intercept=False, tol=1e-10, max_iter=100_000).fit(x, y)
        return model.coef_, model.n_iter_

    def logistic() -> tuple[np.ndarray, int]:
        model = LogisticRegression(
            l1_ratio=1,
            C=100 / rows,
            fit_intercept=False,
            solver="liblinear",
            tol=1e-6,
            max_iter=1000,
        ).fit(x, labels)
        return model.coef_[0], model.n_iter_[0]

    return {
        "lasso": (lambda w: jnp.sum((x @ w - y) ** 2) / (2 * rows), 0.1, lasso),
        "logistic": (
            lambda w: jnp.mean(jnp.logaddexp(0, x @ w) - labels * (x @ w)),
            0.01,
            logistic,
        ),
    }


def measure(rows: int, columns: int) -> list[list[str]]:
    """The rows of the table."""
    table = []
    for name, (fun, lam, rival) in problems(rows, columns).items():

        @jax.jit
        def descend(start, fun=fun, lam=lam):
            return prox24.proximal_gradient(fun, start, soft, lam, tolerance=1e-8, max_steps=20_000)

        def ours(descend=descend) -> tuple[np.ndarray, int]:
            found = descend(jnp.zeros(columns))
            return np.asarray(found.params), int(found.steps)

        ours()
        found = {}
        for who, solve in (("prox24", ours), ("scikit-learn", rival)):
            began = time.perf_counter()
            w, steps = solve()
            seconds = time.perf_counter() - began
            found[who] = float(fun(w) + lam * np.abs(w).sum()), steps, seconds
        least = min(objective for objective, *_ in found.values())
        table += [
            [name, who, f"{objective / least - 1:.1e}", str(steps), f"{seconds:.3f}"]
            for who, (objective, steps, seconds) in found.items()
        ]
    return table


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--rows", type=positive, default=2000)
    parser.add_argument("--columns", type=positive, default=500)
    arguments = parser.parse_args()
    with jax.enable_x64(True):
        table = measure(arguments.rows, arguments.columns)
    common.show(("problem", "by", "objective", "iterations", "seconds"), table, left=2)
    print(common.environment())


if __name__ == "__main__":
    main()
