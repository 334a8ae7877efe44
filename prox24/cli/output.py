"""What the commands print: progress, tables and JSON."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from prox24.checkpoints.tensors import writing
from prox24.checkpoints.writer import check_outside
from prox24.errors import CheckpointError

PACKAGES = ("prox24", "jax", "jaxlib", "optax", "numpy", "transformers", "safetensors", "gguf")

Advance = Callable[[str, float | None], None]


@contextlib.contextmanager
def progress_bar(title: str, total: int | None, quiet: bool, done: int = 0) -> Iterator[Advance]:
    """A bar on standard error with what was done last, its relative loss, and the time left."""
    # A log file has no use for the frames of a bar.
    console = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[latest]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total, completed=done, latest="")

        def advance(name: str, loss: float | None) -> None:
            latest = name if loss is None else f"{name} loss {loss:.4f}"
            progress.update(task, advance=1, latest=latest)

        yield advance


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    print(json.dumps(value, allow_nan=False))


def check_report(
    path: Path | None, inputs: Iterable[Path | None] = (), destination: Path | None = None
) -> None:
    """Raises CheckpointError where a report could not be written, before hours are spent.

    Args:
      path: of the report.
      inputs: files, and folders of models, which it must not replace or change.
      destination: a folder to write, in which it would be lost.
    """
    if path is None:
        return
    check_writable(path, "report")
    for given in filter(None, inputs):
        held = given.iterdir() if given.is_dir() else [given]
        if path.exists() and any(file.exists() and path.samefile(file) for file in held):
            raise CheckpointError(f"the report {path} would replace what is there, or read")
    if destination is not None:
        check_outside(destination, path)


def check_writable(path: Path, what: str) -> None:
    """Raises CheckpointError where a file, which is called so, could not be written."""
    if path.is_dir():
        raise CheckpointError(f"the {what} {path} is a folder")
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"the folder of {path} does not exist")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise CheckpointError(f"the {what} {path} cannot be written: permission denied")


@contextlib.contextmanager
def reporting(path: Path | None, report: dict[str, Any]) -> Iterator[None]:
    """Writes a JSON report, if one is asked for, when the block ends, even by a closed pipe."""
    try:
        yield  # prints first: what was measured is not lost where the disk is full
    finally:
        if path is not None:
            with writing(path):
                path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """The value as JSON has it: text for paths and patterns, nothing for an infinite ratio."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value if isinstance(value, bool | int | str | list | dict | None) else str(value)


class _Console(Console):
    """Leaves a closed pipe to `main`; rich by itself ends the process, with 1."""

    def on_broken_pipe(self) -> None:
        raise  # the error that is handled where this is called


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """A table on standard output: the first column to the left, figures to the right."""
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Without a terminal there is no width to fit into. A path is no markup.
    width = None if sys.stdout.isatty() else 120
    _Console(width=width, markup=False, emoji=False, highlight=False).print(table)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
