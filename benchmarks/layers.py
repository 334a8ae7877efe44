"""Compares the layer solvers on real Grams: relative loss and seconds, in one run.

    python benchmarks/layers.py [--layers 0,15,29] [--calibration FILE] [--output FOLDER]

The model is SmolLM2-135M-Instruct, its Grams are those of the dense model on the calibration text.
Losses are tr((W - W0) G (W - W0)^T) / tr(W0 G W0^T) with G undamped. Every contender is compiled
first, by a call with one step; the time is that of `prox24.solve` after that, the median of three
where one takes less than two seconds. Writes layers.csv, one line per linear and contender, and
layers.png, the loss against the time as the budget of each solver grows: both relative to the
default solver and to SparseGPT, as geometric means over the linears.
"""

import argparse
import csv
import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from prox24.pipeline import gather_grams
from rich.console import Console
from rich.table import Table

import prox24
from prox24 import ADMM, ConjugateGradients, LayerProblem, Prox, SparseGPT, Swaps, Wanda
from prox24.checkpoints.checkpoint import open_checkpoint
from prox24.cli.demo_model import fetch_model
from prox24.jobs.forward import (
    embed_windows,
    layer_linears,
    layer_weights,
    load_model,
    run_in_place,
)
from prox24.jobs.text import spread_windows, text_or_packaged, tokenize
from prox24.solvers.admm import Projection
from prox24.solvers.schedules import Adaptive, Cosine, Exponential, Linear

matplotlib.use("Agg")
import matplotlib.pyplot as plt


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


CONVERGED = ConjugateGradients(100, 1e-6)
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


class LayerLinear(NamedTuple):
    """One linear of the model."""

    layer: int
    name: str
    problem: LayerProblem


def linears(layers: list[int], calibration: Path | None, samples: int) -> Iterator[LayerLinear]:
    """The linears of some layers with their Grams in the dense model."""
    checkpoint = open_checkpoint(fetch_model(Path(".cache")))
    text = text_or_packaged(calibration, "speeches.txt")
    ids = tokenize(checkpoint.load_tokenizer(), text, checkpoint.config["vocab_size"])
    model = load_model(checkpoint)
    hidden = list(embed_windows(model, spread_windows(ids, samples, 512)))
    for index in range(max(layers) + 1):
        weights = layer_weights(model, index)
        if index in layers:
            grams = gather_grams(model, index, weights, hidden).grams
            for linear in layer_linears(model.config, index):
                weight = weights[linear.weight].astype(jnp.float32)
                problem = LayerProblem(weight, grams[linear.input].total)
                yield LayerLinear(index, linear.weight.removesuffix(".weight"), problem)
        run_in_place(model, index, weights, hidden)


def one_step(part: object) -> object:
    """The same compiled program, ended after a step."""
    fields = {"steps", "max_steps", "sweeps"}
    short = {f.name: 1 for f in dataclasses.fields(part) if f.name in fields} if part else {}
    return dataclasses.replace(part, **short) if short else part


def measure(contender: Contender, problem: LayerProblem) -> tuple[prox24.Solution, float]:
    """The solution, and the seconds that it takes once compiled."""

    def solve(solver: object, refit: object) -> prox24.Solution:
        solution = prox24.solve(problem, solver, refit)
        return jax.block_until_ready(solution)

    solve(one_step(contender.solver), one_step(contender.refit))
    seconds: list[float] = []
    while len(seconds) < 3:
        start = time.perf_counter()
        solution = solve(contender.solver, contender.refit)
        seconds.append(time.perf_counter() - start)
        if seconds[0] > 2:
            break
    return solution, statistics.median(seconds)


def mean_ratio(rows: list[dict], field: str, name: str, reference: str) -> float:
    """The geometric mean over the linears of a figure of one contender over another's."""
    values = {row["contender"]: [] for row in rows}
    for row in rows:
        values[row["contender"]].append(row[field])
    return float(np.exp(np.mean(np.log(values[name]) - np.log(values[reference]))))


def summary(rows: list[dict]) -> Table:
    """One line per contender."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    losses = {name: np.array([r["loss"] for r in rows if r["contender"] == name]) for name in names}
    seconds = {name: sum(r["seconds"] for r in rows if r["contender"] == name) for name in names}
    table = Table(title=f"{len(losses[DEFAULT])} linears", title_justify="left")
    table.add_column("contender", no_wrap=True)
    for title in (
        "loss /\ndefault's",
        "default\nis lower",
        "seconds,\nall",
        "seconds /\nsparsegpt",
    ):
        table.add_column(title, justify="right")
    for name in names:
        table.add_row(
            name,
            f"{mean_ratio(rows, 'loss', name, DEFAULT):.4f}",
            "" if name == DEFAULT else f"{np.mean(losses[DEFAULT] < losses[name]):.0%}",
            f"{seconds[name]:.2f}",
            f"{seconds[name] / seconds[REFERENCE]:.1f}",
        )
    return table


def draw(rows: list[dict], field: dict[str, Contender], path: Path) -> None:
    """Loss against time, one line per curve."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="tight")
    for curve in dict.fromkeys(c.curve for c in field.values() if c.curve):
        points = sorted(
            (
                mean_ratio(rows, "seconds", name, REFERENCE),
                100 * (mean_ratio(rows, "loss", name, DEFAULT) - 1),
            )
            for name, contender in field.items()
            if contender.curve == curve
        )
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=curve)
    present = {row["contender"] for row in rows}
    for name in ("admm, ALPS + refit", "admm, Boza + refit", PAPER):
        if name not in present:
            continue
        x = mean_ratio(rows, "seconds", name, REFERENCE)
        y = 100 * (mean_ratio(rows, "loss", name, DEFAULT) - 1)
        axes.plot(x, y, marker="s", linestyle="none", label=name)
    axes.set_xscale("log")
    axes.set_xlabel("time / time of SparseGPT")
    axes.set_ylabel("loss above the default's (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", default="0,15,29", help="comma-separated")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--samples", type=int, default=64, help="windows of 512 tokens")
    parser.add_argument("--only", help="contenders, separated by semicolons")
    parser.add_argument("--output", type=Path, default=Path("."), metavar="FOLDER")
    arguments = parser.parse_args()

    field = contenders()
    if arguments.only:
        chosen = {DEFAULT, REFERENCE, *arguments.only.split(";")}
        field = {name: contender for name, contender in field.items() if name in chosen}
    rows = []
    layers = [int(layer) for layer in arguments.layers.split(",")]
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "layers.csv").open("w", newline="") as file:
        writer = None
        for linear in linears(layers, arguments.calibration, arguments.samples):
            for name, contender in field.items():
                solution, seconds = measure(contender, linear.problem)
                figures = solution.statistics
                row = {
                    "layer": linear.layer,
                    "linear": linear.name,
                    "out": linear.problem.weight.shape[0],
                    "in": linear.problem.weight.shape[1],
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
    Console(width=120).print(summary(rows))
    if not arguments.only:
        draw(rows, field, arguments.output / "layers.png")


if __name__ == "__main__":
    main()
