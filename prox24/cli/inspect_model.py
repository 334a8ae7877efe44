"""`prox24 inspect`: what a checkpoint holds, and what would be pruned of it."""

import argparse
import math
import re
from typing import Any, NamedTuple

from prox24.checkpoints.checkpoint import Checkpoint, open_checkpoint
from prox24.checkpoints.tensors import byte_count
from prox24.cli.output import print_json, print_table
from prox24.core.pattern import Pattern, Unstructured
from prox24.jobs.forward import all_linears, load_model
from prox24.models import decoder

DENSE = "dense: "


class Entry(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
      name: the checkpoint's.
      shape: as stored.
      dtype: by numpy's name.
      decision: "pruned", or "dense: " and why.
      size: bytes of the values in that dtype; a quantised file has fewer.
      sparse_size: bytes without the zeros that pruning makes, see `sparse_bytes`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    decision: str
    size: int
    sparse_size: int


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; the exit code."""
    checkpoint = open_checkpoint(arguments.source)
    entries = list_tensors(checkpoint, arguments.pattern)
    size = sum(entry.size for entry in entries)
    sparse_size = sum(entry.sparse_size for entry in entries)
    config = load_model(checkpoint).config
    if arguments.json:
        print_json(
            {
                "model": str(arguments.source),
                "model_type": checkpoint.config["model_type"],
                "layers": len(config.layers),
                "pattern": str(arguments.pattern),
                "parameters": sum(math.prod(entry.shape) for entry in entries),
                "bytes": size,
                "sparse_bytes": sparse_size,
                "tensors": [entry._asdict() for entry in entries],
            }
        )
        return 0
    if arguments.quiet:
        return 0
    rows = [
        ["model_type", checkpoint.config["model_type"]],
        ["layers", str(len(config.layers))],
        ["parameters", f"{sum(math.prod(entry.shape) for entry in entries):,}"],
        ["bytes", f"{size:,}"],
        [f"bytes at {arguments.pattern} with zeros left out", f"{sparse_size:,}"],
    ]
    print_table(["model", str(arguments.source)], rows)
    print_table(["tensors", "shape", "dtype", "number", "decision"], _grouped(entries))
    return 0


def list_tensors(checkpoint: Checkpoint, pattern: Pattern | Unstructured) -> list[Entry]:
    """Every tensor of a checkpoint, in its order, and what would become of it."""
    decisions = _decisions(checkpoint, pattern)
    entries = []
    for name, source in checkpoint.tensors.items():
        decision = decisions.get(name, DENSE + "not used by the computation")
        size = sparse = byte_count(source)
        if decision == "pruned":
            sparse = sparse_bytes(size, source.dtype.itemsize, pattern)
        entries.append(Entry(name, source.shape, str(source.dtype), decision, size, sparse))
    return entries


def sparse_bytes(size: int, width: int, pattern: Pattern | Unstructured) -> int:
    """Bytes of the kept values and of their places: for N:M, N numbers below M in each block.

    Without a pattern, a place is one bit for each weight, kept or not.

    Example:
      >>> sparse_bytes(32, 2, Pattern(2, 4))
      18
    """
    weights = size // width
    if isinstance(pattern, Unstructured):
        return math.ceil(size * (1 - pattern.sparsity) + weights / 8)
    kept = weights * pattern.kept // pattern.group
    return kept * width + math.ceil(kept * math.ceil(math.log2(pattern.group)) / 8)


def _decisions(checkpoint: Checkpoint, pattern: Pattern | Unstructured) -> dict[str, str]:
    config = load_model(checkpoint).config
    decisions = {
        decoder.outer_tensor(config.names, name): DENSE + _role(name)
        for name in decoder.embedding_shapes(config) | decoder.head_shapes(config)
    }
    for index, layer in enumerate(config.layers):
        for name in decoder.layer_shapes(layer):
            decisions[decoder.layer_tensor(config.names, index, name)] = DENSE + _role(name)
    for linear in all_linears(config):
        width = linear.shape[1]
        fits = isinstance(pattern, Unstructured) or width % pattern.group == 0
        decisions[linear.tensor] = (
            "pruned" if fits else f"{DENSE}width {width} does not fit {pattern}"
        )
    return decisions


def _role(name: str) -> str:
    roles = {"embed_tokens": "embedding", "embed_positions": "positions", "lm_head": "head"}
    module, _, part = name.rpartition(".")
    default = "router" if module == "mlp.router" else "norm" if "norm" in module else "bias"
    return "bias" if part == "bias" else roles.get(module, default)


def _grouped(entries: list[Entry]) -> list[list[str]]:
    """One row for tensors that differ in a number of their names only."""
    groups: dict[tuple[Any, ...], int] = {}
    for entry in entries:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", entry.name)
        key = (name, entry.shape, entry.dtype, entry.decision)
        groups[key] = groups.get(key, 0) + 1
    return [
        [name, " x ".join(map(str, shape)), dtype, str(number), decision]
        for (name, shape, dtype, decision), number in groups.items()
    ]
