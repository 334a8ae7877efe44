"""`make` where there is no Python that it can use: one line that says so."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
@pytest.mark.parametrize(
    ("fails", "said"),
    [
        (None, "there is no"),
        ("version_info", "prox24 needs Python 3.11 or newer"),
        ("ensurepip", "has no pip or no venv"),
    ],
)
def test_a_python_that_does_not_do_is_one_line(tmp_path, fails, said):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    if fails is not None:
        python.write_text(f'#!/bin/sh\ncase "$*" in *{fails}*) exit 1;; esac\n')
        python.chmod(0o755)
    ended = subprocess.run(
        ["make", "--silent", "test", f"PYTHON={python}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    (line,) = ended.stdout.splitlines()
    assert said in line
    assert "make PYTHON=..." in line
    assert not (tmp_path / ".venv").exists()
