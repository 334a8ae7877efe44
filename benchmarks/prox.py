"""Times the 2:4 proximal operator against a copy and against the iterative ways of solving it.

    python benchmarks/prox.py [--blocks N] [--repetitions N] [--json FILE] [--skip-rivals]

All contenders get the same blocks of four, float32, standard normal, from a fixed seed. After a
warm-up each repetition runs every contender once, starting one contender further than the last, so
that a change in the machine's speed meets all of them; the slow ones take part in the first three
repetitions only. Times are medians. A contender's excess is its objective above the least objective
that any contender found for the same block, in float64, relative to the larger of that least and
1e-6 |y|^2.

The alternating minimisation is written twice: in ordinary tensor expressions, and tuned.

JAX computes on its default device; PyTorch on the CPU, or on the GPU where there is CUDA. Input and
output of the default size are 16 MiB each, which the cache of a large GPU holds: a larger --blocks
measures its memory.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import prox24
from prox24 import planes

SEED = 0
PENALTIES = (0.1, 0.3, 1.0)
ENTRIES_PER_ROW = 1024
SLOW_REPETITIONS = 3
COPY = "copy"
ALTERNATING_MINIMISATION = "alternating minimisation"
TUNED = f"{ALTERNATING_MINIMISATION}, tuned"


@dataclass(frozen=True)
class Contender:
    """A way to compute the proximal operator.

    Attributes:
      run: takes lam and returns its output when it is complete.
      blocks: turns that output into an array of shape (blocks, 4), outside of the timing.
      slow: takes part in the first repetitions only.
    """

    run: Callable[[float], Any]
    blocks: Callable[[Any], np.ndarray]
    slow: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the result; a ratio or an excess that does not exist is None."""

    lam: float
    contender: str
    nanoseconds_per_block: float
    gigabytes_per_second: float
    ratio_to_copy: float
    ratio_to_alternating_minimisation: float | None
    ratio_to_tuned: float | None
    worst_excess: float | None
    mean_excess: float | None


def contenders(y: np.ndarray, with_rivals: bool) -> dict[str, Contender]:
    """The copy, prox24's forms, and, if asked for, the rivals, each with its input in place.

    Args:
      y: float32 array whose rows are whole blocks of four.
      with_rivals: whether to take part those of `rivals`, which needs PyTorch.
    """
    interleaved = jax.device_put(y)
    rows_of_four = jax.device_put(y.reshape(-1, 4))
    planar = jax.block_until_ready(planes.split(interleaved))
    copy = jax.jit(lambda y: y * 1.5)
    prox, planar_prox = jax.jit(prox24.prox), jax.jit(planes.prox)

    def as_blocks(w: Any) -> np.ndarray:
        return np.asarray(w).reshape(-1, 4)

    found = {
        COPY: Contender(lambda lam: jax.block_until_ready(copy(interleaved)), as_blocks),
        "prox24.prox": Contender(
            lambda lam: jax.block_until_ready(prox(interleaved, lam)), as_blocks
        ),
        "prox24.prox, rows of one block": Contender(
            lambda lam: jax.block_until_ready(prox(rows_of_four, lam)), as_blocks
        ),
        "prox24.planes.prox": Contender(
            lambda lam: jax.block_until_ready(planar_prox(planar, lam)),
            lambda w: np.stack([np.asarray(plane).ravel() for plane in w], axis=-1),
        ),
    }
    if not with_rivals:
        return found

    import rivals
    import torch

    # XLA flushes them too. Entries that decay to zero would be slowed down without it.
    torch.set_flush_denormal(True)
    torch_device = "cuda" if torch.cuda.is_available() else "cpu"
    torch_blocks = torch.from_numpy(as_blocks(y)).to(torch_device)
    jax_blocks = jax.device_put(as_blocks(y))

    def in_torch(rival: Callable[[torch.Tensor, float], torch.Tensor]) -> Contender:
        def run(lam: float) -> torch.Tensor:
            w = rival(torch_blocks, lam)
            if w.is_cuda:
                torch.cuda.synchronize()
            return w

        return Contender(run, lambda w: w.cpu().numpy(), slow=True)

    return found | {
        ALTERNATING_MINIMISATION: in_torch(rivals.alternating_minimisation),
        TUNED: in_torch(rivals.tuned_alternating_minimisation),
        "gradient descent": Contender(
            lambda lam: jax.block_until_ready(rivals.gradient_descent(jax_blocks, lam)),
            as_blocks,
            slow=True,
        ),
    }


