"""`prox24 tune`: measures products with packed weights, for the table that `matmul` chooses by."""

import argparse

import jax

from prox24 import torchax
from prox24.cli.output import print_json, print_table, progress_bar
from prox24.cli.verify import native_axes
from prox24.core.pattern import Pattern
from prox24.errors import DiskError
from prox24.forward import check_widths
from prox24.packed import table
from prox24.packed.implementation import Case
from prox24.packed.table import Measurement
from prox24.packed.tuning import measure


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; the exit code."""
    platform = jax.default_backend()
    shapes = arguments.shapes or linear_shapes(arguments.source)
    cases = [
        Case("cuda" if platform == "gpu" else platform, arguments.dtype, outputs, inputs, batch)
        for outputs, inputs in shapes
        for batch in arguments.batches
    ]
    measurements = []
    with progress_bar("tune", len(cases), arguments.quiet) as advance:
        for case in cases:
            measurements.append(measure(case))
            advance(f"{case.outputs}x{case.inputs}, batch {case.batch}", None)
    path = table.table_path(cases[0].platform)
    try:
        table.write(measurements)
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror}; set PROX24_CACHE") from error
    if arguments.json:
        found = [
            {**measured.case._asdict(), "fastest": measured.fastest, "seconds": measured.seconds}
            for measured in measurements
        ]
        print_json({"table": str(path), "measurements": found})
    elif not arguments.quiet:
        names = sorted({name for measured in measurements for name in measured.seconds})
        rows = [_row(measured, names) for measured in measurements]
        print_table([arguments.dtype, "batch", *names, "fastest"], rows)
        print(f"written to {path}")
    return 0


def _row(measured: Measurement, names: list[str]) -> list[str]:
    case, seconds = measured
    times = [f"{1e3 * seconds[name]:.3g} ms" if name in seconds else "" for name in names]
    return [f"{case.outputs}x{case.inputs}", str(case.batch), *times, measured.fastest]


def linear_shapes(source: str) -> list[tuple[int, int]]:
    """The shapes (out, in) of a checkpoint's pruned linears, each once.

    Raises:
      Prox24Error: the model cannot be opened, or a width is not in blocks of four.
    """
    checkpoint, native = torchax.open_any(source)
    axes = native_axes(checkpoint) if native else torchax.linear_axes(checkpoint)
    shapes = {name: checkpoint.tensors[name].shape for name in axes}
    check_widths({name: shapes[name][axis] for name, axis in axes.items()}, Pattern(2, 4))
    return sorted({(shapes[name][1 - axis], shapes[name][axis]) for name, axis in axes.items()})
