"""The output of jobs: reports as tables, JSON and HTML."""

import argparse
import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prox24 import __version__
from prox24._checkpoints.tensors import writing
from prox24._checkpoints.writer import check_outside
from prox24._jobs import page
from prox24.errors import CheckpointError

PACKAGES = ("jax", "jaxlib", "optax", "numpy", "transformers", "safetensors", "gguf")


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a job. It prints as a table, and has JSON and HTML forms."""

    def to_dict(self) -> dict[str, Any]:
        """The report as a dict for JSON."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_html(self) -> str:
        """The report as one self-contained HTML page."""
        return page.page("prox24", page.code(str(self)))


def show(report: Report, arguments: argparse.Namespace) -> None:
    """Prints a report in the form of --json and --quiet, and writes it to the file of --report."""
    path: Path | None = getattr(arguments, "report", None)
    try:  # prints first: a full disk then loses no figures
        if arguments.json:
            print_json(report.to_dict())
        elif not arguments.quiet:
            print(report)
    finally:  # even after a closed pipe
        if path is not None:
            text = report.to_html() if path.suffix == ".html" else report.to_json() + "\n"
            with writing(path):
                path.write_text(text, encoding="utf-8")


def print_json(value: dict[str, Any]) -> None:
    """Prints one JSON object on standard output."""
    print(json.dumps(value, allow_nan=False))


def check_files(
    paths: Iterable[Path | None],
    inputs: Iterable[str | Path | None],
    destination: Path | None = None,
) -> None:
    """Raises CheckpointError if one of a job's files cannot be written, before the job starts.

    A file must be none of the inputs, and in no input folder, where a later run may read it. It
    must not be in the destination, where it would be lost, and no other file of the job.
    """
    given, seen = list(inputs), set[Path]()
    for path in filter(None, paths):
        _check_file(path, given, destination)
        # Both may be /dev/null or a terminal.
        if path.resolve() in seen and (path.is_file() or not path.exists()):
            raise CheckpointError(f"{path} is named for two outputs: choose another file")
        seen.add(path.resolve())


def _check_file(path: Path, inputs: Iterable[str | Path | None], destination: Path | None) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder")
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"the folder of {path} does not exist")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise CheckpointError(f"{path} cannot be written: permission denied")
    for given in (Path(place) for place in inputs if place is not None):
        held = [given, *(given.iterdir() if given.is_dir() else ())]
        linked = path.exists() and any(file.exists() and path.samefile(file) for file in held)
        if linked or (given.is_dir() and path.resolve().is_relative_to(given.resolve())):
            raise CheckpointError(f"{path} is or is in {given}, which is read: choose another file")
    if destination is not None:
        check_outside(destination, path)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table as text, as wide as the terminal: names to the left, figures to the right."""
    from rich.console import Console
    from rich.table import Table

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 120
    names = max(len(name) for name, *_ in [columns, *rows])
    drawn = Table()
    for index, column in enumerate(columns):
        # On a narrow terminal a cell takes several lines, names last: nothing is cut.
        whole = index == 0 and names < width / 2
        justify: Any = "right" if index else "left"
        drawn.add_column(column, justify=justify, no_wrap=whole, overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    # A path must not be read as markup.
    console = Console(file=io.StringIO(), width=width, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(drawn)
    return captured.get().rstrip("\n")


def gigabytes(count: int | None) -> str:
    """A number of bytes as text, in GB of 10^9 bytes."""
    return "unknown" if count is None else f"{count / 1e9:.2f} GB"


def versions(*more: str) -> dict[str, str]:
    """Versions of Python, of the packages that decide a result, and of more packages."""
    found = {name: importlib.metadata.version(name) for name in (*PACKAGES, *more)}
    return {"python": platform.python_version(), "prox24": __version__, **found}


def peak_memory_bytes() -> int | None:
    """The largest resident memory of this process so far; None on a system without this figure."""
    try:
        import resource
    except ImportError:  # on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
