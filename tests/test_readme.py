"""The README's Python runs as it is written, with a model on disk in place of a download."""

import re
import shutil
from pathlib import Path

import jax
import pytest
from tiny import write_tiny

from prox24._checkpoints import hub
from prox24._cli.demo_model import fetch_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "README.md").read_text()
GIVEN = "samples=64, sequence_length=512"
TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife. "


def tiny_model(folder):
    write_tiny(folder / "model")
    page = PAGE.replace(GIVEN, "samples=8, sequence_length=32")
    return folder / "model", page.replace('Text("b.txt")', 'Text("b.txt", sequence_length=32)')


def packaged_model(folder):
    """SmolLM2 as a folder, on few tokens."""
    from prox24._checkpoints.checkpoint import open_checkpoint
    from prox24._checkpoints.writer import write_checkpoint

    cache = ROOT / ".cache"
    cache.mkdir(exist_ok=True)
    write_checkpoint(open_checkpoint(fetch_model(cache)), folder / "model")
    few = PAGE.replace(GIVEN, "samples=4, sequence_length=64")
    return folder / "model", few.replace("solver=prox24.ADMM()", "solver=prox24.ADMM.in_steps(4)")


REAL = pytest.param(packaged_model, marks=[pytest.mark.slow, pytest.mark.optimized])


@pytest.mark.parametrize("make", [tiny_model, REAL])
def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys, make):
    model, page = make(tmp_path)
    monkeypatch.setattr(hub, "download", lambda name, formats: model)
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
