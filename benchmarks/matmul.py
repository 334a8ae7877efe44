"""Times products with packed weights against dense ones, for the linears of Llama 8B and 70B.

    python benchmarks/matmul.py --seconds 0.5
    python benchmarks/matmul.py --seconds 0.5 --batches 1,16,32 --dtype bfloat16

Every contender multiplies the same random weight and vectors. Contenders are XLA with the dense
weight, in two forms, and prox24's implementations that run here. Times are medians, measured in
turns, so that a change in the machine's speed affects all. Speeds are relative to the faster dense
form. The error is the largest difference to the product in float64, relative to the largest entry.
It is of eight vectors and 64 rows.

The roofline of a contender is the longer of two times. The first is for reading its weight and
vectors and writing its result, at the speed at which 256 MiB are negated in place. The second is
for multiplying, at the speed of a dense product of 2,048 x 2,048 matrices. A packed weight has half
of the multiplications.

The dense product of a case may take --seconds, and half of the free memory. If it would take more,
inputs and outputs are halved until it fits. Writes matmul.csv and matmul.png.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from common import plt

import prox24
from prox24.packed import matmul, pack
from prox24.packed._choice import IMPLEMENTATIONS, UNPACK, Case

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
WAKING = 0.02
"""Seconds of work before each timing: a processor that had nothing to do is slow at first."""


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
    seconds = common.medians(runs, repetitions, waking=WAKING)
    return 2 * NEGATED_BYTES / seconds["memory"], PEAK_WIDTH**3 / seconds["product"]


def roofline(case: Case, weight_bytes: float, share: float, speeds: tuple[float, float]) -> float:
    """Seconds of a product that makes a share of the dense multiplications."""
    size = jnp.dtype(case.dtype).itemsize
    moved = weight_bytes + case.batch * (case.inputs + case.outputs) * size
    multiplications = share * case.batch * case.outputs * case.inputs
    return max(moved / speeds[0], multiplications / speeds[1])


def fitting(case: Case, speeds: tuple[float, float], limit: float) -> tuple[Case, float]:
    """The case, halved until it fits; and its scale."""
    scale = 1.0
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
    runs: dict[str, Callable[[], Any]] = {
        name: functools.partial(jax.jit(form), x, dense) for name, form in DENSE.items()
    }
    for name in (UNPACK, *IMPLEMENTATIONS):
        if name == UNPACK or IMPLEMENTATIONS[name].problem(case) is None:
            runs[name] = functools.partial(
                jax.jit(matmul, static_argnames="implementation"), x, w, implementation=name
            )
    exact = np.asarray(x[:CHECKED_VECTORS], np.float64)
    exact = exact @ np.asarray(dense[:CHECKED_ROWS], np.float64).T
    results = {name: run()[:CHECKED_VECTORS, :CHECKED_ROWS] for name, run in runs.items()}
    seconds = common.medians(runs, repetitions, waking=WAKING)
    fastest = min(seconds[name] for name in DENSE)
    rows = {}
    for name, result in results.items():
        difference = np.abs(np.asarray(result, np.float64) - exact).max()
        weight_bytes, share = (dense.nbytes, 1) if name in DENSE else (w.nbytes, 0.5)
        rows[name] = {
            "seconds": seconds[name],
            "speed_relative_to_dense": fastest / seconds[name],
            "fraction_of_roofline": roofline(case, weight_bytes, share, speeds) / seconds[name],
            "error": float(difference / np.abs(exact).max()),
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
    common.save(figure, path)


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), metavar="N,...")
    parser.add_argument("--linears", default=",".join(SHAPES), help="which of them")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--repetitions", type=int, default=7, help="timings per contender")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a dense product at most (2)")
    common.add_output(parser)
    arguments = parser.parse_args()
    dtype, backend = arguments.dtype, jax.default_backend()
    speeds = machine_speeds(dtype, arguments.repetitions)
    rows: list[dict[str, Any]] = []
    for batch in map(int, arguments.batches.split(",")):
        for linear in arguments.linears.split(","):
            platform = "cuda" if backend == "gpu" else backend
            case = Case(platform, dtype, *SHAPES[linear], batch)
            case, scale = fitting(case, speeds, arguments.seconds)
            named = {"linear": linear, **case._asdict(), "scale": scale}
            del named["platform"]
            for name, found in measure(case, speeds, arguments.repetitions).items():
                rows.append(named | {"contender": name} | found)
    lines = [
        (
            row["linear"],
            f"{row['outputs']} x {row['inputs']}, scaled by {row['scale']:.3g}",
            row["contender"],
            str(row["batch"]),
            f"{1e3 * row['seconds']:.3g}",
            f"{row['speed_relative_to_dense']:.2f}",
            f"{row['fraction_of_roofline']:.0%}",
            f"{row['error']:.0e}",
        )
        for row in rows
    ]
    titles = "linear", "out x in", "contender", "batch", "ms", "speed / dense", "roofline", "error"
    title = (
        f"{common.environment()}, {dtype}: "
        f"{speeds[0] / 1e9:.3g} GB/s, {speeds[1] / 1e9:.3g} G multiplications/s"
    )
    common.show(titles, lines, title=title)
    common.write_rows(arguments.output / "matmul.csv", rows)
    draw(rows, arguments.output / "matmul.png")


if __name__ == "__main__":
    main()
