"""`prox24 demo`: a real 135M-parameter model, pruned by the baselines and the default."""

import argparse
import contextlib
import time
from typing import Any

from prox24.checkpoints.checkpoint import open_checkpoint
from prox24.checkpoints.writer import write_checkpoint
from prox24.cli.demo_model import fetch_model
from prox24.cli.output import peak_memory_bytes, print_json, print_table
from prox24.cli.prune import choose, choose_pull, prune_with_progress, tensors_of
from prox24.cli.windows import calibration_windows, evaluation_windows
from prox24.errors import CheckpointError
from prox24.jobs.perplexity import perplexity
from prox24.pipeline import LinearReport

METHODS = ("magnitude", "wanda", "sparsegpt", "admm")
COLUMNS = ["method", "perplexity", "mean relative loss", "solver s", "total s"]


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; the exit code."""
    for folder in (arguments.cache, arguments.output):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make the folder {folder}: {error.strerror}") from error
    checkpoint = open_checkpoint(fetch_model(arguments.cache))
    evaluation = evaluation_windows(
        checkpoint, arguments.text, arguments.evaluation_samples, arguments.sequence_length
    )
    calibration = calibration_windows(
        checkpoint, arguments.calibration, arguments.samples, arguments.sequence_length
    )
    if not (arguments.quiet or arguments.json):
        print(
            f"SmolLM2-135M-Instruct, 2:4. Calibration: {calibration.size} tokens. "
            f"Perplexity: {evaluation.size} tokens in windows of {evaluation.shape[1]}."
        )

    began = time.perf_counter()
    dense = perplexity(checkpoint, evaluation)
    rows: list[dict[str, Any]] = [
        {"method": "dense", **dense._asdict(), "seconds": time.perf_counter() - began}
    ]
    for method in METHODS:
        began = time.perf_counter()
        (solver, refit), pull = choose(method), choose_pull(method)
        linears = prune_with_progress(
            checkpoint,
            calibration,
            solver,
            refit,
            title=method,
            pattern=(2, 4),
            damping=0.01,
            pull=pull,
            quiet=arguments.quiet,
        )
        destination = arguments.output / f"SmolLM2-135M-Instruct-{method}-2of4"
        reports: list[LinearReport | None] = []
        with contextlib.closing(linears):
            write_checkpoint(checkpoint, destination, tensors_of(linears, reports), overwrite=True)
        # What is measured is what was written, read back.
        result = perplexity(open_checkpoint(destination), evaluation)
        pruned = [report for report in reports if report is not None]
        losses = [report.statistics.relative_loss for report in pruned]
        rows.append(
            {
                "method": method
                + ("" if refit is None else " + refit")
                + ("" if pull is None else ", dense targets"),
                **result._asdict(),
                "mean_relative_loss": sum(losses) / len(losses),
                "solver_seconds": sum(report.seconds for report in pruned),
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
