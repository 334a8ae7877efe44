"""Compares the layer solvers on real Grams: relative loss and seconds, in one run.

    python benchmarks/layers.py [--layers 0,15,29] [--calibration FILE] [--output FOLDER]

The model is SmolLM2-135M-Instruct, its Grams are those of the dense model on the calibration text.
Losses are tr((W - W0) G (W - W0)^T) / tr(W0 G W0^T) with G undamped. Every contender is compiled
first, by a call with one step; the time is that of `prox24.solve` after that, the median of three
where one takes less than two seconds. Writes layers.csv, one line per linear and contender, and
layers.png, the loss against the time as the budget of each solver grows: both relative to the
default solver and to SparseGPT, as geometric means over the linears.
"""

import csv
import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import (
    CONVERGED,
    add_output,
    dense_model,
    linears,
    medians,
    parser_of,
    plt,
    positive,
    save,
    show,
    timed,
    windows_of,
)

import prox24
from prox24 import ADMM, ConjugateGradients, LayerProblem, Prox, SparseGPT, Swaps, Wanda
from prox24.solvers.admm import Projection
from prox24.solvers.schedules import Adaptive, Cosine, Exponential, Linear


class Contender(NamedTuple):
    """A solver and a refit; contenders of one `curve` are one line of the figure."""

    solver: object
    refit: object
    curve: str = ""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Boza:
    """Boza's iteration as published: a tenth of the Gram's diagonal is added to the diagonal."""

    def __call__(self, problem: LayerProblem, pattern: prox24.Pattern, damping: jax.Array):
        gram = problem.gram + 0.1 * jnp.diag(jnp.diagonal(problem.gram))
        found = ADMM.boza()(problem._replace(gram=gram), pattern, jnp.zeros_like(damping))
        return found._replace(damping=damping)


DEFAULT = "admm with the prox"
REFERENCE = "sparsegpt"
PAPER = "prox, paper + 1,000 gradient steps"


def contenders() -> dict[str, Contender]:
    """Everything that is compared, by name."""
    grow = (1.2, 1.1, 1.02)
    stretched = {
        f"admm with the prox, {steps} steps": Contender(
            ADMM.in_steps(steps), ConjugateGradients(), curve="admm with the prox"
        )
        for steps in (8, 12, 48, 96)
    }
    projected = {
        f"admm, projection, {steps} steps": Contender(
            dataclasses.replace(ADMM.in_steps(steps), sparsify=Projection()),
            ConjugateGradients(),
            curve="admm, projection",
        )
        for steps in (12, 24, 96)
    }
    projected["admm, projection, no refit"] = Contender(ADMM(sparsify=Projection()), None)
    projected["admm, projection, scaling 0"] = Contender(
        ADMM(sparsify=Projection(), scaling=0.0), ConjugateGradients()
    )
    slower = {
        f"prox, growth {growth}": Contender(
            Prox(Exponential(0.01, growth)), ConjugateGradients(), curve="prox"
        )
        for growth in grow
    }
    return {
        "magnitude": Contender(prox24.Magnitude(), None),
        "magnitude + refit": Contender(prox24.Magnitude(), CONVERGED),
        "wanda": Contender(Wanda(), None),
        "wanda + refit": Contender(Wanda(), CONVERGED),
        REFERENCE: Contender(SparseGPT(), None, curve="sparsegpt, swaps"),
        "sparsegpt + refit": Contender(SparseGPT(), CONVERGED, curve="sparsegpt, swaps"),
        "sparsegpt + swaps": Contender(SparseGPT(), Swaps(), curve="sparsegpt, swaps"),
        "admm, Boza": Contender(Boza(), None),
        "admm, Boza + refit": Contender(Boza(), CONVERGED),
        "admm, ALPS": Contender(ADMM.alps(), ConjugateGradients(10)),
        "admm, ALPS + refit": Contender(ADMM.alps(), CONVERGED),
        DEFAULT: Contender(ADMM(), ConjugateGradients(), curve="admm with the prox"),
        f"{DEFAULT}, no refit": Contender(ADMM(), None),
        f"{DEFAULT} + swaps": Contender(ADMM(), Swaps()),
        f"{DEFAULT}, scaling 0": Contender(ADMM(scaling=0.0), ConjugateGradients()),
        "prox": Contender(Prox(), ConjugateGradients(), curve="prox"),
        "prox, no refit": Contender(Prox(), None),
        "prox, no momentum": Contender(Prox(momentum=0.0), ConjugateGradients()),
        "prox, restart": Contender(Prox(restart=True), ConjugateGradients()),
        "prox, per row": Contender(Prox(per_row=True), ConjugateGradients()),
        "prox, adaptive": Contender(Prox(Adaptive(0.01)), ConjugateGradients()),
        "prox, linear": Contender(Prox(Linear(0.01, 0.5)), ConjugateGradients()),
        "prox, cosine": Contender(Prox(Cosine(0.01, 200.0, 200.0)), ConjugateGradients()),
        PAPER: Contender(Prox.paper(), prox24.GradientSteps()),
        **stretched,
        **projected,
        **slower,
    }


