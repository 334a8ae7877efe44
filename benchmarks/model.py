"""Perplexity of SmolLM2-135M-Instruct pruned to 2:4, and the ablations of the method.

    python benchmarks/model.py main
    python benchmarks/model.py samples --length 64
    python benchmarks/model.py refit --windows 16
    python benchmarks/model.py growth --windows 16
    python benchmarks/model.py patterns --windows 16
    python benchmarks/model.py kept --windows 16

main        every method, with and without a refit
samples     1 to 2,048 calibration windows
refit       gradient steps after masking
growth      growth of lambda, with and without a refit
patterns    2:4, pairs, larger blocks and no pattern, by three methods
kept        shares of the linears that stay dense, by keep_dense

Calibration windows are drawn at random from the text by the seed, without overlap. Evaluation is on
the first windows of 512 tokens of each text. Models are written in float32. Each run appends a line
to FOLDER/model-TABLE.csv. A run that has its line is skipped, so the same command continues an
interrupted one. FOLDER/model-TABLE.png shows all lines of the file.
"""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import common
import numpy as np
from baselines import ALPS
from common import CONVERGED, Rows, own_targets, plt, positive
from matplotlib.ticker import NullLocator, ScalarFormatter

import prox24
from prox24 import ADMM, ConjugateGradients, ProximalGradient, Recipe, SparseGPT, Swaps, Wanda

EVALUATION_LENGTH = 512
REFIT = ConjugateGradients()
ADMM_REFIT, PROX_REFIT = (own_targets(solver, REFIT) for solver in (ADMM(), ProximalGradient()))
VARIED = {
    "samples": ("windows", "calibration windows"),
    "refit": ("gradient_steps", "gradient steps"),
    "growth": ("growth", "growth of lambda per step"),
    "kept": ("keep_dense", "share of the linears that stay dense"),
}
"""What an ablation varies: a column of its lines, and how a figure calls it."""
MEASURED = ("mean_relative_loss", "solver_seconds", "seconds")


class Run(NamedTuple):
    """One line of a table; in an ablation, with the number that it varies by its column."""

    method: str
    recipe: Recipe | None
    varied: Mapping[str, float] = MappingProxyType({})


def on_dense_targets(method: str, recipe: Recipe, pull: float) -> Run:
    """The same method, made to reproduce the dense model."""
    dense = dataclasses.replace(recipe, targets=prox24.DenseTargets(pull))
    return Run(f"{method} on dense targets, pull {pull:g}", dense)


def main_table() -> list[Run]:
    """Every method."""
    sparsegpt_refit = own_targets(SparseGPT(), CONVERGED)
    methods = {
        "dense": None,
        "magnitude": Recipe.magnitude(),
        "magnitude + refit": own_targets(prox24.Magnitude(), CONVERGED),
        "wanda": Recipe.wanda(),
        "wanda + refit": own_targets(Wanda(), CONVERGED),
        "sparsegpt": Recipe.sparsegpt(),
        "sparsegpt + refit": sparsegpt_refit,
        "sparsegpt + swaps": own_targets(SparseGPT(), Swaps()),
        "admm, ALPS + refit": own_targets(ALPS(), CONVERGED),
        "admm with the prox + refit": ADMM_REFIT,
        "admm with the prox + swaps": own_targets(ADMM(), Swaps()),
        "admm, projection + refit": own_targets(ADMM(penalty=None), REFIT),
        "prox + refit": PROX_REFIT,
        "admm with the prox, 96 steps + refit": own_targets(ADMM.in_steps(96), REFIT),
        "prox, paper + 1,000 gradient steps": Recipe.paper(),
    }
    return [
        *(Run(*method) for method in methods.items()),
        *(on_dense_targets("admm with the prox + refit", ADMM_REFIT, p) for p in (3, 1, 0.3, 0.1)),
        on_dense_targets("prox + refit", PROX_REFIT, 1),
        on_dense_targets("sparsegpt + refit", sparsegpt_refit, 1),
    ]


