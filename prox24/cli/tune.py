"""`prox24 tune`: measures products with packed weights, for the table that `matmul` chooses by."""

import argparse

from prox24 import torchax
from prox24.cli.output import print_json, print_table, progress_bar
from prox24.cli.verify import native_axes
from prox24.core.pattern import Pattern
from prox24.errors import DiskError
from prox24.forward import check_widths
from prox24.packed import table
from prox24.packed.implementation import Case, default_platform
from prox24.packed.table import Measurement
from prox24.packed.tuning import measure


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; the exit code."""
    platform = default_platform()
    if arguments.shapes:
        linears = [("float32", *shape) for shape in arguments.shapes]
    else:
        linears = linear_kinds(arguments.source)
    cases = dict.fromkeys(
        Case(platform, arguments.dtype or dtype, outputs, inputs, batch)
        for dtype, outputs, inputs in linears
        for batch in arguments.batches
    )
    try:
        path = table.table_path(platform)
    except OSError as error:
        raise DiskError(f"cannot write a table: {error.strerror}; set PROX24_CACHE") from error
    measurements = []
    with progress_bar("tune", len(cases), arguments.quiet) as advance:
        for case in cases:
            measurements.append(measure(case))
            try:
                table.write(measurements[-1:])
            except OSError as error:
                raise DiskError(
                    f"cannot write {path}: {error.strerror}; set PROX24_CACHE"
                ) from error
            advance(f"{case.outputs}x{case.inputs}, batch {case.batch}", None)
    if arguments.json:
        found = [
            {
                **measured.case._asdict(),
                "fastest": measured.fastest,
                "seconds": measured.seconds,
                "dense": measured.dense,
            }
            for measured in measurements
        ]
        print_json({"table": str(path), "measurements": found})
    elif not arguments.quiet:
        names = sorted({name for measured in measurements for name in measured.seconds})
        rows = [_row(measured, names) for measured in measurements]
        print_table(["linear", "batch", "dense", *names, "fastest packed"], rows)
        print(f"written to {path}")
    return 0


def _row(measured: Measurement, names: list[str]) -> list[str]:
    case, seconds = measured.case, {"dense": measured.dense, **measured.seconds}
    times = [
        f"{1e3 * seconds[name]:.3g} ms" if name in seconds else "" for name in ("dense", *names)
    ]
    linear = f"{case.outputs}x{case.inputs}, {case.dtype}"
    return [linear, str(case.batch), *times, measured.fastest]


def linear_kinds(source: str) -> list[tuple[str, int, int]]:
    """The dtype and the shape (out, in) of a checkpoint's pruned linears, each once.

    Raises:
      Prox24Error: the model cannot be opened, or a width is not in blocks of four.
    """
    checkpoint, native = torchax.open_any(source)
    axes = native_axes(checkpoint) if native else torchax.linear_axes(checkpoint)
    tensors = {name: checkpoint.tensors[name] for name in axes}
    check_widths({name: tensors[name].shape[axis] for name, axis in axes.items()}, Pattern(2, 4))
    return sorted(
        {
            (tensors[name].dtype.name, tensors[name].shape[1 - axis], tensors[name].shape[axis])
            for name, axis in axes.items()
        }
    )
