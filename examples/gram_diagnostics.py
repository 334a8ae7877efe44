"""Measures how correlated the inputs of a model's linears are, before anything is pruned.

For each input of each layer it prints four quantities of the Gram G = X^T X, X being the tokens x
features. C is G scaled to a unit diagonal: C_ij is the cosine of the angle between features i and
j. Dead features are zero in every token, and are left out of C.

    condition       largest over smallest eigenvalue of C, a bound on Wanda's loss over the least
                    loss of the same pattern; inf where C is singular to rounding
    effective rank  exp of the entropy of G's eigenvalues: the directions that carry the inputs
    off diagonal    share of the squares of C off its diagonal; 0 where Wanda is optimal
    coherence       largest |C_ij| off the diagonal

The layers stay dense, so from the second layer on `prox24 prune` sees other Grams.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np

import prox24
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._jobs.native import native_runner
from prox24._jobs.text import calibration_windows

matplotlib.use("Agg")
import matplotlib.pyplot as plt

QUANTITIES = ("condition", "effective rank", "off diagonal", "coherence")


def diagnose(gram):
    """The four quantities and the number of dead features of a Gram (in, in).

    An eigenvalue of at most in * eps times the largest counts as zero; eps is that of the Gram's
    dtype.

    References:
      Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    rounding = len(gram) * np.finfo(gram.dtype).eps
    gram = np.asarray(gram, np.float64)
    live = np.diagonal(gram) > 0
    dead = int(np.sum(~live))
    if not live.any():
        return dict.fromkeys(QUANTITIES, 0.0) | {"dead": dead}
    norms = np.sqrt(np.diagonal(gram)[live])
    cosines = gram[np.ix_(live, live)] / np.outer(norms, norms)
    eigenvalues = np.linalg.eigvalsh(cosines)
    smallest, largest = eigenvalues[0], eigenvalues[-1]
    off = cosines - np.diag(np.diagonal(cosines))
    shares = np.maximum(np.linalg.eigvalsh(gram), 0)
    shares = shares[shares > 0] / np.sum(shares)
    return {
        "condition": np.inf if smallest <= rounding * largest else largest / smallest,
        "effective rank": np.exp(-np.sum(shares * np.log(shares))),
        "off diagonal": np.sum(off**2) / np.sum(cosines**2),
        "coherence": np.abs(off).max(),
        "dead": dead,
    }


def diagnose_model(path, text):
    """Yields the layer, the input and the quantities of each Gram of a dense model."""
    checkpoint = open_checkpoint(path)
    windows = calibration_windows(checkpoint, text)
    runner = native_runner(checkpoint, windows, prox24.Recipe())
    _, state = runner.enter(dense=False)
    for layer in range(runner.stages):
        weights = runner.weights(layer)
        names = dict.fromkeys(linear.input for linear in runner.linears(layer))
        inputs, state = runner.observe(layer, weights, state, names)
        for name in names:
            (found,) = inputs[name]
            yield layer, name, diagnose(np.asarray(found.gram))
        state = runner.advance(layer, weights, state)


def draw(rows, output):
    """One panel for each quantity over the layers, a line for each input."""
    matplotlib.rcParams["svg.hashsalt"] = "prox24"  # the same file from every run
    figure, panels = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained", sharex=True)
    for axes, quantity in zip(panels.flat, QUANTITIES, strict=True):
        for name in dict.fromkeys(name for _, name, _ in rows):
            layers, values = zip(*((i, q[quantity]) for i, n, q in rows if n == name), strict=True)
            axes.plot(layers, values, ".-", label=name)
        axes.set_title(quantity, fontsize=10)
        axes.set_yscale("log" if quantity == "condition" else "linear")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[1]:
        axes.set_xlabel("layer")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(output, metadata={"Date": None})


def main():
    """Prints the table, and writes the figure where one is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="as the commands of prox24 take it")
    parser.add_argument("--calibration", type=Path, help="UTF-8 text (packaged speeches)")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--output", type=Path, help="where the figure is written (nowhere)")
    arguments = parser.parse_args()
    text = prox24.Text(arguments.calibration, arguments.samples, arguments.sequence_length)
    print(f"{'layer':>5}  {'input':18}" + "".join(f"{q:>16}" for q in (*QUANTITIES, "dead")))
    rows = []
    for index, name, found in diagnose_model(arguments.model, text):
        rows.append((index, name, found))
        print(f"{index:5}  {name:18}" + "".join(f"{value:16.4g}" for value in found.values()))
    off_diagonal = [found["off diagonal"] for _, _, found in rows]
    print(
        f"{np.mean(off_diagonal):.1%} of the squared cosines are off the diagonal on average, "
        f"from {min(off_diagonal):.1%} to {max(off_diagonal):.1%}"
    )
    if arguments.output is not None:
        draw(rows, arguments.output)


if __name__ == "__main__":
    main()