def samples_table() -> list[Run]:
    """Calibration windows in powers of two."""
    methods = [
        Run("wanda", Recipe.wanda()),
        Run("wanda + refit", own_targets(Wanda(), REFIT)),
        Run("sparsegpt", Recipe.sparsegpt()),
        Run("sparsegpt + refit", own_targets(SparseGPT(), REFIT)),
        Run("prox + refit", PROX_REFIT),
        Run("admm with the prox + refit", ADMM_REFIT),
    ]
    runs = [(2**power, method) for power in range(12) for method in methods]
    dense = on_dense_targets("admm with the prox + refit", ADMM_REFIT, 1)
    runs += [(4**power, dense) for power in range(6)]
    return [method._replace(varied={"windows": windows}) for windows, method in runs]


def refit_table() -> list[Run]:
    """Gradient steps after masking; none is the proximal gradient method with no refit."""
    return [
        Run(
            "prox",
            own_targets(ProximalGradient(), prox24.GradientSteps(steps=steps)),
            {"gradient_steps": steps},
        )
        for steps in (0, 50, 100, 200, 400, 800, 1600)
    ]


def growth_table() -> list[Run]:
    """How fast lambda grows."""
    return [
        Run(
            method,
            own_targets(ProximalGradient(prox24.Exponential(0.01, growth)), refit),
            {"growth": growth},
        )
        for growth in (1.5, 1.2, 1.1, 1.05, 1.02)
        for method, refit in (("prox", None), ("prox + refit", REFIT))
    ]


def patterns_table() -> list[Run]:
    """Half of the weights, by patterns that constrain less and less."""
    patterns = ["2:4x2", "2:4", "4:8", "8:16", "16:32", "50%"]
    methods = {
        "wanda": (Recipe.wanda(), patterns),
        "sparsegpt": (Recipe.sparsegpt(), patterns),
        "default, projection": (Recipe(ADMM(penalty=None)), patterns[:5]),
        "default": (Recipe(), patterns[:2]),
    }
    return [
        Run(f"{method}, {pattern}", dataclasses.replace(recipe, pattern=pattern))
        for method, (recipe, own) in methods.items()
        for pattern in own
    ]


def kept_table() -> list[Run]:
    """The linears that lose most stay dense."""
    return [
        Run("default", Recipe(keep_dense=share), {"keep_dense": share}) for share in (0, 0.1, 0.2)
    ]


TABLES = {
    "main": main_table,
    "samples": samples_table,
    "refit": refit_table,
    "growth": growth_table,
    "patterns": patterns_table,
    "kept": kept_table,
}


def measure(
    recipe: Recipe | None, model: Path, calibration: np.ndarray, texts: dict[str, np.ndarray]
) -> dict[str, object]:
    """Prunes, and evaluates on every text; seconds are those of pruning."""
    numbers: tuple[object, ...] = "", 0, 0
    with tempfile.TemporaryDirectory() as folder:
        if recipe is not None:
            source, model = model, Path(folder) / "pruned"
            recipe = dataclasses.replace(recipe, dtype="float32")
            report = prox24.prune(source, model, recipe, calibration=calibration)
            solving = sum(linear.seconds for linear in report.linears)
            numbers = report.mean_relative_loss, solving, report.seconds
        found = common.perplexities(model, texts)
    return dict(zip(MEASURED, numbers, strict=True)) | found


def mean_and_spread(rows: Rows, field: str, form: str) -> str:
    """The mean over seeds, and half of the range where there are several."""
    found = [float(row[field]) for row in rows if row[field]]
    if not found:
        return ""
    half = (max(found) - min(found)) / 2
    return f"{np.mean(found):{form}}" + (f" ± {half:{form}}" if len(found) > 1 else "")


def print_table(rows: Rows, texts: list[str], column: str | None) -> None:
    """One line for all seeds of a run."""
    lines = []
    for method, value in dict.fromkeys((row["run"], row.get(column, "")) for row in rows):
        same = [r for r in rows if (r["run"], r.get(column, "")) == (method, value)]
        cells = [mean_and_spread(same, text, ".2f") for text in texts]
        losses = mean_and_spread(same, "mean_relative_loss", ".4f")
        seconds = mean_and_spread(same, "solver_seconds", ".0f")
        lines.append((method, value, *cells, losses, seconds, str(len(same))))
    titles = ("method", column or "", *texts, "mean loss", "solver s", "seeds")
    common.show(titles, lines)