def one_step(part: object) -> object:
    """The same compiled program, ended after a step."""
    fields = {"steps", "max_steps", "sweeps"}
    short = {f.name: 1 for f in dataclasses.fields(part) if f.name in fields} if part else {}
    return dataclasses.replace(part, **short) if short else part


def measure(contender: Contender, problem: LayerProblem) -> tuple[prox24.Solution, float]:
    """The solution, and the seconds that it takes once compiled."""
    jax.block_until_ready(
        prox24.solve(problem, one_step(contender.solver), one_step(contender.refit))
    )

    def solve() -> prox24.Solution:
        return prox24.solve(problem, contender.solver, contender.refit)

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
        seconds = sum(row["seconds"] for row in rows if row["contender"] == name)
        reference = sum(row["seconds"] for row in rows if row["contender"] == REFERENCE)
        lower = "" if name == DEFAULT else f"{np.mean(best < losses):.0%}"
        ratios = f"{mean_ratio(rows, 'loss', name, DEFAULT):.4f}", lower
        lines.append((name, *ratios, f"{seconds:.2f}", f"{seconds / reference:.1f}"))
    titles = "loss /\ndefault's", "default\nis lower", "seconds,\nall", "seconds /\nsparsegpt"
    show(("contender", *titles), lines, title=f"{len(best)} linears")


def draw(rows: list[dict], field: dict[str, Contender], path: Path) -> None:
    """Loss against time, one line per curve."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="tight")

    def point(name: str) -> tuple[float, float]:
        loss = 100 * (mean_ratio(rows, "loss", name, DEFAULT) - 1)
        return mean_ratio(rows, "seconds", name, REFERENCE), loss

    for curve in dict.fromkeys(c.curve for c in field.values() if c.curve):
        points = sorted(point(name) for name, c in field.items() if c.curve == curve)
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
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--samples", type=positive, default=64, help="windows of 512 tokens")
    parser.add_argument("--only", help="contenders, separated by semicolons")
    add_output(parser)
    arguments = parser.parse_args()
    field = contenders()
    if arguments.only:
        chosen = {DEFAULT, REFERENCE, *arguments.only.split(";")}
        field = {name: contender for name, contender in field.items() if name in chosen}
    layers = {int(layer) for layer in arguments.layers.split(",")}
    model = dense_model()
    windows = windows_of(model, arguments.calibration, arguments.samples, 512, spread=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    with (arguments.output / "layers.csv").open("w", newline="") as file:
        writer = None
        for layer, linear, problem in linears(model, layers, windows):
            for name, contender in field.items():
                solution, seconds = measure(contender, problem)
                figures = solution.statistics
                row = {
                    "layer": layer,
                    "linear": linear,
                    "out": problem.weight.shape[0],
                    "in": problem.weight.shape[1],
                    "contender": name,
                    "loss_before_refit": figures.relative_loss_before_refit,
                    "loss": figures.relative_loss,
                    "seconds": seconds,
                    "status": solution.status.value,
                    "steps": figures.steps,
                    "refit_steps": figures.refit_steps,
                }
                if writer is None:
                    writer = csv.DictWriter(file, row)
                    writer.writeheader()
                writer.writerow(row)
                file.flush()
                rows.append(row)
    summary(rows)
    if not arguments.only:
        draw(rows, field, arguments.output / "layers.png")


if __name__ == "__main__":
    main()
