"""`prox24 demo`: a real model of 135M parameters, pruned by the baselines and the default."""

import argparse
import time
from pathlib import Path
from typing import Any

from prox24._cli import options
from prox24._pruning.recipe import PRESETS
from prox24.errors import CheckpointError

METHODS = {
    "magnitude": "magnitude",
    "wanda": "wanda",
    "sparsegpt": "sparsegpt",
    "admm": "admm + refit, dense targets",
}
"""Presets, with what the table calls them."""
SAMPLES = 16
COLUMNS = ["method", "perplexity", "mean relative loss", "solver s", "total s"]


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options."""
    command.add_argument(
        "--cache", type=Path, default=Path(".cache"), help="folder for the download"
    )
    command.add_argument(
        "--output", type=Path, default=Path("."), help="folder for the models (replaces its four)"
    )
    options.add_windows(command, "calibration", "UTF-8 text (default: speeches)", SAMPLES)
    command.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to evaluate on (default: a novel)"
    )
    command.add_argument(
        "--evaluation-samples",
        type=options.positive,
        default=16,
        help="evaluation windows (default: 16)",
    )
    options.add_output(command, quiet="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; the exit code."""
    from prox24._checkpoints.checkpoint import open_checkpoint
    from prox24._cli.demo_model import fetch_model
    from prox24._jobs.evaluate import perplexity
    from prox24._jobs.output import peak_memory_bytes, print_json, print_table
    from prox24._jobs.prune import prune
    from prox24._jobs.text import Text, calibration_windows, evaluation_windows

    for folder in (arguments.cache, arguments.output):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make the folder {folder}: {error.strerror}") from error
    model, length = fetch_model(arguments.cache), arguments.sequence_length
    checkpoint = open_checkpoint(model)
    evaluation = evaluation_windows(
        checkpoint, Text(arguments.text, arguments.evaluation_samples, length)
    )
    calibration = calibration_windows(
        checkpoint, Text(arguments.calibration, arguments.samples or SAMPLES, length)
    )
    if not (arguments.quiet or arguments.json):
        print(
            f"SmolLM2-135M-Instruct, 2:4. Calibration: {calibration.size} tokens. "
            f"Perplexity: {evaluation.size} tokens in windows of {evaluation.shape[1]}."
        )

    began = time.perf_counter()
    dense = perplexity(model, evaluation, quiet=arguments.quiet)
    seconds = time.perf_counter() - began
    rows: list[dict[str, Any]] = [{"method": "dense", **dense.to_dict(), "seconds": seconds}]
    for method, name in METHODS.items():
        began = time.perf_counter()
        destination = arguments.output / f"SmolLM2-135M-Instruct-{method}-2of4"
        report = prune(
            model,
            destination,
            PRESETS[method](),
            calibration=calibration,
            overwrite=True,
            quiet=arguments.quiet,
        )
        # The written model is read back and measured.
        result = perplexity(destination, evaluation, quiet=arguments.quiet)
        rows.append(
            {
                "method": name,
                **result.to_dict(),
                "mean_relative_loss": report.mean_relative_loss,
                "solver_seconds": sum(linear.seconds for linear in report.linears),
                "seconds": time.perf_counter() - began,
                "folder": str(destination),
            }
        )
    if arguments.json:
        print_json({"rows": rows, "peak_memory_bytes": peak_memory_bytes()})
        return 0
    print_table(COLUMNS, [_cells(row) for row in rows])
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
