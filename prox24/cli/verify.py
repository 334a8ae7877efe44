"""`prox24 verify`: whether a pruned model is what it should be, tensor by tensor."""

import argparse
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from numpy.typing import NDArray

from prox24 import torchax
from prox24.checkpoints.checkpoint import Checkpoint
from prox24.checkpoints.manifest import read_manifest
from prox24.checkpoints.tensors import is_finite
from prox24.checkpoints.unfinished import sha256
from prox24.cli.output import (
    check_report,
    print_json,
    print_table,
    progress_bar,
    reporting,
    versions,
)
from prox24.core.masks import count_violations, mean_sparsity
from prox24.core.pattern import Unstructured
from prox24.forward import all_linears, check_widths, load_model


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; 0 if every tensor is as it should be, else 1."""
    check_report(arguments.report, (arguments.model, arguments.source))
    pattern = arguments.pattern
    group = 1 if isinstance(pattern, Unstructured) else pattern.group
    unit = "weights" if isinstance(pattern, Unstructured) else f"blocks of {group}"
    checkpoint, native = torchax.open_any(arguments.model)
    axes = native_axes(checkpoint) if native else torchax.linear_axes(checkpoint)
    shapes = {name: checkpoint.tensors[name].shape for name in axes}
    check_widths({name: shapes[name][axis] for name, axis in axes.items()}, pattern)
    source = None if arguments.source is None else torchax.open_any(arguments.source)[0]
    manifest = read_manifest(checkpoint.path)
    entries = {} if manifest is None else manifest
    hashes = {name: entry["sha256"] for name, entry in entries.items()}
    refined = {name for name, entry in entries.items() if entry.get("refined")}
    given = {} if source is None else source.tensors
    problems = _missing(checkpoint, source, manifest)
    violations: dict[str, int] = {}
    zeros = weights = 0.0
    with progress_bar("verify", len(checkpoint.tensors), arguments.quiet) as advance:
        for name in checkpoint.tensors:
            values = checkpoint.tensors[name].read()
            promised = entries.get(name, {}).get("dtype", values.dtype.name)
            if values.dtype.name != promised:
                problems[name] = f"is {values.dtype}, the manifest says {promised}"
            elif name in hashes and sha256(values) != hashes[name]:
                problems[name] = "is not what the manifest says"
            if name in axes:
                weight = jnp.asarray(values)
                zeros += float(mean_sparsity(weight)) * weight.size
                weights += weight.size
                blocks = int(count_violations(weight, pattern, axes[name]))
                if blocks:
                    violations[name] = blocks
                    problems[name] = f"{blocks} {unit} break the pattern {pattern}"
            elif name in given and name not in refined and not _equal(values, given[name].read()):
                problems[name] = "is not what the source has"
            if name not in checkpoint.buffers and not is_finite(values):
                before = [problems[name]] if name in problems else []
                problems[name] = "; ".join(["holds NaN or Inf", *before])
            advance(name, None)
    report = {
        "model": str(arguments.model),
        "source": None if source is None else str(source.path),
        "manifest": manifest is not None,
        "pattern": str(pattern),
        "tensors": len(checkpoint.tensors),
        "linears": len(axes),
        "refined": sorted(refined),
        "blocks": int(weights) // group,
        "sparsity": zeros / weights,
        "violations": violations,
        "problems": problems,
        "versions": versions(),
    }
    others = len(checkpoint.tensors.keys() - axes.keys() - refined)
    rows = [
        ["pattern, along the input axis", str(pattern)],
        ["linears", str(len(axes))],
        [unit, str(int(weights) // group)],
        ["exact zeros", f"{zeros / weights:.2%}"],
        ["linears that break the pattern", str(len(violations))],
        ["tensors", str(len(checkpoint.tensors))],
        ["hashes", "no manifest" if manifest is None else "compared with the manifest"],
        ["other tensors", str(others) if source is None else f"{others}, compared with the source"],
        ["refined tensors, not compared", str(len(refined))],
        ["tensors with problems", str(len(problems))],
    ]
    with reporting(arguments.report, report):
        if arguments.json:
            print_json(report)
        else:
            if not arguments.quiet:
                print_table(["model", str(arguments.model)], rows)
            for name, problem in problems.items():
                print(f"{name}: {problem}")
    return 1 if problems else 0


def native_axes(checkpoint: Checkpoint) -> dict[str, int]:
    """The pruned tensors of a native model, with the axis that each sums over."""
    config = load_model(checkpoint).config
    axis = 0 if config.names.transposed else 1
    return {linear.tensor: axis for linear in all_linears(config)}


def _missing(
    checkpoint: Checkpoint, source: Checkpoint | None, manifest: Mapping[str, Any] | None
) -> dict[str, str]:
    """What is wrong without reading a tensor: names and shapes."""
    problems: dict[str, str] = {}
    if manifest is not None:
        problems |= {name: "is missing" for name in manifest.keys() - checkpoint.tensors.keys()}
        problems |= {
            name: "is not in the manifest" for name in checkpoint.tensors.keys() - manifest.keys()
        }
    if source is not None:
        for name, tensor in source.tensors.items():
            if name not in checkpoint.tensors:
                problems[name] = "is missing"
            elif checkpoint.tensors[name].shape != tensor.shape:
                problems[name] = (
                    f"has shape {checkpoint.tensors[name].shape}, the source has {tensor.shape}"
                )
        for name in checkpoint.tensors.keys() - source.tensors.keys():
            problems.setdefault(name, "is not in the source")
    return problems


def _equal(values: NDArray[Any], source: NDArray[Any]) -> bool:
    """Bit for bit, after the change of dtype that a user may have asked for."""
    return values.shape == source.shape and sha256(values) == sha256(
        source.astype(values.dtype, copy=False)
    )
