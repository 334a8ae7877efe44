"""How the entries of a block leave under the proximal operator, one after the other.

The script follows the minimiser prox_{lam R}(y) on one block of four. lam grows from 0 until two
entries are left.

- Distinct entries shrink to zero one after the other.
- Nearly equal entries leave before they reach zero, and the other entries jump up. The objective
  has two minima there, and the deeper one changes.
- Equal entries go from three to two at lam = (1 + sqrt 2) / 2.

y1 is the largest entry. lam is in units of 1 / y1. The jump is the largest change of an entry, in
units of y1.
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

FIGURE = Path(__file__).parents[1] / "docs/figures/prox_path.svg"
BLOCKS = {
    "distinct": (1.0, 0.8, 0.6, 0.4),
    "nearly equal": (1.0, 0.95, 0.9, 0.85),
    "equal": (1.0, 1.0, 1.0, 1.0),
}
STEP = 1e-5
PENALTIES = np.arange(0, 1.4, STEP)


def path_of(block):
    """The minimiser for each of the penalties, shape (penalties, 4)."""
    return np.asarray(jax.vmap(prox24.prox, in_axes=(None, 0))(jnp.array(block), PENALTIES))


def switches_of(path):
    """Indices of the last penalties before the number of nonzeros changes."""
    return np.flatnonzero(np.diff(np.count_nonzero(path, axis=1)))


def print_switches(name, path):
    """Prints one line for each switch of the path."""
    for i in switches_of(path):
        before, after = path[i : i + 2]
        nonzeros = f"{np.count_nonzero(before)} to {np.count_nonzero(after)}"
        jump = np.abs(after - before).max()
        print(f"{name:12}  {PENALTIES[i] + STEP / 2:6.4f}  {nonzeros:>8}  {jump:6.3f}")


def draw(axes, name, path):
    """Draws the four entries of the path and a dashed line at each switch."""
    switches = switches_of(path)
    # Few points keep the file small; those on either side of a switch keep its jump vertical.
    shown = np.union1d(np.arange(0, len(path), 500), [switches, switches + 1])
    for i in range(4):
        # Later lines are thinner, so that equal entries can be seen on top of one another.
        axes.plot(PENALTIES[shown], path[shown, i], linewidth=4 - i, label=f"$w_{i + 1}$")
    for penalty in PENALTIES[switches]:
        axes.axvline(penalty, color="0.5", linestyle="--", linewidth=1, zorder=0)
    axes.set_title(f"{name}: {BLOCKS[name]}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def main():
    """Prints the switches of every block and writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=FIGURE, help="where the figure is written")
    output = parser.parse_args().output

    jax.config.update("jax_enable_x64", True)
    matplotlib.rcParams["svg.hashsalt"] = "prox24"  # the same file from every run
    figure, panels = plt.subplots(len(BLOCKS), figsize=(5, 8), sharex=True, layout="tight")
    print(f"{'block':12}  {'lam':>6}  nonzeros  {'jump':>6}")
    for axes, (name, block) in zip(panels, BLOCKS.items(), strict=True):
        path = path_of(block)
        print_switches(name, path)
        draw(axes, name, path)
    panels[1].set_ylabel("entries of the minimiser (in units of $y_1$)")
    panels[-1].set_xlabel(r"$\lambda$ (in units of $1 / y_1$)")
    panels[0].legend(frameon=False)
    figure.savefig(output, metadata={"Date": None})


if __name__ == "__main__":
    main()
