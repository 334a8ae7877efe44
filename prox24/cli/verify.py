"""`prox24 verify`: whether every pruned linear of a model holds its pattern."""

import argparse

import jax.numpy as jnp

from prox24.checkpoints.checkpoint import open_checkpoint
from prox24.cli.output import print_json, print_table, progress_bar
from prox24.core.masks import count_violations, mean_sparsity
from prox24.core.pattern import Unstructured
from prox24.forward import all_linears, load_model, oriented
from prox24.pipeline import check_widths


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out; 0 if every linear holds the pattern, else 1."""
    pattern = arguments.pattern
    group = 1 if isinstance(pattern, Unstructured) else pattern.group
    unit = "weights" if isinstance(pattern, Unstructured) else f"blocks of {group}"
    checkpoint = open_checkpoint(arguments.model)
    model = load_model(checkpoint)
    check_widths(model, pattern)
    names = [linear.tensor for linear in all_linears(model.config)]
    violations: dict[str, int] = {}
    zeros = weights = 0.0
    with progress_bar("verify", len(names), arguments.quiet) as advance:
        for name in names:
            weight = oriented(model.config, jnp.asarray(checkpoint.read(name)))
            zeros += float(mean_sparsity(weight)) * weight.size
            weights += weight.size
            blocks = int(count_violations(weight, pattern))
            if blocks:
                violations[name] = blocks
            advance(name, None)
    if arguments.json:
        print_json(
            {
                "model": str(arguments.model),
                "pattern": str(pattern),
                "linears": len(names),
                "blocks": int(weights) // group,
                "sparsity": zeros / weights,
                "violations": violations,
            }
        )
        return 1 if violations else 0
    rows = [
        ["pattern, along the input axis", str(pattern)],
        ["linears", str(len(names))],
        [unit, str(int(weights) // group)],
        ["exact zeros", f"{zeros / weights:.2%}"],
        ["linears that break the pattern", str(len(violations))],
    ]
    if not arguments.quiet:
        print_table(["model", str(arguments.model)], rows)
    for name, blocks in violations.items():
        print(f"{name}: {blocks} {unit} break the pattern {pattern}")
    return 1 if violations else 0
