"""A learnt basis for each attention head, before a stage is pruned."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from prox24 import basis
from prox24._core.pattern import AnyPattern, Pattern
from prox24._core.placement import everywhere
from prox24._core.precision import working_dtype
from prox24._pruning.recipe import Recipe
from prox24._pruning.runner import Inputs, Runner, Side


def ties_of(
    runner: Runner[Any], index: int, recipe: Recipe, chosen: Mapping[str, AnyPattern]
) -> list[Sequence[Side]]:
    """The ties of a stage whose linears are all pruned to N:M; none without a basis."""
    if recipe.basis is None:
        return []
    return [
        tie
        for tie in runner.ties(index)
        if all(isinstance(chosen.get(side.tensor), Pattern) for side in tie)
    ]


def tied_tensors(ties: Sequence[Sequence[Side]]) -> set[str]:
    """The weights and biases that are turned together."""
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
    """Turns weights, biases and Grams of a stage in place; the function of the stage stays.

    Weights and biases are merged with R in float64 on the host, and rounded to float32.
    """
    for tie in ties_of(runner, index, recipe, chosen):
        assert recipe.basis is not None
        parts = [
            basis.Part(
                weights[side.tensor].astype(working_dtype(weights[side.tensor].dtype)),
                inputs[side.input][0].gram,
                side.axis,
                side.places,
                chosen[side.tensor],  # type: ignore[arg-type]  # see `ties_of`
            )
            for side in tie
        ]
        learnt = basis.learn(parts, damping=recipe.damping, steps=recipe.basis.steps)
        exact = basis.orthogonal(np.asarray(learnt, np.float64))
        for side in tie:
            names = [side.tensor] if side.bias is None else [side.tensor, side.bias]
            for name in names:
                given = np.asarray(weights[name], np.float64)
                merged = jnp.asarray(basis.turned(given, exact, side.places, side.axis))
                weights[name] = everywhere(merged.astype(jnp.float32), runner.mesh)
            if side.axis == 1:
                turned = [_turned_inputs(own, learnt, side.places) for own in inputs[side.input]]
                inputs[side.input] = turned


def _turned_inputs(own: Inputs, turn: Array, places: basis.Places) -> Inputs:
    def both(gram: Array) -> Array:
        once = basis.turned(gram, turn, places, axis=1)
        return basis.turned(once, turn, places, axis=0)

    return own._replace(gram=both(own.gram), cross=None if own.cross is None else both(own.cross))
