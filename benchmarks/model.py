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

import argparse
import csv
import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.ticker import NullLocator, ScalarFormatter
from prox24.pipeline import collect, prune
from rich.console import Console
from rich.table import Table

import prox24
from prox24 import ADMM, ConjugateGradients, GradientSteps, Prox, SparseGPT, Swaps, Wanda
from prox24.checkpoints.checkpoint import Checkpoint, open_checkpoint
from prox24.checkpoints.tensors import TensorSource
from prox24.cli.demo_model import fetch_model
from prox24.jobs.perplexity import perplexity
from prox24.jobs.text import first_windows, read_text, tokenize
from prox24.solvers.admm import Projection
from prox24.solvers.schedules import Exponential

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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


CONVERGED = ConjugateGradients(100, 1e-6)
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


def drawn_windows(ids: np.ndarray, windows: int, length: int, seed: int) -> np.ndarray:
    """Windows drawn without replacement; fewer are a subset of more."""
    available = first_windows(ids, None, length)
    if len(available) < windows:
        first_windows(ids, windows, length)  # Says what is missing.
    return available[np.random.default_rng(seed).permutation(len(available))[:windows]]


def with_tensors(checkpoint: Checkpoint, tensors: dict[str, np.ndarray]) -> Checkpoint:
    """The checkpoint with some tensors replaced, in memory."""
    replaced = {
        name: TensorSource(value.shape, value.dtype, lambda value=value: value)
        for name, value in tensors.items()
    }
    return dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, **replaced})


def measure(
    run: Run, checkpoint: Checkpoint, calibration: np.ndarray, texts: dict[str, np.ndarray]
) -> dict[str, object]:
    """Prunes in memory and evaluates on every text."""
    start = time.perf_counter()
    reports, pruned = [], checkpoint
    if run.solver is not None:
        result = collect(prune(checkpoint, calibration, run.solver, run.refit, pull=run.pull))
        reports, pruned = result.reports, with_tensors(checkpoint, result.tensors)
    seconds = time.perf_counter() - start
    losses = [report.statistics.relative_loss for report in reports]
    row: dict[str, object] = {
        "mean_relative_loss": np.mean(losses) if losses else "",
        "solver_seconds": sum(r.seconds for r in reports),
        "seconds": seconds,
    }
    return row | {name: perplexity(pruned, windows).perplexity for name, windows in texts.items()}


def read_rows(path: Path) -> list[dict[str, str]]:
    """The lines of an earlier command, if there are any."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def check_columns(path: Path, rows: list[dict[str, str]], before: str, names: list[str]) -> None:
    """Ends the command, before a line is measured, if titles behind one are not of these names."""
    if not rows:
        return
    titles = list(rows[0])
    found = titles[titles.index(before) + 1 :]
    if set(found) != set(names):
        sys.exit(f"{path} has {', '.join(found)}, not {', '.join(names)}: give another --output")


def add_row(path: Path, row: dict[str, object]) -> list[dict[str, str]]:
    """Appends a line, and the titles before the first; all lines that are there then.

    Raises:
      ValueError: the lines that are there have other titles.
    """
    rows = read_rows(path)
    titles = list(rows[0] if rows else row)
    if set(titles) != set(row):
        raise ValueError(f"{path} has {titles}, but the new line {list(row)}: go on elsewhere")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, titles)
        if not rows:
            writer.writeheader()
        writer.writerow(row)
    return read_rows(path)


def mean_and_spread(rows: list[dict[str, str]], field: str, form: str) -> str:
    """The mean over seeds, and half of the range where there are several."""
    found = [float(row[field]) for row in rows if row[field]]
    if not found:
        return ""
    half = (max(found) - min(found)) / 2
    return f"{np.mean(found):{form}}" + (f" ± {half:{form}}" if len(found) > 1 else "")


def print_table(rows: list[dict[str, str]], texts: list[str], column: str | None) -> None:
    """One line for all seeds of a run."""
    table = Table()
    table.add_column("method", no_wrap=True)
    for title in (column or "", *texts, "mean loss", "solver s", "seeds"):
        table.add_column(title, justify="right")
    for method, value in dict.fromkeys((row["run"], row.get(column, "")) for row in rows):
        same = [r for r in rows if (r["run"], r.get(column, "")) == (method, value)]
        cells = [mean_and_spread(same, text, ".2f") for text in texts]
        losses = mean_and_spread(same, "mean_relative_loss", ".4f")
        seconds = mean_and_spread(same, "solver_seconds", ".0f")
        table.add_row(method, value, *cells, losses, seconds, str(len(same)))
    Console(width=130).print(table)


def draw(rows: list[dict[str, str]], texts: list[str], column: str, title: str, path: Path) -> None:
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
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("perplexity")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_methods(rows: list[dict[str, str]], texts: list[str], path: Path) -> None:
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
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_yticks(range(len(methods)), methods, fontsize=8)
    panels[0][0].invert_yaxis()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--windows", type=int, default=64, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration window")
    parser.add_argument("--evaluation-windows", type=int, default=16)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of rows (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("."), metavar="FOLDER")
    arguments = parser.parse_args()
    runs = TABLES[arguments.table]()
    names = {run.method for run in runs}
    if unknown := set(arguments.only or ()) - names:
        parser.error(f"--only: no row is {', '.join(sorted(unknown))}; there are {sorted(names)}")

    checkpoint = open_checkpoint(fetch_model(Path(".cache")))
    tokenizer, vocabulary = checkpoint.load_tokenizer(), checkpoint.config["vocab_size"]

    def ids(path: Path) -> np.ndarray:
        return tokenize(tokenizer, read_text(path), vocabulary)

    calibration = ids(arguments.calibration)
    texts = {
        path.stem: first_windows(ids(path), arguments.evaluation_windows, EVALUATION_LENGTH)
        for path in arguments.texts
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"model-{arguments.table}.csv"
    rows = read_rows(path)
    check_columns(path, rows, "seconds", list(texts))
    for seed in arguments.seeds:
        for run in runs:
            if arguments.only and run.method not in arguments.only:
                continue
            key = {
                "run": run.method,
                "seed": seed,
                "calibration": arguments.calibration.stem,
                "windows": arguments.windows,
                "length": arguments.length,
                "evaluation_windows": arguments.evaluation_windows,
                **run.varied,
            }
            if any(all(row[name] == str(value) for name, value in key.items()) for row in rows):
                continue
            windows = drawn_windows(calibration, key["windows"], arguments.length, seed)
            row = dict(key)
            row |= measure(run, checkpoint, windows, texts)
            rows = add_row(path, row)
    column, title = VARIED.get(arguments.table, (None, ""))
    print_table(rows, list(texts), column)
    if column is None:
        draw_methods(rows, list(texts), path.with_suffix(".png"))
    else:
        draw(rows, list(texts), column, title, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
