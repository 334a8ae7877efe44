"""The code of docs/adding-a-solver.md: the solver keeps the contract, prunes, and has types."""

import importlib
import json
import re
import sys
import tempfile
from pathlib import Path

import pytest
from programs import ROOT, run
from tiny import write_tiny

import prox24
from prox24._checkpoints import hub

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "adding-a-solver.md").read_text()
SOLVER, USE, CONTRACT = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
FOLDER = tempfile.TemporaryDirectory()
sys.path.append(FOLDER.name)
(Path(FOLDER.name) / "ria.py").write_text(SOLVER)

RIA = importlib.import_module("ria").RIA
exec(CONTRACT)  # TestRIA


def test_the_solver_of_the_page_prunes_a_function_and_a_model(tmp_path, monkeypatch, capsys):
    write_tiny(tmp_path / "model")
    monkeypatch.setattr(hub, "download", lambda name, formats: tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("It is a truth universally acknowledged. " * 100)
    found: dict = {}
    exec(USE.replace('Text("a.txt")', 'Text("a.txt", samples=8, sequence_length=32)'), found)
    recipe = found["recipe"]
    assert json.loads(capsys.readouterr().out)["solver"] == {"name": "ria.RIA", "power": 0.4}
    assert prox24.is_sparse(found["pruned"].params["kernel"], axis=0)
    assert prox24.verify(tmp_path / "smol-ria", tmp_path / "model").ok
    made = json.loads((tmp_path / "smol-ria" / "prox24.json").read_text())
    assert prox24.Recipe.from_dict(made["recipe"]) == recipe
    with pytest.raises(prox24.errors.RecipeError, match=r"'rib\.RIB'.*; import its module before"):
        prox24.Recipe.from_dict({"solver": {"name": "rib.RIB"}})


def test_the_solver_of_the_page_has_the_types_of_the_protocol(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "ria.py").write_text(SOLVER)
    wrong = "prox24.Recipe(prox24.ConjugateGradients())  # type: ignore[arg-type]\n"
    (tmp_path / "use.py").write_text(USE + wrong)
    # From the root and as strict as there, so that the types of JAX are in the cache of mypy.
    run("-m", "mypy", tmp_path / "ria.py", tmp_path / "use.py", MYPYPATH=str(tmp_path))
