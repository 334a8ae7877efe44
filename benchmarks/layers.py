"""Compares the layer solvers on real Grams: relative loss and seconds, in one run.

    python benchmarks/layers.py [--layers 0,15,29] [--calibration FILE] [--output FOLDER]

The Grams are from the dense SmolLM2-135M-Instruct on the calibration text. Losses are tr((W - W0) G
(W - W0)^T) / tr(W0 G W0^T) with G undamped. A call with one step compiles each contender. Then
`prox24.solve` is timed. If it takes less than two seconds, the figure is the median of three calls.
layers.csv has a line for each linear and contender. layers.png shows loss against time for growing
budgets. Both are relative to the default solver and to SparseGPT, and are geometric means over the
linears.
"""

import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from baselines import ALPS, Boza
from common import (
    CONVERGED,
    add_calibration,
    add_output,
    dense_model,
    medians,
    own_targets,
    parser_of,
    plt,
    positive,
    save,
    show,
    timed,
    write_rows,
)

import prox24
from prox24 import ADMM, ConjugateGradients, LayerProblem, ProximalGradient, Recipe, Swaps
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._jobs.native import native_runner
from prox24._jobs.text import calibration_windows

DEFAULT = "admm with the prox"
REFERENCE = "sparsegpt"
PAPER = "prox, paper + 1,000 gradient steps"


def contenders() -> dict[str, Recipe]:
    """Solvers and refits by name; those with a number of steps or a growth make a curve."""
    refit = ConjugateGradients()
    found = {
        "magnitude": Recipe.magnitude(),
        "magnitude + refit": own_targets(prox24.Magnitude(), CONVERGED),
        "wanda": Recipe.wanda(),
        "wanda + refit": own_targets(prox24.Wanda(), CONVERGED),
        REFERENCE: Recipe.sparsegpt(),
        "sparsegpt + refit": own_targets(prox24.SparseGPT(), CONVERGED),
        "sparsegpt + swaps": own_targets(prox24.SparseGPT(), Swaps()),
        "admm, Boza": own_targets(Boza()),
        "admm, Boza + refit": own_targets(Boza(), CONVERGED),
        "admm, ALPS": own_targets(ALPS(), ConjugateGradients(10)),
        "admm, ALPS + refit": own_targets(ALPS(), CONVERGED),
        DEFAULT: own_targets(ADMM(), refit),
        f"{DEFAULT}, longer refit": own_targets(ADMM(), CONVERGED),
        f"{DEFAULT}, no refit": own_targets(ADMM()),
        f"{DEFAULT} + swaps": own_targets(ADMM(), Swaps()),
        f"{DEFAULT}, scaling 0": own_targets(ADMM(scaling=0.0), refit),
        "prox": own_targets(ProximalGradient(), refit),
        "prox, no refit": own_targets(ProximalGradient()),
        "prox, no momentum": own_targets(ProximalGradient(momentum=0.0), refit),
        PAPER: Recipe.paper(),
    }
    for steps in (8, 12, 48, 96):
        found[f"{DEFAULT}, {steps} steps"] = own_targets(ADMM.in_steps(steps), refit)
    for steps in (12, 20, 96):
        projecting = dataclasses.replace(ADMM.in_steps(steps), penalty=None)
        found[f"admm, projection, {steps} steps"] = own_targets(projecting, refit)
    found["admm, projection, no refit"] = own_targets(ADMM(penalty=None))
    found["admm, projection, scaling 0"] = own_targets(ADMM(penalty=None, scaling=0.0), refit)
    for growth in (1.2, 1.1, 1.02):
        slower = ProximalGradient(prox24.Exponential(0.01, growth))
        found[f"prox, growth {growth}"] = own_targets(slower, refit)
    return found


CURVES = {
    "sparsegpt, swaps": [REFERENCE, "sparsegpt + refit", "sparsegpt + swaps"],
    DEFAULT: [DEFAULT, *(f"{DEFAULT}, {steps} steps" for steps in (8, 12, 48, 96))],
    "prox": ["prox", *(f"prox, growth {growth}" for growth in (1.2, 1.1, 1.02))],
    "admm, projection": [f"admm, projection, {steps} steps" for steps in (12, 20, 96)],
}
"""The lines of the figure."""


