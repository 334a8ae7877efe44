"""Times prox24's SparseGPT against the algorithm of the PyTorch original.

    python benchmarks/sparsegpt.py [--shapes OUTxIN ...] [--repetitions N]

Both prune the same layers to 2:4 in float32 with a damping of 0.01: weights standard normal, the
Gram from twice as many tokens as features. Neighbouring features have correlation 0.9, and eight
directions that all features share are added. Times are medians after a first call, which compiles;
each repetition runs both once, starting with the other than the last.

prox24 is called as users call it, so its time includes the losses that `prox24.solve` reports. The
losses shown here are computed in float64, relative to tr(W0 G W0^T).

JAX computes on its default device; PyTorch on the CPU, or on the GPU where there is CUDA.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

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


class Measured(NamedTuple):
    """Of one contender on one layer."""

    contender: str
    seconds: float
    ratio_to_pytorch: float
    relative_loss: float
    mask_agreement: float


def make_layer(out_width: int, in_width: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight (out, in) and Gram (in, in), float32."""
    rng = np.random.default_rng(0)
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
    problem = jax.device_put(weight), jax.device_put(gram)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = [torch.from_numpy(array).to(device) for array in (weight, gram)]

    def in_jax() -> tuple[jax.Array, jax.Array]:
        found = prox24.solve(*problem, prox24.SparseGPT(), None, damping=DAMPING)
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


def measure(out_width: int, in_width: int, repetitions: int) -> list[Measured]:
    """Both contenders on one layer."""
    weight, gram = make_layer(out_width, in_width)
    field, rows = contenders(weight, gram), []
    in_jax, in_torch = (run() for run in field.values())
    results = {PROX24: in_jax, PYTORCH: tuple(part.cpu() for part in in_torch)}
    seconds = common.medians(field, repetitions)
    for name, (pruned, mask) in results.items():
        ratio = seconds[name] / seconds[PYTORCH]
        loss = relative_loss(np.asarray(pruned), weight, gram)
        agreement = np.mean(np.asarray(mask) == results[PYTORCH][1].numpy())
        rows.append(Measured(name, seconds[name], ratio, loss, float(agreement)))
    return rows


def shape(text: str) -> tuple[int, int]:
    """The widths of a layer, out and in, from text like 4096x4096."""
    out_width, in_width = text.split("x")
    return int(out_width), int(in_width)


def main() -> None:
    parser = common.parser_of(__doc__)
    default = [(4096, 4096), (576, 576)]
    parser.add_argument("--shapes", type=shape, nargs="+", default=default, metavar="OUTxIN")
    parser.add_argument("--repetitions", type=common.positive, default=5)
    arguments = parser.parse_args()
    lines = []
    for out_width, in_width in arguments.shapes:
        for row in measure(out_width, in_width, arguments.repetitions):
            times = f"{row.seconds:.3g}", f"{row.ratio_to_pytorch:.2f}"
            quality = f"{row.relative_loss:.5f}", f"{row.mask_agreement:.3%}"
            lines.append((f"{out_width}x{in_width}", row.contender, *times, *quality))
    titles = "median\ns", "time /\nPyTorch", "relative\nloss", "same\nmask"
    common.show(("shape", "contender", *titles), lines, left=2, title=common.environment())


if __name__ == "__main__":
    main()
