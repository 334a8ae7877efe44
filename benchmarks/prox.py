"""Times the 2:4 proximal operator against a copy and against the iterative ways of solving it.

    python benchmarks/prox.py [--blocks N] [--repetitions N] [--json FILE] [--skip-rivals]

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

import functools
from collections.abc import Callable
from typing import Any

import common
import jax
import numpy as np

import prox24
from prox24 import planes

PENALTIES = (0.1, 0.3, 1.0)
ENTRIES_PER_ROW = 1024
COPY = "copy"
ALTERNATING, TUNED = "alternating minimisation", "alternating minimisation, tuned"
DESCENT = "gradient descent"
SLOW = {ALTERNATING, TUNED, DESCENT}

Contenders = dict[str, Callable[[float], Any]]


def contenders(y: np.ndarray, with_rivals: bool) -> Contenders:
    """The copy, prox24's forms, and, if asked for, the rivals, which need PyTorch."""
    interleaved, blocks = jax.device_put(y), jax.device_put(y.reshape(-1, 4))
    planar = jax.block_until_ready(planes.split(interleaved))
    copy = jax.jit(lambda y, lam: y * 1.5)
    prox, planar_prox = jax.jit(prox24.prox), jax.jit(planes.prox)
    found: Contenders = {
        COPY: functools.partial(copy, interleaved),
        "prox24.prox": functools.partial(prox, interleaved),
        "prox24.prox, rows of one block": functools.partial(prox, blocks),
        "prox24.planes.prox": functools.partial(planar_prox, planar),
    }
    if not with_rivals:
        return found

    import rivals
    import torch

    # XLA flushes them too. Entries that decay to zero would be slowed down without it.
    torch.set_flush_denormal(True)
    cuda = torch.cuda.is_available()
    torch_blocks = torch.from_numpy(y.reshape(-1, 4)).to("cuda" if cuda else "cpu")

    def in_torch(rival: Callable[[torch.Tensor, float], torch.Tensor], lam: float) -> torch.Tensor:
        w = rival(torch_blocks, lam)
        if cuda:
            torch.cuda.synchronize()
        return w

    return found | {
        ALTERNATING: functools.partial(in_torch, rivals.alternating_minimisation),
        TUNED: functools.partial(in_torch, rivals.tuned_alternating_minimisation),
        DESCENT: functools.partial(rivals.gradient_descent, blocks),
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


def measure(y: np.ndarray, lam: float, repetitions: int, with_rivals: bool) -> list[dict[str, Any]]:
    """A row for each contender; a ratio or an excess that does not exist is None."""
    runs = {n: functools.partial(run, lam) for n, run in contenders(y, with_rivals).items()}
    outputs = {name: as_blocks(run()) for name, run in runs.items()}
    seconds = common.medians(runs, repetitions, SLOW)

    def ratio(median: float, other: float | None) -> float | None:
        return None if other is None else median / other

    blocks = y.reshape(-1, 4)
    excess = excesses({name: w for name, w in outputs.items() if name != COPY}, blocks, lam)
    return [
        {
            "lam": lam,
            "contender": name,
            "nanoseconds_per_block": median / len(blocks) * 1e9,
            "gigabytes_per_second": 2 * y.nbytes / median / 1e9,
            "ratio_to_copy": median / seconds[COPY],
            "ratio_to_alternating_minimisation": ratio(median, seconds.get(ALTERNATING)),
            "ratio_to_tuned": ratio(median, seconds.get(TUNED)),
            "worst_excess": float(excess[name].max()) if name in excess else None,
            "mean_excess": float(excess[name].mean()) if name in excess else None,
        }
        for name, median in seconds.items()
    ]


TITLES = {
    "nanoseconds_per_block": ("ns per\nblock", ".3g"),
    "ratio_to_copy": ("time /\ncopy", ".3g"),
    "ratio_to_alternating_minimisation": ("time /\nalternating", ".2g"),
    "ratio_to_tuned": ("time /\ntuned", ".2g"),
    "worst_excess": ("worst\nexcess", ".1e"),
    "mean_excess": ("mean\nexcess", ".1e"),
}
"""The columns of the table."""


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--blocks", type=common.positive, default=1 << 20, help="blocks of four")
    parser.add_argument("--repetitions", type=common.positive, default=7)
    parser.add_argument("--skip-rivals", action="store_true", help="run without PyTorch")
    common.add_json(parser)
    arguments = parser.parse_args()
    per_row = ENTRIES_PER_ROW // 4
    if arguments.blocks % per_row:
        parser.error(f"--blocks {arguments.blocks} is not a multiple of {per_row}")
    shape = arguments.blocks // per_row, ENTRIES_PER_ROW
    y = np.random.default_rng(0).standard_normal(shape, np.float32)
    figures = []
    for lam in PENALTIES:
        rows = measure(y, lam, arguments.repetitions, not arguments.skip_rivals)
        figures += rows
        lines = [
            (
                row["contender"],
                *(
                    "" if row[field] is None else format(row[field], form)
                    for field, (_, form) in TITLES.items()
                ),
            )
            for row in rows
        ]
        title = f"lam = {lam}, copy at {rows[0]['gigabytes_per_second']:.3g} GB/s"
        common.show(("contender", *(name for name, _ in TITLES.values())), lines, title=title)
    settings = common.environment() | {"blocks": arguments.blocks}
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    common.write_json(arguments.json, {"environment": settings, "rows": figures})


if __name__ == "__main__":
    main()
