import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(code_or_path):
    command = [sys.executable, *code_or_path]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


def test_pruning_one_layer():
    losses = {
        line.split()[0]: float(line.split()[-1])
        for line in run(["examples/prune_a_layer.py"]).splitlines()
    }
    assert min(losses, key=losses.get) == "Prox"


def test_the_python_of_the_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "0.5" in run(["-c", code])
