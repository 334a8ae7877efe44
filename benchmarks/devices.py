"""Prunes the first linears of SmolLM2-135M on one, two and eight CPU devices, and compares them.

    python benchmarks/devices.py --calibration calib_mix.txt

The two layers' 14 linears are pruned on two devices, the 4 of the first attention on eight; once
by devices that share the rows of weights, and once with `shard_grams`. What is compared are masks,
block by block, and losses.
"""

import argparse
import itertools
from pathlib import Path

import jax
import numpy as np
from numpy.typing import NDArray
from prox24.cli.windows import calibration_windows
from prox24.pipeline import PrunedTensor, prune
from rich.console import Console
from rich.table import Table

from prox24 import ADMM, ConjugateGradients
from prox24.checkpoints.checkpoint import Checkpoint, open_checkpoint
from prox24.cli.demo_model import fetch_model

CASES = [(2, 14), (8, 4)]
"""How many devices, and how many linears."""


def first_linears(
    checkpoint: Checkpoint, windows: NDArray[np.int32], devices: int, count: int, shard_grams: bool
) -> list[PrunedTensor]:
    """The first linears, by ADMM and conjugate gradients."""
    mesh = None
    if devices > 1:
        mesh = jax.make_mesh((devices,), ("devices",), devices=jax.devices()[:devices])
    methods = (ADMM(), ConjugateGradients())
    linears = prune(checkpoint, windows, *methods, mesh=mesh, shard_grams=shard_grams)
    return list(itertools.islice(linears, count))


def compare(found: PrunedTensor, expected: PrunedTensor) -> tuple[int, float]:
    """Blocks with another mask, and the relative difference of the losses."""
    other = (found.values != 0) != (expected.values != 0)
    losses = [one.report.statistics.relative_loss for one in (found, expected) if one.report]
    return int(other.reshape(-1, 4).any(axis=1).sum()), abs(losses[0] / losses[1] - 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    checkpoint = open_checkpoint(fetch_model(Path(".cache")))
    windows = calibration_windows(
        checkpoint, arguments.calibration, arguments.samples, arguments.length
    )
    alone = first_linears(checkpoint, windows, 1, 14, False)
    table = Table()
    for title in ("devices", "shared", "linears", "blocks", "with another mask", "losses differ"):
        table.add_column(title, justify="left" if title == "shared" else "right")
    for shard_grams, (devices, count) in itertools.product((False, True), CASES):
        found = first_linears(checkpoint, windows, devices, count, shard_grams)
        blocks = sum(linear.values.size // 4 for linear in found)
        pairs = [compare(*pair) for pair in zip(found, alone, strict=False)]
        others, losses = zip(*pairs, strict=True)
        shared = "columns" if shard_grams else "rows"
        cells = (str(devices), shared, str(count), f"{blocks:,}", f"{sum(others):,}")
        table.add_row(*cells, f"{max(losses):.1e}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
