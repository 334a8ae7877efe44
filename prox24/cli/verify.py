"""`prox24 verify`: whether every pruned linear of a model holds its pattern."""

import argparse

import jax.numpy as jnp

from prox24 import torchax
from prox24.checkpoints.checkpoint import Checkpoint
from prox24.cli.output import print_json, print_table, progress_bar
from prox24.core.masks import count_violations, mean_sparsity
from prox24.core.pattern import Unstructured
from prox24.forward import all_linears, load_model
from prox24.pipeline import check_widths


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; 0 if every linear holds the pattern, else 1."""
    pattern = arguments.pattern
    group = 1 if isinstance(pattern, Unstructured) else pattern.group
    unit = "weights" if isinstance(pattern, Unstructured) else f"blocks of {group}"
    checkpoint, native = torchax.open_any(arguments.model)
    axes = native_axes(checkpoint) if native else torchax.linear_axes(checkpoint)
    shapes = {name: checkpoint.tensors[name].shape for name in axes}
    check_widths({name: shapes[name][axis] for name, axis in axes.items()}, pattern)
    violations: dict[str, int] = {}
    zeros = weights = 0.0
    with progress_bar("verify", len(axes), arguments.quiet) as advance:
        for name, axis in axes.items():
            weight = jnp.asarray(checkpoint.read(name))
            zeros += float(mean_sparsity(weight)) * weight.size
            weights += weight.size
            blocks = int(count_violations(weight, pattern, axis))
            if blocks:
                violations[name] = blocks
            advance(name, None)
    if arguments.json:
        print_json(
            {
                "model": str(arguments.model),
                "pattern": str(pattern),
                "linears": len(axes),
                "blocks": int(weights) // group,
                "sparsity": zeros / weights,
                "violations": violations,
            }
        )
        return 1 if violations else 0
    rows = [
        ["pattern, along the input axis", str(pattern)],
        ["linears", str(len(axes))],
        [unit, str(int(weights) // group)],
        ["exact zeros", f"{zeros / weights:.2%}"],
        ["linears that break the pattern", str(len(violations))],
    ]
    if not arguments.quiet:
        print_table(["model", str(arguments.model)], rows)
    for name, blocks in violations.items():
        print(f"{name}: {blocks} {unit} break the pattern {pattern}")
    return 1 if violations else 0


def native_axes(checkpoint: Checkpoint) -> dict[str, int]:
    """The pruned tensors of a native model, with the axis that each sums over."""
    config = load_model(checkpoint).config
    axis = 0 if config.names.transposed else 1
    return {linear.tensor: axis for linear in all_linears(config)}
