"""The command line as tests run it, and what it finds and leaves in folders."""

import json
from pathlib import Path

from tiny import write_tiny

from prox24._cli.main import main

TEXT = "Calibration text for a model that reads bytes. " * 60


def write_workspace(folder: Path, variant: str = "llama1", **options) -> Path:
    """A model, and a text to calibrate it with."""
    write_tiny(folder / "model", variant, **options)
    (folder / "text.txt").write_text(TEXT)
    return folder


def calibrated(workspace: Path, samples: int = 8) -> list:
    """Options of the command line."""
    length = ["--sequence-length", 32, "--samples", samples]
    return ["--calibration", workspace / "text.txt", *length]


def run(*arguments) -> int:
    """The exit code of the command line."""
    return main([*map(str, arguments)])


def printed_json(capsys, *arguments):
    capsys.readouterr()
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def error_line(capsys, *arguments) -> str:
    """The one line that a command prints before it exits with code 2."""
    capsys.readouterr()
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("prox24: error: ")
    assert err.count("\n") == 1
    return err


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
