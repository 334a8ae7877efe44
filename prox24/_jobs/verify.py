"""Checks a pruned model, tensor by tensor: its pattern, its hashes and its values."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from numpy.typing import NDArray

from prox24._checkpoints.checkpoint import Checkpoint
from prox24._checkpoints.manifest import read_manifest
from prox24._checkpoints.tensors import TensorSource, is_finite
from prox24._checkpoints.unfinished import sha256
from prox24._core.masks import count_violations, mean_sparsity, sparse_axes
from prox24._core.pattern import Pattern, PatternLike, Unstructured
from prox24._jobs import torchax
from prox24._jobs.output import Report, table, versions
from prox24._jobs.progress import progress_bar
from prox24._pruning.recipe import Recipe
from prox24._pruning.runner import check_widths

MOST_LINES = 20
"""The largest number of problems that are printed."""


@dataclasses.dataclass(frozen=True)
class VerifyReport(Report):
    """The result of `verify`; printed, it is a table and lines with the first problems.

    Attributes:
      model: the checked model.
      source: the model of the comparison, or None.
      manifest: whether the folder has a manifest.
      pattern: the pattern of the linears, as text; the patterns of a recipe are separated by
        commas.
      tensors: the number of tensors.
      linears: the number of linears that should have the pattern.
      refined: trained or turned tensors outside the pruned linears; they are not compared with the
        source.
      blocks: the number of blocks of the linears; the number of weights without N:M.
      sparsity: share of exact zeros in the linears, from 0 to 1.
      violations: by tensor, the number of blocks that break the pattern.
      problems: by tensor, the problem.
      others: the number of tensors outside the linears and `refined`.
      versions: of Python and packages.
    """

    model: str
    source: str | None
    manifest: bool
    pattern: str
    tensors: int
    linears: int
    refined: list[str]
    blocks: int
    sparsity: float
    violations: dict[str, int]
    problems: dict[str, str]
    others: int
    versions: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def __str__(self) -> str:
        compared = "" if self.source is None else ", compared with the source"
        rows = [
            ["pattern, along the input axis", self.pattern],
            ["linears", str(self.linears)],
            ["blocks", str(self.blocks)],
            ["exact zeros", f"{self.sparsity:.2%}"],
            ["linears that break the pattern", str(len(self.violations))],
            ["tensors", str(self.tensors)],
            ["hashes", "compared with the manifest" if self.manifest else "no manifest"],
            ["other tensors", f"{self.others}{compared}"],
            ["changed with the linears, not compared", str(len(self.refined))],
            ["tensors with problems", str(len(self.problems))],
        ]
        return "\n".join([table(["model", self.model], rows), *self.problem_lines()])

    def problem_lines(self) -> list[str]:
        """A line for each of the first problems, and their number if there are more."""
        lines = [f"{name}: {problem}" for name, problem in self.problems.items()]
        more = len(lines) - MOST_LINES
        if more > 1:
            lines[MOST_LINES:] = [f"and {more} more: --json and --report FILE show all"]
        return lines


def verify(
    model: str | Path,
    source: str | Path | None = None,
    pattern: PatternLike | Unstructured | str | None = None,
    *,
    quiet: bool = True,
) -> VerifyReport:
    """Checks the pattern, the hashes and the values of a pruned model.

    Args:
      model: an HF folder, a GGUF file, or the hub's OWNER/NAME[@REVISION].
      source: the dense model. All unpruned tensors must equal its tensors.
      pattern: the pattern that every linear must have. None checks the pruned tensors for the
        pattern of the recipe in the folder's manifest. Without a recipe, None checks every linear
        for 2:4.
      quiet: shows no progress bar.

    Returns:
      A `VerifyReport`; its `ok` is True without a problem.

    Raises:
      CheckpointError: a model cannot be read, or an input width is not divisible by M.
      RecipeError: the pattern is not valid.
    """
    checkpoint = torchax.open_any(model)
    manifest = read_manifest(checkpoint.path)
    axes = torchax.linear_axes(checkpoint)
    entries = {} if manifest is None else manifest["tensors"]
    made = None if manifest is None or pattern is not None else manifest.get("recipe")
    if made is None:
        recipe = Recipe(pattern=(2, 4) if pattern is None else pattern)
    else:
        names = [name for name in ("pattern", "only", "skip") if name in made]
        recipe = Recipe.from_dict({name: made[name] for name in names})
        axes = {name: axis for name, axis in axes.items() if "pruned" in entries.get(name, {})}
    widths = {name: checkpoint.tensors[name].shape[axis] for name, axis in axes.items()}
    check_widths(widths, recipe)
    given = None if source is None else torchax.open_any(source)
    problems = _missing(checkpoint, given, None if manifest is None else entries)
    refined = {name for name, entry in entries.items() if entry.get("refined")}
    copies = {} if given is None else given.tensors
    violations: dict[str, int] = {}
    zeros = weights = blocks = 0.0
    with progress_bar("verify", checkpoint.tensors, quiet, log=False) as advance:
        for name, tensor in checkpoint.tensors.items():
            values, own = tensor.read(), entries.get(name, {})
            promised = own.get("dtype", values.dtype.name)
            if values.dtype.name != promised:
                problems[name] = f"is {values.dtype}, the manifest says {promised}"
            elif own and sha256(values) != own["sha256"]:
                problems[name] = "is not what the manifest says"
            if name in axes:
                weight, sought = jnp.asarray(values), recipe.pattern_of(name)
                assert sought is not None
                zeros += float(mean_sparsity(weight)) * weight.size
                weights += weight.size
                blocks += weight.size // sought.width
                broken = int(count_violations(weight, sought, axes[name]))
                if broken:
                    unit = "weights" if sought.width == 1 else f"blocks of {sought.width}"
                    violations[name] = broken
                    problems[name] = f"{broken} {unit} break the pattern {sought}"
                    if isinstance(sought, Pattern) and (others := sparse_axes(weight, sought)):
                        problems[name] += (
                            f"; it has the pattern along axis {others[0]}, over which the layer "
                            "does not sum, so no hardware gains"
                        )
            elif name in copies and name not in refined and _differ(values, copies[name]):
                problems[name] = "is not what the source has"
            if name not in checkpoint.buffers and not is_finite(values):
                before = [problems[name]] if name in problems else []
                problems[name] = "; ".join(["holds NaN or Inf", *before])
            advance(name, None)
    return VerifyReport(
        model=str(model),
        source=None if given is None else str(given.path),
        manifest=manifest is not None,
        pattern=", ".join(dict.fromkeys(str(recipe.pattern_of(name)) for name in axes)),
        tensors=len(checkpoint.tensors),
        linears=len(axes),
        refined=sorted(refined),
        blocks=int(blocks),
        sparsity=zeros / weights if weights else 0.0,
        violations=violations,
        problems=problems,
        others=len(checkpoint.tensors.keys() - axes.keys() - refined),
        versions=versions(),
    )


def _missing(
    checkpoint: Checkpoint, source: Checkpoint | None, manifest: Mapping[str, Any] | None
) -> dict[str, str]:
    """The problems of names and shapes; no tensor is read."""
    problems: dict[str, str] = {}
    own = checkpoint.tensors
    if manifest is not None:
        problems |= dict.fromkeys(manifest.keys() - own.keys(), "is missing")
        problems |= dict.fromkeys(own.keys() - manifest.keys(), "is not in the manifest")
    if source is not None:
        for name, tensor in source.tensors.items():
            if name not in own:
                problems[name] = "is missing"
            elif own[name].shape != tensor.shape:
                problems[name] = f"has shape {own[name].shape}, the source has {tensor.shape}"
        for name in own.keys() - source.tensors.keys():
            problems.setdefault(name, "is not in the source")
    return problems


def _differ(values: NDArray[Any], source: TensorSource) -> bool:
    """Whether any bit differs, after a cast of the source; `_missing` reports other shapes."""
    same_shape = values.shape == source.shape
    return same_shape and sha256(values) != sha256(source.read().astype(values.dtype, copy=False))
