"""Prunes the first linears of SmolLM2-135M on one, two and eight CPU devices, and compares them.

    python benchmarks/devices.py

The two layers' 14 linears are pruned on two devices, the 4 of the first attention on eight; once
by devices that share the rows of weights, and once with `shard_grams`. The masks are compared block
by block, and so are the losses.
"""

import itertools

import jax
import numpy as np
from common import add_calibration, dense_model, own_targets, parser_of, positive, show

from prox24 import ADMM, ConjugateGradients, Text
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._jobs.native import native_runner
from prox24._jobs.text import calibration_windows
from prox24._pruning.loop import PrunedTensor, prune_stages

CASES = [(2, 14), (8, 4)]
"""The numbers of devices and of linears."""


def compare(found: PrunedTensor, expected: PrunedTensor) -> tuple[int, float]:
    """Blocks with another mask, and the relative difference of the losses."""
    other = (found.values != 0) != (expected.values != 0)
    losses = [one.reports[0].statistics.relative_loss for one in (found, expected)]
    return int(other.reshape(-1, 4).any(axis=1).sum()), abs(losses[0] / losses[1] - 1)


def main() -> None:
    parser = parser_of(__doc__)
    add_calibration(parser)
    parser.add_argument("--samples", type=positive, default=64, help="calibration windows")
    parser.add_argument("--length", type=positive, default=256, help="tokens of a window")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    model, recipe = open_checkpoint(dense_model()), own_targets(ADMM(), ConjugateGradients())
    text = Text(arguments.calibration, arguments.samples, arguments.length)
    windows = calibration_windows(model, text)

    def first_linears(devices: int, count: int, shard_grams: bool) -> list[PrunedTensor]:
        mesh = None
        if devices > 1:
            mesh = jax.make_mesh((devices,), ("devices",), devices=jax.devices()[:devices])
        runner = native_runner(model, windows, recipe, mesh=mesh, shard_grams=shard_grams)
        return list(itertools.islice(prune_stages(runner, recipe), count))

    alone, rows = first_linears(1, max(count for _, count in CASES), False), []
    for shard_grams, (devices, count) in itertools.product((False, True), CASES):
        found = first_linears(devices, count, shard_grams)
        others, losses = np.transpose([compare(*pair) for pair in zip(found, alone, strict=False)])
        blocks = sum(linear.values.size // 4 for linear in found)
        shared = "columns" if shard_grams else "rows"
        cells = f"{blocks:,}", f"{int(others.sum()):,}", f"{losses.max():.1e}"
        rows.append((shared, str(devices), str(count), *cells))
    show(("shared", "devices", "linears", "blocks", "with another mask", "losses differ"), rows)


if __name__ == "__main__":
    main()
