"""Times products with packed weights against dense ones, for the linears of Llama 8B and 70B.

    python benchmarks/matmul.py --seconds 0.5
    python benchmarks/matmul.py --seconds 0.5 --batches 1,16,32 --dtype bfloat16

Every contender multiplies the same random weight and vectors: XLA with the dense weight, in two
forms, and each of prox24's implementations that can. Times are medians, in turns, so that a change
in the machine's speed meets all; speeds are relative to the faster dense form. The error is the
largest difference to the product in float64 of eight vectors and 64 rows, relative to the largest
entry.

The roofline of a contender is the longer of two times: to read its weight and vectors and write its
result, at the speed at which 256 MiB are negated in place; and to multiply, at the speed of a dense
product of 2,048 x 2,048 matrices. A packed weight has half of the multiplications.

A case whose dense product would take more than --seconds, or half of the free memory, is made
smaller: inputs and outputs are halved until it fits. Writes matmul.csv and matmul.png.
"""

import argparse
import csv
import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

import prox24
from prox24.packed import matmul, pack
from prox24.packed.choice import IMPLEMENTATIONS, UNPACK, Case

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHAPES = {
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B up-gate": (28672, 4096),
    "8B down": (4096, 14336),
    "70B qkv": (10240, 8192),
    "70B o": (8192, 8192),
    "70B up-gate": (57344, 8192),
    "70B down": (8192, 28672),
}
BATCHES = (1, 16, 32, 8192, 16384, 32768)
DENSE = {"dense x W^T": lambda x, w: x @ w.T, "dense W x^T": lambda x, w: (w @ x.T).T}
"""XLA's products with a dense weight, either of which may be the faster one."""
NEGATED_BYTES, PEAK_WIDTH = 1 << 28, 2048
CHECKED_VECTORS, CHECKED_ROWS = 8, 64
WAKING_SECONDS = 0.02
Run = Callable[[], Any]


def medians(runs: Mapping[str, Run], repetitions: int) -> dict[str, float]:
    """Median seconds of each, in turns, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            # A processor that had nothing to do is slow at first.
            awake = time.perf_counter() + WAKING_SECONDS
            while True:
                start = time.perf_counter()
                jax.block_until_ready(run())
                if start > awake:
                    break
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def machine_speeds(dtype: str, repetitions: int) -> tuple[float, float]:
    """Bytes that are read and written, and multiplications of a dense product, in a second."""
    square = jax.random.normal(jax.random.key(0), (PEAK_WIDTH, PEAK_WIDTH)).astype(dtype)
    # In place, since fresh memory has to be cleared by the system first.
    negate = jax.jit(jnp.negative, donate_argnums=0)
    latest = [jnp.ones(NEGATED_BYTES // 4, jnp.float32)]

    def rewrite() -> jax.Array:
        latest.append(negate(latest.pop()))
        return latest[0]

    product = jax.jit(lambda x: x @ x)
    runs = {"memory": rewrite, "product": lambda: product(square)}
    seconds = medians(runs, repetitions)
    return 2 * NEGATED_BYTES / seconds["memory"], PEAK_WIDTH**3 / seconds["product"]


def roofline(case: Case, weight_bytes: float, share: float, speeds: tuple[float, float]) -> float:
    """Seconds of a product that makes a share of the dense multiplications."""
    size = jnp.dtype(case.dtype).itemsize
    moved = weight_bytes + case.batch * (case.inputs + case.outputs) * size
    multiplications = share * case.batch * case.outputs * case.inputs
    return max(moved / speeds[0], multiplications / speeds[1])


def fitting(
    case: Case, scale: float, speeds: tuple[float, float], limit: float
) -> tuple[Case, float]:
    """The largest case, scaled and halved, that fits; and its scale."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = jax.devices()[0].memory_stats()
    if memory and "bytes_limit" in memory:
        free = memory["bytes_limit"] - memory["bytes_in_use"]
    while True:
        outputs, inputs = (max(round(n * scale / 32), 1) * 32 for n in case[2:4])
        scaled = case._replace(outputs=outputs, inputs=inputs)
        # In float32: the weight in several forms, and two copies of the vectors.
        needed = 4 * (6 * outputs * inputs + 2 * case.batch * (inputs + outputs))
        weight_bytes = outputs * inputs * jnp.dtype(case.dtype).itemsize
        fast = roofline(scaled, weight_bytes, 1, speeds) < limit
        if (needed < free / 2 and fast) or outputs == inputs == 32:
            return scaled, scale
        scale /= 2


