"""The manifest of a pruned folder: its job, and the dtype and hash of every tensor."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from prox24._checkpoints.hf_folder import MANIFEST, read_json
from prox24._checkpoints.tensors import writing
from prox24.errors import CheckpointError

FIGURES = ("relative_loss", "sparsity", "status", "tokens", "steps")


def write_manifest(
    folder: Path,
    job: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, str]],
    pruned: Iterable[Mapping[str, Any]],
    refined: Collection[str],
) -> None:
    """Writes the manifest. Equal results have equal manifests.

    It has the job, with the sizes alone of its "source" and "dense" files. It has the tensors that
    `fill_folder` returns, and the figures of each pruned linear. Trained norms and turned biases
    changed without pruning: they have the mark "refined".
    """
    marks: dict[str, dict[str, Any]] = {name: {"refined": True} for name in refined}
    for linear in pruned:
        marks[linear["name"]] = {"pruned": {key: linear[key] for key in FIGURES if key in linear}}
    entries = {name: {**entry, **marks.get(name, {})} for name, entry in tensors.items()}
    sizes = {
        role: {name: size for name, (size, _) in job[role].items()}
        for role in job.keys() & {"source", "dense"}
    }
    manifest = {**job, **sizes, "tensors": entries}
    path = folder / MANIFEST
    with writing(path):
        path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or None; its "tensors" has an entry for each tensor."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path)
    tensors = manifest.get("tensors")
    if not isinstance(tensors, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("sha256"), str)
        for entry in tensors.values()
    ):
        raise CheckpointError(f"{path} does not list the tensors with their hashes")
    if not isinstance(manifest.get("recipe", {}), dict):
        raise CheckpointError(f"the recipe in {path} is no object of fields")
    return manifest
