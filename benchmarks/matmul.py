"""Times products with packed 2:4 weights against XLA's dense product, on the shapes of Llama.

    python benchmarks/matmul.py [--batches N,...] [--scale F] [--dtype NAME] [--output FOLDER]

The shapes are the linears of Llama 8B and 70B. All contenders get the same random weight and
inputs. The dense product is taken in two forms, of which now the one, now the other is the faster;
the others are prox24's implementations, each where it serves, and on a GPU, where torch has it too,
PyTorch's semi-structured weights by CUTLASS and by cuSPARSELt, compressed once, before. GPUs have
kernels for 16-bit weights: give --dtype bfloat16 or float16 there. What fails is left out, with a
line that says why. Each repetition runs every contender, starting one further than the last, so
that a change in the machine's speed meets all of them; the first does not count. Each runs for a
while before it is timed: a processor that had nothing to do is slow at first, which it is not
within a model. Where it takes longer to start a program than to multiply, which is not on CPUs, a
run is of 32 products, one after the other in one program (PyTorch's are started one by one), and a
product has its share. Times are medians. Speeds are relative to the faster dense form. The error is
the largest difference to the product in float64 of eight vectors and 64 rows, relative to the
largest entry.

The roofline of a contender is the time that it takes to read its weight and inputs and write its
result at the speed at which 256 MiB are negated in place, or to do its multiplications at the speed
of a dense product of 2,048 x 2,048 matrices, whichever is more; a packed weight has half of the
multiplications. A weight that the last cache holds is read faster than that.

A case whose dense product would take more than --seconds, or which takes half of the free memory,
is made smaller, inputs and outputs halved until it fits, and its line says by how much. Writes
matmul.csv, one line per case and contender, and matmul.png, those speeds.
"""

import argparse
import csv
import dataclasses
import functools
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from prox24.errors import first_line
from prox24.packed import unpack
from prox24.packed.codes import BLOCK, ENTRIES_PER_WORD, KEPT
from prox24.packed.implementation import Case, default_platform
from prox24.packed.registry import IMPLEMENTATIONS
from prox24.packed.tuning import DENSE, calls_of, medians, random_packed, repeated

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEED = 0
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
NEGATED_BYTES = 1 << 28
PEAK_WIDTH = 2048
CHECKED_VECTORS, CHECKED_ROWS = 8, 64


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a contender's time is compared with.

    Attributes:
      bandwidth: bytes per second, read and written.
      peak: multiplications per second of a dense product.
    """

    bandwidth: float
    peak: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the result."""

    linear: str
    dtype: str
    outputs: int
    inputs: int
    batch: int
    scale: float
    contender: str
    seconds: float
    speed_relative_to_dense: float
    fraction_of_roofline: float
    error: float


