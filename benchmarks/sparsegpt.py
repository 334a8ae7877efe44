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

import common
import jax
import numpy as np
import rivals
import torch

import prox24

DAMPING = 0.01
CORRELATION = 0.9
DIRECTIONS = 8
PYTORCH = "PyTorch"


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


def relative_loss(pruned: np.ndarray, weight: np.ndarray, gram: np.ndarray) -> float:
    """tr((W - W0) G (W - W0)^T) / tr(W0 G W0^T), in float64."""
    weight, gram = weight.astype(np.float64), gram.astype(np.float64)
    difference = pruned - weight
    return float(np.sum((difference @ gram) * difference) / np.sum((weight @ gram) * weight))


def measure(
    out_width: int, in_width: int, repetitions: int
) -> dict[str, tuple[float, float, float]]:
    """Seconds and loss of each on one layer, and the share of the mask that is PyTorch's too."""
    weight, gram = make_layer(out_width, in_width)
    given = jax.device_put((weight, gram))
    in_torch = [torch.from_numpy(array).to(rivals.DEVICE) for array in (weight, gram)]
    runs = {
        "prox24": lambda: prox24.solve(*given, prox24.SparseGPT(), None, damping=DAMPING),
        PYTORCH: lambda: rivals.finished(rivals.sparsegpt(*in_torch, DAMPING)),
    }
    ours, theirs = (run() for run in runs.values())
    results = [(ours.weight, ours.mask), [part.cpu() for part in theirs]]
    masks = [np.asarray(mask) for _, mask in results]
    seconds = common.medians(runs, repetitions)
    return {
        name: (seconds[name], relative_loss(np.asarray(w), weight, gram), np.mean(mask == masks[1]))
        for name, (w, _), mask in zip(runs, results, masks, strict=True)
    }


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
    for widths in arguments.shapes:
        found = measure(*widths, arguments.repetitions)
        for name, (seconds, loss, same) in found.items():
            times = f"{seconds:.3g}", f"{seconds / found[PYTORCH][0]:.2f}"
            lines.append(("x".join(map(str, widths)), name, *times, f"{loss:.5f}", f"{same:.3%}"))
    titles = "median\ns", "time /\nPyTorch", "relative\nloss", "same\nmask"
    common.show(("shape", "contender", *titles), lines, title=common.environment())


if __name__ == "__main__":
    main()
