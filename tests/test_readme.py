"""The README's Python runs as it is written, with a model on disk in place of a download."""

import re
import shutil
from pathlib import Path

import jax
import pytest
from tiny import write_tiny

from prox24._checkpoints import hub

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "README.md").read_text()
TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife. "


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    write_tiny(tmp_path / "model")
    page = PAGE.replace("samples=64, sequence_length=512", "samples=8, sequence_length=32")
    page = page.replace('Text("b.txt")', 'Text("b.txt", sequence_length=32)')
    monkeypatch.setattr(hub, "download", lambda name, formats: tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text(TEXT * 200)
    names: dict = {}
    # Optax's optimizers mix dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            exec(block, names)
    printed = capsys.readouterr().out
    for said in ("mean relative loss", "perplexity", "loss 0.", "SPARSE 0.5"):
        assert said in printed
    assert (tmp_path / "smol-2of4" / "prox24.json").exists()
    shutil.rmtree(tmp_path / "smol-2of4")