def measure_machine(dtype: str, repetitions: int) -> Machine:
    """The speeds of memory and of a dense product in a dtype."""
    rng = np.random.default_rng(SEED)
    long = jnp.asarray(rng.random(NEGATED_BYTES // 4, np.float32))
    square = jnp.asarray(rng.standard_normal((PEAK_WIDTH, PEAK_WIDTH), np.float32), dtype)
    # In place, since fresh memory has to be cleared by the system first.
    negate, product = jax.jit(jnp.negative, donate_argnums=0), jax.jit(lambda x, y: x @ y)
    latest = [long]

    def rewrite() -> jax.Array:
        latest.append(negate(latest.pop()))
        return latest[0]

    runs = {"memory": rewrite, "product": lambda: product(square, square)}
    seconds = medians(runs, repetitions)
    return Machine(2 * NEGATED_BYTES / seconds["memory"], PEAK_WIDTH**3 / seconds["product"])


def seconds_at_best(case: Case, packed: bool, machine: Machine) -> float:
    """The roofline of the product with a packed or a dense weight."""
    size = jnp.dtype(case.dtype).itemsize
    weights = case.outputs * case.inputs
    vectors = case.batch * (case.inputs + case.outputs) * size
    read, multiplications = weights * size, case.batch * weights
    if packed:
        read = weights * size * KEPT // BLOCK + weights // ENTRIES_PER_WORD * 4
        multiplications = case.batch * weights * KEPT // BLOCK
    return max((read + vectors) / machine.bandwidth, multiplications / machine.peak)


def free_memory() -> int:
    """Bytes of the device, or where it does not say, of the host."""
    said = jax.devices()[0].memory_stats()
    if said and "bytes_limit" in said:
        return said["bytes_limit"] - said["bytes_in_use"]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fitting(case: Case, scale: float, machine: Machine, limit: float) -> tuple[Case, float]:
    """The largest case, scaled and halved, that fits; and its scale.

    Args:
      case: at scale 1.
      scale: of inputs and outputs, to begin with.
      machine: its speeds.
      limit: seconds of the dense product, at its roofline.
    """
    free = free_memory()
    while True:
        outputs, inputs = (
            max(round(length * scale / ENTRIES_PER_WORD), 1) * ENTRIES_PER_WORD
            for length in (case.outputs, case.inputs)
        )
        scaled = case._replace(outputs=outputs, inputs=inputs)
        # In float32 at least: the weight dense, packed and unpacked, and vectors, two copies each.
        entries = 6 * outputs * inputs + 2 * case.batch * (inputs + outputs)
        smallest = min(outputs, inputs) == ENTRIES_PER_WORD
        fits = 4 * entries < free / 2 and seconds_at_best(scaled, False, machine) < limit
        if smallest or fits:
            return scaled, scale
        scale /= 2


Contender = Callable[[int], Callable[[], jax.Array]]
"""Given a number of products, what makes them, and returns the last."""


def by_xla(run: Callable[..., jax.Array], *operands: jax.Array) -> Contender:
    return lambda calls: functools.partial(repeated(run, calls), *operands)


def by_pytorch(x: jax.Array, dense: jax.Array) -> dict[str, Contender]:
    """Products by PyTorch's sparse classes with the same numbers; none without a GPU for it."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch
    from torch import sparse

    if not torch.cuda.is_available():
        return {}

    def by_linear(vectors: torch.Tensor, compressed: torch.Tensor) -> Contender:
        def run(calls: int) -> jax.Array:
            for _ in range(calls):
                result = torch.nn.functional.linear(vectors, compressed)
            torch.cuda.synchronize()
            return jnp.from_dlpack(result)

        return lambda calls: functools.partial(run, calls)

    vectors, weight = torch.from_dlpack(x), torch.from_dlpack(dense)
    found: dict[str, Contender] = {}
    for name, form in (
        ("PyTorch, CUTLASS", sparse.SparseSemiStructuredTensorCUTLASS),
        ("PyTorch, cuSPARSELt", sparse.SparseSemiStructuredTensorCUSPARSELT),
    ):
        try:
            compressed = form.from_dense(weight)
        except RuntimeError as error:  # of a shape, a dtype, or a library that is not there
            print(f"{name} is left out: {first_line(error)}")
        else:
            found[name] = by_linear(vectors, compressed)
    return found


def measure(linear: str, case: Case, scale: float, machine: Machine, repetitions: int) -> list[Row]:
    """Every contender on a case."""
    rng = np.random.default_rng(SEED)
    w = random_packed(rng, case.outputs, case.inputs, case.dtype)
    x = jnp.asarray(rng.standard_normal((case.batch, case.inputs), np.float32), case.dtype)
    dense = unpack(w)
    contenders = {name: by_xla(form, x, dense) for name, form in DENSE.items()}
    contenders |= {
        name: by_xla(implementation.run, x, w.values, w.codes)
        for name, implementation in IMPLEMENTATIONS.items()
        if implementation.serves(case)
    }
    contenders |= by_pytorch(x, dense)
    exact = (
        np.asarray(x[:CHECKED_VECTORS], np.float64) @ np.asarray(dense[:CHECKED_ROWS], np.float64).T
    )
    calls, runs, errors = calls_of(case.platform), {}, {}
    for name, contender in contenders.items():
        run = contender(1)
        try:
            found = np.asarray(run()[:CHECKED_VECTORS, :CHECKED_ROWS], np.float64)
            run = run if calls == 1 else contender(calls)
            jax.block_until_ready(run())
        except Exception as error:  # a kernel's, or that of its compiler, whatever it raises
            print(f"{name} is left out: {first_line(error)}")
        else:
            runs[name] = run
            errors[name] = np.abs(found - exact).max() / np.abs(exact).max()
    seconds = {name: taken / calls for name, taken in medians(runs, repetitions).items()}
    fastest = min(seconds.get(name, math.inf) for name in DENSE)
    return [
        Row(
            linear=linear,
            dtype=case.dtype,
            outputs=case.outputs,
            inputs=case.inputs,
            batch=case.batch,
            scale=scale,
            contender=name,
            seconds=taken,
            speed_relative_to_dense=fastest / taken,
            fraction_of_roofline=seconds_at_best(case, name not in DENSE, machine) / taken,
            error=float(errors[name]),
        )
        for name, taken in seconds.items()
    ]


def table(rows: Sequence[Row]) -> Table:
    """One line per case and contender."""
    result = Table()
    columns = (
        "linear",
        "out x in",
        "batch",
        "contender",
        "ms",
        "speed /\ndense",
        "of the\nroofline",
    )
    for index, name in enumerate((*columns, "error")):
        result.add_column(name, justify="left" if index < 2 else "right", no_wrap=True)
    for row in rows:
        scaled = "" if row.scale == 1 else f", scaled by {row.scale:.3g}"
        result.add_row(
            row.linear,
            f"{row.outputs} x {row.inputs}{scaled}",
            str(row.batch),
            row.contender,
            f"{1e3 * row.seconds:.3g}",
            f"{row.speed_relative_to_dense:.2f}",
            f"{row.fraction_of_roofline:.0%}",
            f"{row.error:.0e}",
        )
    return result


def draw(rows: Sequence[Row], path: Path) -> None:
    """Speed relative to the dense product, a panel for each batch."""
    batches = sorted({row.batch for row in rows})
    names = list(dict.fromkeys(row.contender for row in rows if row.contender not in DENSE))
    figure, panels = plt.subplots(
        len(batches), 1, figsize=(8, 1.6 * len(batches) + 1), sharex=True, squeeze=False
    )
    for batch, panel in zip(batches, panels[:, 0], strict=True):
        linears = list(dict.fromkeys(row.linear for row in rows))
        for i, name in enumerate(names):
            speeds = {
                row.linear: row.speed_relative_to_dense
                for row in rows
                if row.batch == batch and row.contender == name
            }
            step = 0.8 / len(names)
            places = [
                linears.index(linear) + (i - (len(names) - 1) / 2) * step for linear in speeds
            ]
            panel.bar(places, list(speeds.values()), 0.95 * step, label=name, color=f"C{i}")
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_ylabel(f"batch {batch}")
        panel.set_xticks(range(len(linears)), linears, rotation=30, ha="right")
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(names))]
    panels[0, 0].legend(handles, names, ncols=len(names), frameon=False, fontsize="small")
    figure.suptitle(f"speed relative to the dense product, {rows[0].dtype}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def positive_integers(text: str) -> list[int]:
    found = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive integers")
    return [int(part) for part in found]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=positive_integers, default=list(BATCHES), metavar="N,...")
    parser.add_argument("--scale", type=float, default=1.0, help="of inputs and outputs (1)")
    parser.add_argument("--linears", default=",".join(SHAPES), help="which of them")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--repetitions", type=int, default=7, help="timings per contender")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a dense product at most (2)")
    parser.add_argument("--output", type=Path, default=Path("."), metavar="FOLDER")
    arguments = parser.parse_args()
    linears = arguments.linears.split(",")
    for linear in linears:
        if linear not in SHAPES:
            parser.error(f"--linears {linear} is none of {', '.join(SHAPES)}")
    for name in ("scale", "repetitions", "seconds"):
        if not getattr(arguments, name) > 0:
            parser.error(f"--{name} {getattr(arguments, name)} is not positive")

    arguments.output.mkdir(parents=True, exist_ok=True)
    machine = measure_machine(arguments.dtype, arguments.repetitions)
    console = Console(width=max(Console().width, 120))
    console.print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores, "
        f"{arguments.dtype}: memory at {machine.bandwidth / 1e9:.3g} GB/s, "
        f"{machine.peak / 1e9:.3g} G multiplications/s"
    )
    rows: list[Row] = []
    with (arguments.output / "matmul.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        for batch in arguments.batches:
            for linear in linears:
                case = Case(default_platform(), arguments.dtype, *SHAPES[linear], batch)
                case, scale = fitting(case, arguments.scale, machine, arguments.seconds)
                found = measure(linear, case, scale, machine, arguments.repetitions)
                writer.writerows(dataclasses.asdict(row) for row in found)
                file.flush()
                rows += found
    console.print(table(rows))
    draw(rows, arguments.output / "matmul.png")


if __name__ == "__main__":
    main()
