"""Prunes one linear to 2:4 by every solver.

The loss is the squared error of the outputs, divided by the squared outputs. The weights are
random. The inputs are correlated: the strength of the features falls like a power law.

- "loss": after the solver. Magnitude and Wanda do not change the kept weights.
- "refitted": after the refit, which minimises the loss over the kept weights.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import prox24

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIGURE = Path(__file__).parents[1] / "docs/figures/prune_a_layer.svg"
OUT, IN, TOKENS = 256, 512, 4096

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output", type=Path, default=FIGURE, help="where the figure is written")
output = parser.parse_args().output

weight_key, token_key, mixing_key = jax.random.split(jax.random.key(0), 3)
weight = jax.random.normal(weight_key, (OUT, IN))
strength = 1 / jnp.sqrt(1 + jnp.arange(IN, dtype=jnp.float32))
mixing = jnp.linalg.qr(jax.random.normal(mixing_key, (IN, IN)))[0]
tokens = (jax.random.normal(token_key, (TOKENS, IN)) * strength[None, :]) @ mixing
# Accelerators round more than float32 does, unless they are told not to.
gram = jnp.matmul(tokens.T, tokens, precision="highest")

losses = {}
for solver in (
    prox24.Magnitude(),
    prox24.Wanda(),
    prox24.SparseGPT(),
    prox24.ProximalGradient(),
    prox24.ADMM(),
):
    solution = prox24.solve(weight, gram, solver)
    figures = solution.statistics
    assert prox24.is_sparse(solution.weight)
    losses[type(solver).__name__] = figures.relative_loss_before_refit, figures.relative_loss
    print(
        f"{type(solver).__name__:16} {solution.status.name.lower():8} "
        f"loss {figures.relative_loss_before_refit:.4f}, refitted {figures.relative_loss:.4f}"
    )

matplotlib.rcParams["svg.hashsalt"] = "prox24"  # the same file from every run
figure, axes = plt.subplots(figsize=(5, 3.2), layout="tight")
places = np.arange(len(losses))
before, after = np.transpose(list(losses.values()))
axes.barh(places - 0.2, before, 0.4, label="before the refit")
axes.barh(places + 0.2, after, 0.4, label="after the refit")
axes.set_yticks(places, losses)
axes.invert_yaxis()
axes.set_xlabel("relative loss (no units)")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False)
figure.savefig(output, metadata={"Date": None})