def measure(
    case: Case, speeds: tuple[float, float], repetitions: int
) -> dict[str, dict[str, float]]:
    """Seconds, relative speed, fraction of the roofline and error of each contender."""
    keys = jax.random.split(jax.random.key(0))
    dense = jax.random.normal(keys[0], (case.outputs, case.inputs))
    dense = jnp.where(prox24.top_mask(jnp.abs(dense)), dense, 0).astype(case.dtype)
    x = jax.random.normal(keys[1], (case.batch, case.inputs)).astype(case.dtype)
    w = pack(dense)
    runs: dict[str, Run] = {
        name: functools.partial(jax.jit(form), x, dense) for name, form in DENSE.items()
    }
    for name in (UNPACK, *IMPLEMENTATIONS):
        if name == UNPACK or IMPLEMENTATIONS[name].problem(case) is None:
            runs[name] = functools.partial(
                jax.jit(matmul, static_argnames="implementation"), x, w, implementation=name
            )
    exact = np.asarray(x[:CHECKED_VECTORS], np.float64)
    exact = exact @ np.asarray(dense[:CHECKED_ROWS], np.float64).T
    seconds = medians(runs, repetitions)
    fastest = min(seconds[name] for name in DENSE)
    rows = {}
    for name, run in runs.items():
        found = np.asarray(run()[:CHECKED_VECTORS, :CHECKED_ROWS], np.float64)
        weight_bytes, share = (dense.nbytes, 1) if name in DENSE else (w.nbytes, 0.5)
        rows[name] = {
            "seconds": seconds[name],
            "speed_relative_to_dense": fastest / seconds[name],
            "fraction_of_roofline": roofline(case, weight_bytes, share, speeds) / seconds[name],
            "error": float(np.abs(found - exact).max() / np.abs(exact).max()),
        }
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed relative to the dense product, a panel for each batch."""
    batches, linears, names = (
        list(dict.fromkeys(row[key] for row in rows if row["contender"] not in DENSE))
        for key in ("batch", "linear", "contender")
    )
    figure, panels = plt.subplots(
        len(batches), 1, figsize=(8, 1.6 * len(batches) + 1), sharex=True, squeeze=False
    )
    width = 0.8 / len(names)
    for batch, panel in zip(batches, panels[:, 0], strict=True):
        for i, name in enumerate(names):
            shown = [row for row in rows if (row["batch"], row["contender"]) == (batch, name)]
            places = [
                linears.index(row["linear"]) + (i - (len(names) - 1) / 2) * width for row in shown
            ]
            speeds = [row["speed_relative_to_dense"] for row in shown]
            panel.bar(places, speeds, 0.95 * width, label=name, color=f"C{i}")
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_ylabel(f"batch {batch}")
        panel.set_xticks(range(len(linears)), linears, rotation=30, ha="right")
    panels[0, 0].legend(ncols=len(names), frameon=False, fontsize="small")
    figure.suptitle(f"speed relative to the dense product, {rows[0]['dtype']}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), metavar="N,...")
    parser.add_argument("--scale", type=float, default=1.0, help="of inputs and outputs (1)")
    parser.add_argument("--linears", default=",".join(SHAPES), help="which of them")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--repetitions", type=int, default=7, help="timings per contender")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a dense product at most (2)")
    parser.add_argument("--output", type=Path, default=Path("."), metavar="FOLDER")
    arguments = parser.parse_args()

    dtype, backend = arguments.dtype, jax.default_backend()
    platform = "cuda" if backend == "gpu" else backend
    speeds = machine_speeds(dtype, arguments.repetitions)
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores, {dtype}: "
        f"{speeds[0] / 1e9:.3g} GB/s, {speeds[1] / 1e9:.3g} G multiplications/s"
    )
    rows: list[dict[str, Any]] = []
    table = Table("linear", "out x in", "batch", "contender", "ms", "speed / dense", "roofline")
    table.add_column("error")
    for batch in map(int, arguments.batches.split(",")):
        for linear in arguments.linears.split(","):
            case = Case(platform, dtype, *SHAPES[linear], batch)
            case, scale = fitting(case, arguments.scale, speeds, arguments.seconds)
            named = {"linear": linear, **case._asdict(), "scale": scale}
            del named["platform"]
            for name, found in measure(case, speeds, arguments.repetitions).items():
                rows.append(named | {"contender": name} | found)
                table.add_row(
                    linear,
                    f"{case.outputs} x {case.inputs}, scaled by {scale:.3g}",
                    str(batch),
                    name,
                    f"{1e3 * found['seconds']:.3g}",
                    f"{found['speed_relative_to_dense']:.2f}",
                    f"{found['fraction_of_roofline']:.0%}",
                    f"{found['error']:.0e}",
                )
    Console(width=120).print(table)
    with (arguments.output / "matmul.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, arguments.output / "matmul.png")


if __name__ == "__main__":
    main()
