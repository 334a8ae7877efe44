"""How far the masks of each method are from the best ones, as features become correlated.

The linear has random rows of width 12. Its features have correlation rho. Each method finds a mask,
and the same conjugate gradients refit the kept weights. The regret of a row is its loss, divided by
the least loss of all 216 masks, minus 1. The table has the mean over 256 rows.

- Without correlation, all methods but ADMM find the best mask.
- With correlation, Wanda and SparseGPT lose. The prox and ADMM stay near the best mask.
- At rho = 0.99 the schedule of the prox costs most. Its penalty grows by 1.05 per step. With 1.01
  ("prox, slower") the prox loses less than half as much.
- ADMM is the default of `prox24.solve`, with 20 steps. At high correlation it beats the prox. At
  low correlation it is mostly behind.

Equicorrelated features have the Gram (1 - rho) I + rho 11^T. Toeplitz features have the Gram
rho^|i-j|. The diagonal is 1, so Wanda and magnitude choose the same mask. Losses are computed in
float64. The damping is 0, so the losses of all methods are of the same problem.
"""

import argparse
import itertools
from pathlib import Path

import jax
import matplotlib
import numpy as np

import prox24

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIGURE = Path(__file__).parents[1] / "docs/figures/correlated_regression.svg"
ROWS, WIDTH = 256, 12
CORRELATIONS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99)
GRAMS = {
    "equicorrelated": lambda rho: (1 - rho) * np.eye(WIDTH) + rho,
    "Toeplitz": lambda rho: rho ** np.abs(np.subtract.outer(np.arange(WIDTH), np.arange(WIDTH))),
}
SOLVERS = {
    "wanda": prox24.Wanda(),
    "SparseGPT": prox24.SparseGPT(),
    "prox": prox24.ProximalGradient(),
    "prox, slower": prox24.ProximalGradient(prox24.Exponential(0.01, 1.01)),
    "ADMM": prox24.ADMM(),
}


def best_losses(weight, gram):
    """The least loss of each row over all 2:4 masks, in float64, shape (out,).

    If the entries P of a row w are pruned and the others refitted, the loss that remains is
    w_P^T ((G^-1)_PP)^-1 w_P.
    """
    inverse = np.linalg.inv(gram)
    pairs = tuple(itertools.combinations(range(4), 2))
    losses = []
    for choice in itertools.product(pairs, repeat=weight.shape[1] // 4):
        pruned = [4 * block + i for block, pair in enumerate(choice) for i in pair]
        remaining = np.linalg.inv(inverse[np.ix_(pruned, pruned)])
        losses.append(np.sum(weight[:, pruned] @ remaining * weight[:, pruned], axis=1))
    return np.min(losses, axis=0)


def losses_of(solver, weight, gram):
    """The loss of each row after the solver and the refit, in float64, shape (out,)."""
    solution = prox24.solve(weight, gram, solver, damping=0.0)
    assert solution.status is prox24.Status.SPARSE
    difference = np.asarray(solution.weight) - weight
    return np.sum(difference @ gram * difference, axis=1)


def mean_regrets(gram):
    """The mean over rows of loss / best loss - 1, for each solver."""
    weight = np.random.default_rng(0).normal(size=(ROWS, WIDTH))
    best = best_losses(weight, gram)
    return [np.mean(losses_of(solver, weight, gram) / best - 1) for solver in SOLVERS.values()]


def main():
    """Prints the regrets in percent and writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=FIGURE, help="where the figure is written")
    output = parser.parse_args().output

    jax.config.update("jax_enable_x64", True)
    matplotlib.rcParams["svg.hashsalt"] = "prox24"  # the same file from every run
    figure, panels = plt.subplots(len(GRAMS), figsize=(5, 7), sharex=True, layout="tight")
    print("mean regret in percent")
    print(f"{'features':14}  {'rho':>4}  {'  '.join(f'{name:>12}' for name in SOLVERS)}")
    for axes, (features, gram) in zip(panels, GRAMS.items(), strict=True):
        regrets = 100 * np.array([mean_regrets(gram(rho)) for rho in CORRELATIONS])
        for rho, row in zip(CORRELATIONS, regrets, strict=True):
            print(f"{features:14}  {rho:4.2f}  {'  '.join(f'{regret:12.3f}' for regret in row)}")
        axes.plot(CORRELATIONS, regrets, marker="o", markersize=4, label=list(SOLVERS))
        axes.set_title(f"{features} features", fontsize=10)
        axes.set_ylabel("mean regret (%)")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(r"correlation $\rho$ (no units)")
    panels[0].legend(frameon=False)
    figure.savefig(output, metadata={"Date": None})


if __name__ == "__main__":
    main()
