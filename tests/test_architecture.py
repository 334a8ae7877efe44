import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MATHEMATICS = {"jax", "numpy", "optax", "prox24"}


def test_imports_follow_the_contracts():
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("import-linter is not installed")
    outcome = subprocess.run([command], cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout


@pytest.mark.parametrize("folder", ["core", "solvers"])
def test_the_mathematics_imports_only_jax_numpy_and_optax(folder):
    for path in (ROOT / "prox24" / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                package = name.split(".")[0]
                assert package in MATHEMATICS | sys.stdlib_module_names, (path, name)


def test_importing_prox24_needs_no_checkpoint_library():
    code = "import sys, prox24; print([m for m in ('transformers', 'torch') if m in sys.modules])"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.stdout.strip() == "[]", outcome.stderr