def time_all(
    field: dict[str, Contender], lam: float, repetitions: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Median seconds of each contender, and its output as blocks, by name."""
    seconds: dict[str, list[float]] = {name: [] for name in field}
    outputs = {name: each.blocks(each.run(lam)) for name, each in field.items()}
    names = list(field)
    for repetition in range(repetitions):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            if field[name].slow and repetition >= SLOW_REPETITIONS:
                continue
            start = time.perf_counter()
            field[name].run(lam)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}, outputs


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


def measure(y: np.ndarray, repetitions: int, with_rivals: bool) -> list[Row]:
    """Every contender at every penalty."""
    field = contenders(y, with_rivals)
    blocks = y.reshape(-1, 4)
    rows = []
    for lam in PENALTIES:
        seconds, outputs = time_all(field, lam, repetitions)
        excess = excesses({name: w for name, w in outputs.items() if name != COPY}, blocks, lam)
        ordinary, tuned = seconds.get(ALTERNATING_MINIMISATION), seconds.get(TUNED)
        rows += [
            Row(
                lam=lam,
                contender=name,
                nanoseconds_per_block=median / len(blocks) * 1e9,
                gigabytes_per_second=2 * y.nbytes / median / 1e9,
                ratio_to_copy=median / seconds[COPY],
                ratio_to_alternating_minimisation=ordinary and median / ordinary,
                ratio_to_tuned=tuned and median / tuned,
                worst_excess=float(excess[name].max()) if name in excess else None,
                mean_excess=float(excess[name].mean()) if name in excess else None,
            )
            for name, median in seconds.items()
        ]
    return rows


def environment(with_rivals: bool) -> dict[str, Any]:
    """What the figures depend on."""
    found: dict[str, Any] = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }
    if with_rivals:
        import torch

        found["torch"] = torch.__version__
        found["torch device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        found["torch threads"] = torch.get_num_threads()
    return found


def table(rows: Sequence[Row], lam: float) -> Table:
    """One line per contender, of the rows of one penalty."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    bandwidth = next(row.gigabytes_per_second for row in rows if row.contender == COPY)
    result = Table(title=f"lam = {lam}, copy at {bandwidth:.3g} GB/s", title_justify="left")
    result.add_column("contender", no_wrap=True)
    for name in (
        "ns per\nblock",
        "time /\ncopy",
        "of copy's\nbandwidth",
        "time /\nalternating",
        "time /\ntuned",
        "worst\nexcess",
        "mean\nexcess",
    ):
        result.add_column(name, justify="right")
    for row in rows:
        result.add_row(
            row.contender,
            cell(row.nanoseconds_per_block, ".3g"),
            cell(row.ratio_to_copy, ".3g"),
            cell(1 / row.ratio_to_copy, ".2%"),
            cell(row.ratio_to_alternating_minimisation, ".2g"),
            cell(row.ratio_to_tuned, ".2g"),
            cell(row.worst_excess, ".1e"),
            cell(row.mean_excess, ".1e"),
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=1 << 20, help="blocks of four")
    parser.add_argument("--repetitions", type=int, default=7, help="timings per contender")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--skip-rivals", action="store_true", help="run without PyTorch")
    arguments = parser.parse_args()
    per_row = ENTRIES_PER_ROW // 4
    if arguments.blocks < 1 or arguments.blocks % per_row:
        parser.error(f"--blocks {arguments.blocks} is not a positive multiple of {per_row}")
    if arguments.repetitions < 1:
        parser.error(f"--repetitions {arguments.repetitions} is not positive")

    with_rivals = not arguments.skip_rivals
    shape = arguments.blocks // per_row, ENTRIES_PER_ROW
    y = np.random.default_rng(SEED).standard_normal(shape, np.float32)
    rows = measure(y, arguments.repetitions, with_rivals)

    settings = environment(with_rivals)
    # Wide enough for one line per contender, where there is no terminal either.
    console = Console(width=max(Console().width, 120))
    console.print(", ".join(f"{name} {value}" for name, value in settings.items()), soft_wrap=True)
    console.print(
        f"{arguments.blocks} blocks of four, float32, {arguments.repetitions} repetitions"
    )
    for lam in PENALTIES:
        console.print(table([row for row in rows if row.lam == lam], lam))
    if arguments.json:
        figures = {
            "environment": settings,
            "blocks": arguments.blocks,
            "repetitions": arguments.repetitions,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
