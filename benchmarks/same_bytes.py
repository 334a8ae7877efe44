"""Whether a change of the code changes the bytes of pruned models, on one machine.

    python benchmarks/same_bytes.py before.json          # before the change
    python benchmarks/same_bytes.py before.json --check  # after it; exit code 1 if bytes differ

Three tiny models are pruned by five recipes. `--model` adds one, pruned by the default recipe on 4
windows of 128 tokens.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import prox24

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import write_tiny

TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife. "
MODELS = {"llama1": "bfloat16", "gpt2": "float32", "mixtral": "float32"}
SPARSEGPT, WANDA = prox24.Recipe.sparsegpt(), prox24.Recipe.wanda()
RECIPES = {
    "default": prox24.Recipe(),
    "sparsegpt": dataclasses.replace(
        SPARSEGPT, refit=prox24.ConjugateGradients(), targets=prox24.DenseTargets(0.5)
    ),
    "wanda": dataclasses.replace(WANDA, pattern=(1, 4), dtype="float32"),
    "prox": prox24.Recipe(prox24.ProximalGradient(), targets=None, damping=0.1),
    "refined": prox24.Recipe(refine=prox24.BlockRefinement(passes=2)),
}


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every tensor of a pruned folder."""
    tensors = json.loads((folder / "prox24.json").read_text())["tensors"]
    return {name: entry["sha256"] for name, entry in tensors.items()}


def prune_all(model: str | None, folder: Path) -> dict[str, dict[str, str]]:
    text = folder / "text.txt"
    text.write_text(TEXT * 100)
    found = {}
    for name, dtype in MODELS.items():
        write_tiny(folder / name, name, dtype=dtype)
        for method, recipe in RECIPES.items():
            out = folder / f"{name}-{method}"
            prox24.prune(folder / name, out, recipe, calibration=prox24.Text(text, 8, 32))
            found[f"{name}/{method}"] = hashes(out)
    if model is not None:
        prox24.prune(model, folder / "model", calibration=prox24.Text(None, 4, 128))
        found[model] = hashes(folder / "model")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = prune_all(arguments.model, Path(folder))
    if not arguments.check:
        arguments.file.write_text(json.dumps(found, indent=1))
        return 0
    before = json.loads(arguments.file.read_text())
    differ = [
        f"{run} {name}"
        for run, tensors in before.items()
        for name, digest in tensors.items()
        if found.get(run, {}).get(name) != digest
    ]
    print(*differ, f"{len(differ)} of {sum(map(len, before.values()))} tensors differ", sep="\n")
    return 1 if differ else 0


if __name__ == "__main__":
    raise SystemExit(main())