def linears(
    model: Path, layers: Collection[int], text: prox24.Text
) -> Iterator[tuple[int, str, LayerProblem]]:
    """The linears of some layers with their Grams in the dense model."""
    checkpoint = open_checkpoint(model)
    runner = native_runner(checkpoint, calibration_windows(checkpoint, text), Recipe.wanda())
    _, state = runner.enter(dense=False)
    for index in range(max(layers) + 1):
        weights = runner.weights(index)
        chosen = runner.linears(index) if index in layers else []
        inputs, state = runner.observe(index, weights, state, {linear.input for linear in chosen})
        for linear in chosen:
            weight = weights[linear.tensor].astype(jnp.float32)
            name = linear.tensor.split(f".{index}.")[1].removesuffix(".weight")
            yield index, name, LayerProblem(weight, inputs[linear.input][0].gram)
        state = runner.advance(index, weights, state)


def one_step(part: object) -> object:
    """The same compiled program, ended after a step."""
    fields = {"steps", "max_steps", "sweeps"}
    short = {f.name: 1 for f in dataclasses.fields(part) if f.name in fields} if part else {}
    return dataclasses.replace(part, **short) if short else part


def measure(recipe: Recipe, problem: LayerProblem) -> tuple[prox24.Solution, float]:
    """The solution, and the seconds of a solve without its compilation."""
    short = one_step(recipe.solver), one_step(recipe.refit)
    jax.block_until_ready(prox24.solve(*problem, *short))

    def solve() -> prox24.Solution:
        return prox24.solve(*problem, recipe.solver, recipe.refit)

    seconds, solution = timed(solve)
    return solution, seconds if seconds > 2 else medians({"": solve}, 3)[""]


def mean_ratio(rows: list[dict], field: str, name: str, reference: str) -> float:
    """The geometric mean over the linears of a figure of one contender over another's."""
    values = [[row[field] for row in rows if row["contender"] == one] for one in (name, reference)]
    return float(np.exp(np.mean(np.subtract(*np.log(values)))))


def summary(rows: list[dict]) -> None:
    """Prints one line per contender."""
    lines = []
    best = np.array([row["loss"] for row in rows if row["contender"] == DEFAULT])
    for name in dict.fromkeys(row["contender"] for row in rows):
        losses = np.array([row["loss"] for row in rows if row["contender"] == name])
        seconds, reference = (
            sum(row["seconds"] for row in rows if row["contender"] == one)
            for one in (name, REFERENCE)
        )
        lower = "" if name == DEFAULT else f"{np.mean(best < losses):.0%}"
        ratios = f"{mean_ratio(rows, 'loss', name, DEFAULT):.4f}", lower
        lines.append((name, *ratios, f"{seconds:.2f}", f"{seconds / reference:.1f}"))
    titles = "loss /\ndefault's", "default\nis lower", "seconds,\nall", "seconds /\nsparsegpt"
    show(("contender", *titles), lines, title=f"{len(best)} linears")


def draw(rows: list[dict], path: Path) -> None:
    """Loss against time."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="tight")

    def point(name: str) -> tuple[float, float]:
        loss = 100 * (mean_ratio(rows, "loss", name, DEFAULT) - 1)
        return mean_ratio(rows, "seconds", name, REFERENCE), loss

    for curve, names in CURVES.items():
        points = sorted(map(point, names))
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=curve)
    for name in ("admm, ALPS + refit", "admm, Boza + refit", PAPER):
        axes.plot(*point(name), marker="s", linestyle="none", label=name)
    axes.set_xscale("log")
    axes.set_xlabel("time / time of SparseGPT")
    axes.set_ylabel("loss above the default's (%)")
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--layers", default="0,15,29", help="comma-separated")
    add_calibration(parser)
    parser.add_argument("--samples", type=positive, default=64, help="windows of 512 tokens")
    parser.add_argument("--only", help="contenders, separated by semicolons")
    add_output(parser)
    arguments = parser.parse_args()
    field = contenders()
    if arguments.only:
        chosen = {DEFAULT, REFERENCE, *arguments.only.split(";")}
        field = {name: recipe for name, recipe in field.items() if name in chosen}
    layers = {int(layer) for layer in arguments.layers.split(",")}
    text = prox24.Text(arguments.calibration, arguments.samples)
    rows = []
    for layer, linear, problem in linears(dense_model(), layers, text):
        for name, recipe in field.items():
            solution, seconds = measure(recipe, problem)
            figures = solution.statistics
            rows.append(
                {
                    "layer": layer,
                    "linear": linear,
                    "out": problem.weight.shape[0],
                    "in": problem.weight.shape[1],
                    "contender": name,
                    "loss_before_refit": figures.relative_loss_before_refit,
                    "loss": figures.relative_loss,
                    "seconds": seconds,
                    "status": solution.status.name.lower(),
                    "steps": figures.steps,
                    "refit_steps": figures.refit_steps,
                }
            )
        write_rows(arguments.output / "layers.csv", rows)
    summary(rows)
    if not arguments.only:
        draw(rows, arguments.output / "layers.png")


if __name__ == "__main__":
    main()