def draw(rows: Rows, texts: list[str], column: str, title: str, path: Path) -> None:
    """Perplexity against what was varied, means over the seeds, a line for each method."""
    figure, panels = plt.subplots(
        1, len(texts), figsize=(4.5 * len(texts), 4.5), layout="constrained", squeeze=False
    )
    values = sorted({float(row[column]) for row in rows})
    for axes, text in zip(panels[0], texts, strict=True):
        for method in dict.fromkeys(row["run"] for row in rows):
            measured: dict[float, list[float]] = {}
            for row in rows:
                if row["run"] == method:
                    measured.setdefault(float(row[column]), []).append(float(row[text]))
            points = [(value, np.mean(measured[value])) for value in sorted(measured)]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=method)
        # A linear part up to the first positive value has room for zero.
        axes.set_xscale("symlog", linthresh=min(value for value in values if value > 0))
        axes.set_xticks(values, [f"{value:g}" for value in values], fontsize=7)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(title)
        axes.set_title(text, fontsize=10)
    panels[0][0].set_ylabel("perplexity")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    common.save(figure, path)


def draw_methods(rows: Rows, texts: list[str], path: Path) -> None:
    """Perplexity of every method, a point for each seed; least in the first text on top."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["run"], []).append(float(row[texts[0]]))
    methods = sorted(found, key=lambda method: np.mean(found[method]))
    figure, panels = plt.subplots(
        1, len(texts), figsize=(4.5 * len(texts), 4.5), layout="tight", sharey=True, squeeze=False
    )
    for axes, text in zip(panels[0], texts, strict=True):
        places = [methods.index(row["run"]) for row in rows]
        axes.plot([float(row[text]) for row in rows], places, "o", markersize=4, alpha=0.6)
        axes.set_xscale("log")
        axes.set_xlabel("perplexity")
        axes.set_title(text, fontsize=10)
        axes.grid(axis="y", linewidth=0.3)
    panels[0][0].set_yticks(range(len(methods)), methods, fontsize=8)
    panels[0][0].invert_yaxis()
    common.save(figure, path)


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("table", choices=TABLES)
    common.add_texts(parser)
    parser.add_argument("--windows", type=positive, default=64, help="calibration windows")
    parser.add_argument("--length", type=positive, default=512, help="of a calibration window")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of rows (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    common.add_output(parser)
    arguments = parser.parse_args()
    runs, count = TABLES[arguments.table](), arguments.evaluation_windows
    names = {run.method for run in runs}
    if unknown := set(arguments.only or ()) - names:
        parser.error(f"--only: no row is {', '.join(sorted(unknown))}; there are {sorted(names)}")
    model = common.dense_model()
    calibration = common.windows_of(model, arguments.calibration, None, arguments.length)
    texts = common.windows_of_texts(model, arguments.texts, count, EVALUATION_LENGTH)

    def key_of(run: Run, seed: int) -> dict[str, object]:
        return {
            "run": run.method,
            "seed": seed,
            "calibration": common.name_of(arguments.calibration),
            "windows": arguments.windows,
            "length": arguments.length,
            "evaluation_windows": count,
            **run.varied,
        }

    path = arguments.output / f"model-{arguments.table}.csv"
    chosen = [run for run in runs if run.method in (arguments.only or names)]
    both = [(run, seed) for seed in arguments.seeds for run in chosen]

    def measured(run: Run, seed: int) -> dict[str, object]:
        windows = common.drawn_windows(calibration, key_of(run, seed)["windows"], seed)
        return measure(run.recipe, model, windows, texts)

    titles = [*key_of(runs[0], 0), *MEASURED, *texts]
    rows = common.completed(path, titles, [(key_of(*own), own) for own in both], measured)
    column, title = VARIED.get(arguments.table, (None, ""))
    print_table(rows, list(texts), column)
    if column is None:
        draw_methods(rows, list(texts), path.with_suffix(".png"))
    else:
        draw(rows, list(texts), column, title, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
