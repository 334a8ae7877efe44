"""Times the 2:4 proximal operator against a copy and against the iterative ways of solving it.

    python benchmarks/prox.py [--blocks N] [--repetitions N]

All contenders get the same blocks of four, float32, standard normal, from a fixed seed. After a
warm-up each repetition runs every contender once; the slow ones take part in the first three
repetitions only. Times are medians. A contender's excess is its objective above the least objective
that any contender found for the same block, in float64, relative to the larger of that least and
1e-6 |y|^2.

The alternating minimisation is written twice: in ordinary tensor expressions, and tuned.

JAX computes on its default device; PyTorch on the CPU, or on the GPU where there is CUDA. Input and
output of the default size are 16 MiB each, which the cache of a large GPU holds: a larger --blocks
measures its memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import common
import jax
import numpy as np
import rivals
import torch
from rivals import alternating_minimisation, finished, tuned_alternating_minimisation

import prox24
from prox24 import planes

PENALTIES = (0.1, 0.3, 1.0)
ENTRIES_PER_ROW = 1024
COPY = "copy"
ALTERNATING, TUNED = "alternating minimisation", "alternating minimisation, tuned"
DESCENT = "gradient descent"
SLOW = {ALTERNATING, TUNED, DESCENT}


def contenders(y: np.ndarray) -> dict[str, Callable[[float], Any]]:
    """The copy, prox24's forms, and the rivals."""
    interleaved, blocks = jax.device_put(y), jax.device_put(y.reshape(-1, 4))
    planar = jax.block_until_ready(planes.split(interleaved))
    prox = jax.jit(prox24.prox)
    torch_blocks = torch.from_numpy(y.reshape(-1, 4)).to(rivals.DEVICE)
    return {
        COPY: partial(jax.jit(lambda y, lam: y * 1.5), interleaved),
        "prox24.prox": partial(prox, interleaved),
        "prox24.prox, rows of one block": partial(prox, blocks),
        "prox24.planes.prox": partial(jax.jit(planes.prox), planar),
        ALTERNATING: lambda lam: finished(alternating_minimisation(torch_blocks, lam)),
        TUNED: lambda lam: finished(tuned_alternating_minimisation(torch_blocks, lam)),
        DESCENT: partial(rivals.gradient_descent, blocks),
    }


def as_blocks(w: Any) -> np.ndarray:
    """The output of any contender, shape (blocks, 4)."""
    if isinstance(w, tuple):
        return np.stack([np.asarray(plane).ravel() for plane in w], axis=-1)
    return np.asarray(w.cpu() if hasattr(w, "cpu") else w).reshape(-1, 4)


def objective(w: np.ndarray, y: np.ndarray, lam: float) -> np.ndarray:
    """1/2 |w - y|^2 + lam e3(|w|) of each block, in float64."""
    w, y = w.astype(np.float64), y.astype(np.float64)
    a, b, c, d = np.abs(w).T
    return np.sum((w - y) ** 2, axis=-1) / 2 + lam * (a * b * (c + d) + c * d * (a + b))


def excesses(outputs: dict[str, np.ndarray], y: np.ndarray, lam: float) -> dict[str, np.ndarray]:
    """Relative excess of each output's objective over the least of them, block by block."""
    values = {name: objective(w, y, lam) for name, w in outputs.items()}
    least = np.min(list(values.values()), axis=0)
    scale = np.maximum(least, 1e-6 * np.sum(y.astype(np.float64) ** 2, axis=-1))
    return {name: (value - least) / scale for name, value in values.items()}


def measure(
    y: np.ndarray, lam: float, repetitions: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Seconds of each contender, and the excesses of all but the copy."""
    runs = {name: partial(run, lam) for name, run in contenders(y).items()}
    outputs = {name: as_blocks(run()) for name, run in runs.items() if name != COPY}
    runs[COPY]()
    return common.medians(runs, repetitions, SLOW), excesses(outputs, y.reshape(-1, 4), lam)


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--blocks", type=common.positive, default=1 << 20, help="blocks of four")
    parser.add_argument("--repetitions", type=common.positive, default=7)
    arguments = parser.parse_args()
    per_row = ENTRIES_PER_ROW // 4
    if arguments.blocks % per_row:
        parser.error(f"--blocks {arguments.blocks} is not a multiple of {per_row}")
    # XLA flushes them too. Entries that decay to zero would be slowed down without it.
    torch.set_flush_denormal(True)
    shape = arguments.blocks // per_row, ENTRIES_PER_ROW
    y = np.random.default_rng(0).standard_normal(shape, np.float32)
    references = COPY, ALTERNATING, TUNED
    titles = "ns per\nblock", "time /\ncopy", "time /\nalternating", "time /\ntuned"
    for lam in PENALTIES:
        seconds, excess = measure(y, lam, arguments.repetitions)
        lines = []
        for name, median in seconds.items():
            ratios = [f"{median / seconds[other]:.3g}" for other in references]
            worst = f"{excess[name].max():.1e}" if name in excess else ""
            lines.append((name, f"{median / arguments.blocks * 1e9:.3g}", *ratios, worst))
        speed = 2 * y.nbytes / seconds[COPY] / 1e9
        title = f"lam = {lam}, copy at {speed:.3g} GB/s, {common.environment()}"
        common.show(("contender", *titles, "worst\nexcess"), lines, title=title)


if __name__ == "__main__":
    main()
