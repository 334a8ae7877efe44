"""A learnt basis for each attention head, before a stage is pruned."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding

from prox24 import basis
from prox24._core.pattern import AnyPattern, Pattern
from prox24._core.placement import everywhere
from prox24._core.precision import einsum
from prox24._pruning.recipe import Recipe
from prox24._pruning.runner import Inputs, Runner, Side
from prox24._solvers.protocol import n_of_m


def ties_of(
    runner: Runner[Any], index: int, recipe: Recipe, chosen: Mapping[str, AnyPattern]
) -> list[Sequence[Side]]:
    """The ties of a stage whose linears are all pruned to N:M; empty without a basis.

    The blocks of a linear that reads a head must not reach beyond the head.
    """
    if recipe.basis is None:
        return []

    def fits(side: Side) -> bool:
        pattern, width = chosen.get(side.tensor), side.places.shape[-1]
        return isinstance(pattern, Pattern) and (side.axis == 0 or width % pattern.width == 0)

    return [tie for tie in runner.ties(index) if all(map(fits, tie))]


def tied_tensors(ties: Sequence[Sequence[Side]]) -> set[str]:
    """The weights and biases that share a basis."""
    sides = [side for tie in ties for side in tie]
    return {name for side in sides for name in (side.tensor, side.bias) if name is not None}


def turn(
    runner: Runner[Any],
    index: int,
    recipe: Recipe,
    chosen: Mapping[str, AnyPattern],
    weights: dict[str, Array],
    inputs: dict[str, list[Inputs]],
) -> None:
    """Turns weights, biases and Grams of a stage in place; the stage computes the same function.

    Weights and biases are merged with R in float64 on the host, and rounded to float32.
    """
    if recipe.basis is None:
        return
    for tie in ties_of(runner, index, recipe, chosen):
        parts = [
            basis.Part(
                weights[side.tensor],
                inputs[side.input][0].gram,
                side.axis,
                side.places,
                n_of_m(chosen[side.tensor]),
            )
            for side in tie
        ]
        learnt = basis.learn(parts, damping=recipe.damping, steps=recipe.basis.steps)
        exact = basis.orthogonal(np.asarray(learnt, np.float64))
        for side in tie:
            names = [side.tensor] if side.bias is None else [side.tensor, side.bias]
            for name in names:
                given = np.asarray(weights[name], np.float64)
                merged = basis.turned(given, exact, side.places, side.axis)
                weights[name] = everywhere(jnp.asarray(merged, jnp.float32), runner.mesh)
            if side.axis == 1:
                rounded = everywhere(jnp.asarray(exact, jnp.float32), runner.mesh)
                inputs[side.input] = [_turned_inputs(own, rounded) for own in inputs[side.input]]


def _turned_inputs(own: Inputs, turn: Array) -> Inputs:
    """The Gram and the cross-Gram of turned inputs, as of a `prox24.basis.Part` of axis 1."""
    placed = own.gram.sharding
    columns = placed if isinstance(placed, NamedSharding) else None
    cross = None if own.cross is None else _turned_gram(own.cross, turn, columns)
    return own._replace(gram=_turned_gram(own.gram, turn, columns, symmetric=True), cross=cross)


@functools.partial(jax.jit, static_argnames=("columns", "symmetric"))
def _turned_gram(
    gram: Array, turn: Array, columns: NamedSharding | None, symmetric: bool = False
) -> Array:
    """R^T G R, with its columns on the same devices as the columns of G.

    `prox24.basis.turned` would send a whole Gram to every device. A symmetric Gram is made
    symmetric again after rounding.
    """

    def placed(matrix: Array) -> Array:
        return matrix if columns is None else lax.with_sharding_constraint(matrix, columns)

    heads, width, _ = turn.shape
    shape = (heads, -1, width, len(gram))
    rows = einsum("hij,hmik->hmjk", turn, gram.reshape(shape))
    rows = placed(rows.reshape(gram.shape))
    shape = (len(gram), heads, -1, width)
    both = einsum("khmi,hij->khmj", rows.reshape(shape), turn)
    both = placed(both.reshape(gram.shape))
    return placed((both + both.T) / 2) if symmetric else both
