"""`prox24 demo`: prunes a model of 135M parameters by baselines and by the default recipe."""

import argparse
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

from prox24._cli import options
from prox24._pruning.recipe import Recipe

METHODS = {
    "magnitude": ("magnitude", Recipe.magnitude()),
    "wanda": ("wanda", Recipe.wanda()),
    "sparsegpt": ("sparsegpt", Recipe.sparsegpt()),
    "no-basis": ("default, heads not turned", dataclasses.replace(Recipe(), basis=None)),
    "admm": ("default", Recipe()),
}
"""Recipes, each with its name in the table."""
LEFT_OUT = ("wanda", "no-basis")
"""Methods that only the full demo runs."""
COLUMNS = ["method", "perplexity", "mean relative loss", "solver s", "total s"]


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options."""
    command.add_argument(
        "--cache", type=Path, default=Path(".cache"), help="folder for the download"
    )
    command.add_argument(
        "--output",
        type=Path,
        default=Path("."),
        help="folder for the models (earlier ones are replaced)",
    )
    command.add_argument(
        "--full",
        action="store_true",
        help="more windows and two more methods: takes about four times as long",
    )
    command.add_argument(
        "--calibration", type=Path, metavar="FILE", help="UTF-8 text (default: speeches)"
    )
    options.add_sizes(command, "4, or 16 with --full")
    command.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to evaluate on (default: a novel)"
    )
    command.add_argument(
        "--evaluation-samples",
        type=options.positive,
        help="evaluation windows (default: 3, or 16 with --full)",
    )
    options.add_output(command, quiet="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    from prox24._checkpoints.checkpoint import open_checkpoint
    from prox24._checkpoints.tensors import writing
    from prox24._cli.demo_model import fetch_model
    from prox24._jobs import page
    from prox24._jobs.evaluate import perplexity
    from prox24._jobs.output import peak_memory_bytes, print_json, table
    from prox24._jobs.progress import whole_bar
    from prox24._jobs.prune import prune
    from prox24._jobs.text import Text, calibration_windows, evaluation_windows

    for folder in (arguments.cache, arguments.output):
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    quiet, silent = arguments.quiet, arguments.quiet or arguments.json
    say = (lambda text: None) if silent else functools.partial(print, flush=True)
    say(f"SmolLM2-135M-Instruct, 2:4. The model is downloaded into {arguments.cache} once.")
    model, length = fetch_model(arguments.cache), arguments.sequence_length
    # With fewer than 2,048 tokens a refit may gain nothing.
    calibrated, evaluated = (16, 16) if arguments.full else (4, 3)
    checkpoint = open_checkpoint(model)
    evaluation = evaluation_windows(
        checkpoint, Text(arguments.text, arguments.evaluation_samples or evaluated, length)
    )
    calibration = calibration_windows(
        checkpoint, Text(arguments.calibration, arguments.samples or calibrated, length)
    )
    say(
        f"Calibration: {calibration.size} tokens. "
        f"Perplexity: {evaluation.size} tokens in windows of {length}."
    )
    methods = {
        name: given for name, given in METHODS.items() if arguments.full or name not in LEFT_OUT
    }
    rows: list[dict[str, Any]] = []
    # Each method has three bars: the check and the layers of pruning, and the measurement.
    with whole_bar("demo", 1 + 3 * len(methods), quiet):
        for method, (called, recipe) in {"dense": ("dense", None), **methods}.items():
            began = time.perf_counter()
            folder, figures = model, {}
            if recipe is not None:
                folder = arguments.output / f"SmolLM2-135M-Instruct-{method}-2of4"
                report = prune(
                    model,
                    folder,
                    recipe,
                    calibration=calibration,
                    overwrite=True,
                    quiet=quiet,
                )
                figures = {
                    "mean_relative_loss": report.mean_relative_loss,
                    "solver_seconds": sum(linear.seconds for linear in report.linears),
                    "folder": str(folder),
                }
            # The written model is read back and measured.
            measured = perplexity(folder, evaluation, quiet=quiet).to_dict()
            seconds = time.perf_counter() - began
            rows.append({"method": called, **measured, **figures, "seconds": seconds})
    dense, last = (row["perplexity"] for row in (rows[0], rows[-1]))
    meaning = (
        f"Half of the weights are zero now. Perplexity rose from {dense:.1f} to {last:.1f} with "
        "the default method. Lower is better."
    )
    shown, bars = list(map(_cells, rows)), {row["method"]: row["perplexity"] for row in rows}
    text = page.page(
        "prox24 demo: SmolLM2-135M, 2:4",
        page.section("Perplexity", page.bars(bars), page.paragraph(meaning)),
        page.section("Figures", page.table(shown, COLUMNS)),
        *report.html_sections(),
    )
    place = arguments.output / "report.html"
    with writing(place):
        place.write_text(text, encoding="utf-8")
    if arguments.json:
        print_json({"rows": rows, "peak_memory_bytes": peak_memory_bytes()})
        return 0
    print(table(COLUMNS, shown))
    print(meaning)
    print(f"Open {place}: it shows the loss of each layer, and a mask.")
    print("Load the model of the last row with transformers (and torch):")
    print(f'  AutoModelForCausalLM.from_pretrained("{rows[-1]["folder"]}")')
    return 0


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["method"],
        f"{row['perplexity']:.2f}",
        f"{row['mean_relative_loss']:.4f}" if "mean_relative_loss" in row else "",
        f"{row['solver_seconds']:.0f}" if "solver_seconds" in row else "",
        f"{row['seconds']:.0f}",
    ]
