"""Perplexity of SmolLM2-135M-Instruct pruned to 2:4, and the ablations of the method.

    python benchmarks/model.py main --calibration calib_mix.txt --texts austen.txt sotu.txt
    python benchmarks/model.py samples --length 64 ...
    python benchmarks/model.py refit --windows 16 ...
    python benchmarks/model.py growth --windows 16 ...

main: every method, with and without a refit. samples: 1 to 2,048 calibration windows. refit:
gradient steps after masking. growth: of lambda, with and without a refit. Calibration windows are
drawn at random from the text by the seed, without overlap; evaluation is on the first windows of
512 tokens of each text. A line is appended to FOLDER/model-TABLE.csv after each run, and a run
that is there already is skipped, so that an interrupted command can be given again. All lines of
the file together are drawn in FOLDER/model-TABLE.png.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import common
import numpy as np
from common import CONVERGED, Rows, drawn_windows, plt, positive
from matplotlib.ticker import NullLocator, ScalarFormatter

import prox24
from prox24 import ADMM, ConjugateGradients, GradientSteps, Prox, SparseGPT, Swaps, Wanda
from prox24.solvers.admm import Projection
from prox24.solvers.schedules import Exponential

EVALUATION_LENGTH = 512


VARIED = {
    "samples": ("windows", "calibration windows"),
    "refit": ("gradient_steps", "gradient steps"),
    "growth": ("growth", "growth of lambda per step"),
}
"""What an ablation varies: a column of its lines, and how a figure calls it."""


class Run(NamedTuple):
    """One line of a table; in an ablation, with the number that it varies by its column."""

    method: str
    solver: object
    refit: object = None
    pull: float | None = None
    varied: Mapping[str, float] = MappingProxyType({})


ADMM_REFIT = Run("admm with the prox + refit", ADMM(), ConjugateGradients())


def on_dense_targets(run: Run, pull: float) -> Run:
    """The same method, made to reproduce the dense model."""
    return run._replace(method=f"{run.method} on dense targets, pull {pull:g}", pull=pull)


def main_table() -> list[Run]:
    """Every method."""
    return [
        Run("dense", None),
        Run("magnitude", prox24.Magnitude()),
        Run("magnitude + refit", prox24.Magnitude(), CONVERGED),
        Run("wanda", Wanda()),
        Run("wanda + refit", Wanda(), CONVERGED),
        Run("sparsegpt", SparseGPT()),
        Run("sparsegpt + refit", SparseGPT(), CONVERGED),
        Run("sparsegpt + swaps", SparseGPT(), Swaps()),
        Run("admm, ALPS + refit", ADMM.alps(), CONVERGED),
        ADMM_REFIT,
        Run("admm with the prox + swaps", ADMM(), Swaps()),
        Run("admm, projection + refit", ADMM(sparsify=Projection()), ConjugateGradients()),
        Run("prox + refit", Prox(), ConjugateGradients()),
        Run("admm with the prox, 96 steps + refit", ADMM.in_steps(96), ConjugateGradients()),
        *(
            on_dense_targets(run, pull)
            for run, pulls in (
                (ADMM_REFIT, (3, 1, 0.3, 0.1)),
                (Run("prox + refit", Prox(), ConjugateGradients()), (1,)),
                (Run("sparsegpt + refit", SparseGPT(), CONVERGED), (1,)),
            )
            for pull in pulls
        ),
        Run("prox, paper + 1,000 gradient steps", Prox.paper(), GradientSteps()),
    ]


def samples_table() -> list[Run]:
    """Calibration windows in powers of two."""
    methods = [
        Run("wanda", Wanda()),
        Run("wanda + refit", Wanda(), ConjugateGradients()),
        Run("sparsegpt", SparseGPT()),
        Run("sparsegpt + refit", SparseGPT(), ConjugateGradients()),
        Run("prox + refit", Prox(), ConjugateGradients()),
        ADMM_REFIT,
    ]
    runs = [(2**power, method) for power in range(12) for method in methods]
    runs += [(4**power, on_dense_targets(ADMM_REFIT, 1)) for power in range(6)]
    return [method._replace(varied={"windows": windows}) for windows, method in runs]


def refit_table() -> list[Run]:
    """Gradient steps after masking; none is the proximal gradient method with no refit."""
    return [
        Run("prox", Prox(), GradientSteps(steps=steps), varied={"gradient_steps": steps})
        for steps in (0, 50, 100, 200, 400, 800, 1600)
    ]


def growth_table() -> list[Run]:
    """How fast lambda grows."""
    return [
        Run(method, Prox(Exponential(0.01, growth)), refit, varied={"growth": growth})
        for growth in (1.5, 1.2, 1.1, 1.05, 1.02)
        for method, refit in (("prox", None), ("prox + refit", ConjugateGradients()))
    ]


TABLES = {
    "main": main_table,
    "samples": samples_table,
    "refit": refit_table,
    "growth": growth_table,
}


MEASURED = ("mean_relative_loss", "solver_seconds", "seconds")


def measure(
    run: Run, model: common.Checkpoint, calibration: np.ndarray, texts: dict[str, np.ndarray]
) -> dict[str, object]:
    """Prunes in memory and evaluates on every text."""
    start = time.perf_counter()
    reports, pruned = [], model
    if run.solver is not None:
        linears = common.prune(model, calibration, run.solver, run.refit, pull=run.pull)
        tensors, reports = common.collect(linears)
        pruned = common.with_tensors(model, tensors)
    seconds = time.perf_counter() - start
    losses = [report.statistics.relative_loss for report in reports]
    row: dict[str, object] = {
        "mean_relative_loss": np.mean(losses) if losses else "",
        "solver_seconds": sum(r.seconds for r in reports),
        "seconds": seconds,
    }
    return row | {name: common.perplexity(pruned, w).perplexity for name, w in texts.items()}


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
    common.show(titles, lines, width=130)


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
    runs = TABLES[arguments.table]()
    names = {run.method for run in runs}
    if unknown := set(arguments.only or ()) - names:
        parser.error(f"--only: no row is {', '.join(sorted(unknown))}; there are {sorted(names)}")
    model = common.dense_model()
    calibration = common.token_ids(model, arguments.calibration)
    texts = {
        path.stem: common.windows_of(model, path, arguments.evaluation_windows, EVALUATION_LENGTH)
        for path in arguments.texts
    }

    def key_of(run: Run, seed: int) -> dict[str, object]:
        return {
            "run": run.method,
            "seed": seed,
            "calibration": arguments.calibration.stem,
            "windows": arguments.windows,
            "length": arguments.length,
            "evaluation_windows": arguments.evaluation_windows,
            **run.varied,
        }

    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"model-{arguments.table}.csv"
    rows = common.read_rows(path, [*key_of(runs[0], 0), *MEASURED, *texts])
    for seed in arguments.seeds:
        for run in runs:
            key = key_of(run, seed)
            if common.has_row(rows, key) or run.method not in (arguments.only or names):
                continue
            windows = drawn_windows(calibration, key["windows"], arguments.length, seed)
            rows = common.add_row(path, key | measure(run, model, windows, texts))
    column, title = VARIED.get(arguments.table, (None, ""))
    print_table(rows, list(texts), column)
    if column is None:
        draw_methods(rows, list(texts), path.with_suffix(".png"))
    else:
        draw(rows, list(texts), column, title, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
