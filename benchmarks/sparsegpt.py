"""Times prox24's SparseGPT against the algorithm of the PyTorch original.

    python benchmarks/sparsegpt.py [--shapes SHAPES] [--repetitions N] [--json FILE] [--seed N]

Both prune the same layers to 2:4 in float32 with a damping of 0.01: weights standard normal, the
Gram from twice as many tokens as features. Neighbouring features have correlation 0.9, and eight
directions that all features share are added. The first call, which compiles, is timed apart. After
it each repetition runs both once, starting with the other than the last. Times are medians.

prox24 is called as users call it, so its time includes the losses that `prox24.solve` reports. The
losses shown here are computed in float64, relative to tr(W0 G W0^T).

JAX computes on its default device; PyTorch on the CPU, or on the GPU where there is CUDA.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rivals
import torch
from prox import environment
from rich.console import Console
from rich.table import Table

import prox24

DAMPING = 0.01
CORRELATION = 0.9
DIRECTIONS = 8
PROX24, PYTORCH = "prox24", "PyTorch"


@dataclass(frozen=True)
class Row:
    """One line of the result; `mask_agreement` is the share of the mask that equals PyTorch's."""

    shape: str
    contender: str
    first_seconds: float
    seconds: float
    ratio_to_pytorch: float
    relative_loss: float
    mask_agreement: float


def make_layer(out_width: int, in_width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight (out, in) and Gram (in, in), float32."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((out_width, in_width), np.float32)
    features = rng.standard_normal((in_width, 2 * in_width), np.float32)
    for before, feature in itertools.pairwise(features):
        feature *= (1 - CORRELATION**2) ** 0.5
        feature += CORRELATION * before
    loadings = rng.standard_normal((in_width, DIRECTIONS), np.float32)
    features += loadings @ rng.standard_normal((DIRECTIONS, 2 * in_width), np.float32)
    return weight, features @ features.T


def contenders(weight: np.ndarray, gram: np.ndarray) -> dict[str, Callable[[], tuple[Any, Any]]]:
    """Functions that return a pruned weight and its mask, on the device, when they are complete."""
    problem = prox24.LayerProblem(jax.device_put(weight), jax.device_put(gram))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch_weight = torch.from_numpy(weight).to(device)
    torch_gram = torch.from_numpy(gram).to(device)

    def in_jax() -> tuple[jax.Array, jax.Array]:
        found = prox24.solve(problem, prox24.SparseGPT(), None, damping=DAMPING)
        return jax.block_until_ready((found.weight, found.mask))

    def in_torch() -> tuple[torch.Tensor, torch.Tensor]:
        found = rivals.sparsegpt(torch_weight, torch_gram, DAMPING)
        if device == "cuda":
            torch.cuda.synchronize()
        return found

    return {PROX24: in_jax, PYTORCH: in_torch}


def timed(run: Callable[[], tuple[Any, Any]]) -> tuple[float, tuple[Any, Any]]:
    """Seconds, and what the function returns."""
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def as_numpy(array: Any) -> np.ndarray:
    return array.cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)


def relative_loss(pruned: np.ndarray, weight: np.ndarray, gram: np.ndarray) -> float:
    """tr((W - W0) G (W - W0)^T) / tr(W0 G W0^T), in float64."""
    weight, gram = weight.astype(np.float64), gram.astype(np.float64)
    difference = pruned - weight
    return float(np.sum((difference @ gram) * difference) / np.sum((weight @ gram) * weight))


def measure(out_width: int, in_width: int, repetitions: int, seed: int) -> list[Row]:
    """Both contenders on one layer."""
    weight, gram = make_layer(out_width, in_width, seed)
    field = contenders(weight, gram)
    first = {name: timed(run) for name, run in field.items()}
    times: dict[str, list[float]] = {name: [] for name in field}
    for repetition in range(repetitions):
        for name in sorted(field, reverse=repetition % 2 == 1):
            times[name].append(timed(field[name])[0])
    median = {name: statistics.median(each) for name, each in times.items()}
    weights = {name: as_numpy(found) for name, (_, (found, _)) in first.items()}
    masks = {name: as_numpy(mask) for name, (_, (_, mask)) in first.items()}
    return [
        Row(
            shape=f"{out_width}x{in_width}",
            contender=name,
            first_seconds=first[name][0],
            seconds=median[name],
            ratio_to_pytorch=median[name] / median[PYTORCH],
            relative_loss=relative_loss(weights[name], weight, gram),
            mask_agreement=float(np.mean(masks[name] == masks[PYTORCH])),
        )
        for name in field
    ]


def table(rows: Sequence[Row]) -> Table:
    """One line per shape and contender."""
    result = Table()
    result.add_column("shape", no_wrap=True)
    result.add_column("contender", no_wrap=True)
    for name in ("first\ncall s", "median\ns", "time /\nPyTorch", "relative\nloss", "same\nmask"):
        result.add_column(name, justify="right")
    for row in rows:
        result.add_row(
            row.shape,
            row.contender,
            f"{row.first_seconds:.3g}",
            f"{row.seconds:.3g}",
            f"{row.ratio_to_pytorch:.2f}",
            f"{row.relative_loss:.5f}",
            f"{row.mask_agreement:.3%}",
        )
    return result


def shapes(text: str) -> list[tuple[int, int]]:
    """Pairs of widths, out and in, from text like 4096x4096,576x576."""
    found = []
    for shape in text.split(","):
        out_width, _, in_width = shape.partition("x")
        if not (out_width.isdecimal() and in_width.isdecimal()):
            raise argparse.ArgumentTypeError(f"{shape} is not OUTxIN")
        found.append((int(out_width), int(in_width)))
        if 0 in found[-1] or found[-1][1] % 4:
            raise argparse.ArgumentTypeError(f"{shape} does not consist of blocks of four")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=shapes, default="4096x4096,576x576", help="OUTxIN,...")
    parser.add_argument("--repetitions", type=int, default=5, help="timings per contender")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    arguments = parser.parse_args()
    if arguments.repetitions < 1:
        parser.error(f"--repetitions {arguments.repetitions} is not positive")

    rows = [
        row
        for out_width, in_width in arguments.shapes
        for row in measure(out_width, in_width, arguments.repetitions, arguments.seed)
    ]
    settings = environment(with_rivals=True)
    console = Console()
    console.print(", ".join(f"{name} {value}" for name, value in settings.items()), soft_wrap=True)
    console.print(f"float32, {arguments.repetitions} repetitions, seed {arguments.seed}")
    console.print(table(rows))
    if arguments.json:
        figures = {
            "environment": settings,
            "repetitions": arguments.repetitions,
            "seed": arguments.seed,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
