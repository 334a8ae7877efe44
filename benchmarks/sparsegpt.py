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
from collections.abc import Callable
from typing import Any

import common
import jax
import numpy as np
import rivals
import torch

import prox24

DAMPING = 0.01
CORRELATION = 0.9
DIRECTIONS = 8
PROX24, PYTORCH = "prox24", "PyTorch"


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
    """Functions that return a pruned weight and its mask, on the device."""
    problem = prox24.LayerProblem(jax.device_put(weight), jax.device_put(gram))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = [torch.from_numpy(array).to(device) for array in (weight, gram)]

    def in_jax() -> tuple[jax.Array, jax.Array]:
        found = prox24.solve(problem, prox24.SparseGPT(), None, damping=DAMPING)
        return found.weight, found.mask

    def in_torch() -> tuple[torch.Tensor, torch.Tensor]:
        found = rivals.sparsegpt(*given, DAMPING)
        if device == "cuda":
            torch.cuda.synchronize()
        return found

    return {PROX24: in_jax, PYTORCH: in_torch}


def relative_loss(pruned: np.ndarray, weight: np.ndarray, gram: np.ndarray) -> float:
    """tr((W - W0) G (W - W0)^T) / tr(W0 G W0^T), in float64."""
    weight, gram = weight.astype(np.float64), gram.astype(np.float64)
    difference = pruned - weight
    return float(np.sum((difference @ gram) * difference) / np.sum((weight @ gram) * weight))


def measure(out_width: int, in_width: int, repetitions: int, seed: int) -> list[dict[str, Any]]:
    """A row for each contender on one layer."""
    weight, gram = make_layer(out_width, in_width, seed)
    field = contenders(weight, gram)
    first = {name: common.timed(run) for name, run in field.items()}
    seconds = common.medians(field, repetitions)
    found = {
        name: [np.asarray(part.cpu() if name == PYTORCH else part) for part in parts]
        for name, (_, parts) in first.items()
    }
    return [
        {
            "shape": f"{out_width}x{in_width}",
            "contender": name,
            "first_seconds": first[name][0],
            "seconds": seconds[name],
            "ratio_to_pytorch": seconds[name] / seconds[PYTORCH],
            "relative_loss": relative_loss(pruned, weight, gram),
            "mask_agreement": float(np.mean(mask == found[PYTORCH][1])),
        }
        for name, (pruned, mask) in found.items()
    ]


def shapes(text: str) -> list[tuple[int, int]]:
    """Pairs of widths, out and in, from text like 4096x4096,576x576."""
    found = []
    for shape in text.split(","):
        out_width, _, in_width = shape.partition("x")
        if not (out_width.isdecimal() and in_width.isdecimal()) or int(in_width) % 4:
            raise argparse.ArgumentTypeError(f"{shape} is not OUTxIN in blocks of four")
        found.append((int(out_width), int(in_width)))
    return found


FORMS = {
    "first\ncall s": ("first_seconds", ".3g"),
    "median\ns": ("seconds", ".3g"),
    "time /\nPyTorch": ("ratio_to_pytorch", ".2f"),
    "relative\nloss": ("relative_loss", ".5f"),
    "same\nmask": ("mask_agreement", ".3%"),
}


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--shapes", type=shapes, default="4096x4096,576x576", help="OUTxIN,...")
    parser.add_argument("--repetitions", type=common.positive, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    common.add_json(parser)
    arguments = parser.parse_args()
    rows = [
        row
        for shape in arguments.shapes
        for row in measure(*shape, arguments.repetitions, arguments.seed)
    ]
    settings = common.environment() | {"seed": arguments.seed}
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    lines = [
        (row["shape"], row["contender"], *(format(row[f], form) for f, form in FORMS.values()))
        for row in rows
    ]
    common.show(("shape", "contender", *FORMS), lines, left=2)
    common.write_json(arguments.json, {"environment": settings, "rows": rows})


if __name__ == "__main__":
    main()
