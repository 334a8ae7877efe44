"""The tensors of a checkpoint, and the decision of a recipe on each."""

import collections
import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

from prox24._checkpoints.checkpoint import open_described
from prox24._checkpoints.tensors import byte_count
from prox24._core.pattern import AnyPattern, Unstructured
from prox24._jobs.forward import all_linears, layer_names, load_model, outer_names
from prox24._jobs.output import Report, table
from prox24._models.spec import Config
from prox24._pruning.recipe import Recipe
from prox24._pruning.runner import check_found, starred

DENSE, PRUNED, REFUSED = "dense: ", "pruned", "refused: "


class Entry(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
      name: the checkpoint's name.
      shape: the stored shape.
      dtype: numpy's name of the dtype.
      decision: "pruned", or "dense: " and the reason; "refused: " if `prune` ends with an error
        unless the recipe leaves the tensor out.
      size: bytes of the values in that dtype; a quantised file has fewer.
      sparse_size: bytes without the zeros from pruning, see `sparse_bytes`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    decision: str
    size: int
    sparse_size: int


@dataclasses.dataclass(frozen=True)
class Inspection(Report):
    """The tensors of a checkpoint, and the decision of a recipe on each; it prints as two tables.

    Attributes:
      model: the inspected model.
      model_type: from its config.
      layers: the number of layers.
      pattern: the patterns of the recipe, as text.
      tensors: an `Entry` for each tensor.
      parameters: the number of entries of all tensors.
      bytes: of all tensors.
      sparse_bytes: of all tensors, without the zeros from pruning.
      described_by: the source of names and shapes if there are no weights here, else None.
    """

    model: str
    model_type: str
    layers: int
    pattern: str
    tensors: list[Entry]
    parameters: int
    bytes: int
    sparse_bytes: int
    described_by: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as a dict for JSON."""
        return super().to_dict() | {"tensors": [entry._asdict() for entry in self.tensors]}

    def __str__(self) -> str:
        rows = [
            ["model_type", self.model_type],
            ["layers", str(self.layers)],
            ["parameters", f"{self.parameters:,}"],
            ["bytes", f"{self.bytes:,}"],
            [f"bytes at {self.pattern} with zeros left out", f"{self.sparse_bytes:,}"],
        ]
        if self.described_by is not None:
            rows.insert(0, ["no weights, described by", self.described_by])
        columns = ["tensors", "shape", "dtype", "number", "decision"]
        return f"{table(['model', self.model], rows)}\n{table(columns, _grouped(self.tensors))}"


def inspect_model(source: str | Path, recipe: Recipe = Recipe()) -> Inspection:
    """Lists the tensors of a model, and a recipe's decision on each; see `plan` for the source."""
    checkpoint = open_described(source)
    config = load_model(checkpoint).config
    decisions = _decisions(config, recipe)
    entries = []
    for name, tensor in checkpoint.tensors.items():
        decision = decisions.get(name, DENSE + "not used by the computation")
        size = sparse = byte_count(tensor)
        pattern = recipe.pattern_of(name)
        if decision == PRUNED and pattern is not None:
            sparse = sparse_bytes(size, tensor.dtype.itemsize, pattern)
        entries.append(Entry(name, tensor.shape, str(tensor.dtype), decision, size, sparse))
    return Inspection(
        model=str(source),
        model_type=str(checkpoint.config["model_type"]),
        layers=len(config.layers),
        pattern=", ".join(dict.fromkeys(map(str, recipe.patterns))),
        tensors=entries,
        parameters=sum(math.prod(entry.shape) for entry in entries),
        bytes=sum(entry.size for entry in entries),
        sparse_bytes=sum(entry.sparse_size for entry in entries),
        described_by=checkpoint.described_by,
    )


def sparse_bytes(size: int, width: int, pattern: AnyPattern) -> int:
    """Bytes of the kept values and of their places.

    For N:M the places are N numbers below M in each block. Without a pattern they are one bit for
    every weight.
    """
    weights = size // width
    if isinstance(pattern, Unstructured):
        return math.ceil(size * (1 - pattern.sparsity) + weights / 8)
    kept = weights * pattern.kept // pattern.group
    places = kept // pattern.unit
    return kept * width + math.ceil(places * math.ceil(math.log2(pattern.group)) / 8)


def _decisions(config: Config, recipe: Recipe) -> dict[str, str]:
    names = [outer_names(config), *(layer_names(config, i) for i in range(len(config.layers)))]
    decisions = {tensor: DENSE + _role(name) for own in names for name, tensor in own.items()}
    linears = list(all_linears(config))
    check_found([linear.tensor for linear in linears], recipe)
    for linear in linears:
        width, pattern = linear.shape[1], recipe.pattern_of(linear.tensor)
        decision = PRUNED
        if pattern is None:
            decision = DENSE + "by the recipe"
        elif width % pattern.width:
            decision = f"{REFUSED}width {width} does not fit {pattern}"
        decisions[linear.tensor] = decision
    return decisions


def _role(name: str) -> str:
    roles = {"embed_tokens": "embedding", "embed_positions": "positions", "lm_head": "head"}
    module, _, part = name.rpartition(".")
    default = "router" if module == "mlp.router" else "norm" if "norm" in module else "bias"
    return "bias" if part == "bias" else roles.get(module, default)


def _grouped(entries: list[Entry]) -> list[list[str]]:
    """One row for all tensors that differ only in a number in their names."""
    names = (starred(entry.name) for entry in entries)
    groups = collections.Counter(
        (name, " x ".join(map(str, entry.shape)), entry.dtype, entry.decision)
        for name, entry in zip(names, entries, strict=True)
    )
    return [[*key[:3], str(number), key[3]] for key, number in groups.items()]
