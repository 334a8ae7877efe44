"""A weight of any shape as matrices (out, in), and back."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prox24._core.placement import whole


class Layout(NamedTuple):
    """The axes of a weight, by their role in its product."""

    # They number independent matrices, as in a batched product or under `lax.scan`.
    stacked: tuple[int, ...]
    outputs: tuple[int, ...]
    # In the order of the flattened input: the last varies fastest, and blocks of M run along it.
    summed: tuple[int, ...]
    # Equal parts of the outputs, each with inputs of its own, as in a grouped convolution.
    groups: int = 1


def problems(shape: tuple[int, ...], layout: Layout) -> int:
    """The number of matrices of a weight."""
    return math.prod(shape[axis] for axis in layout.stacked) * layout.groups


def input_width(shape: tuple[int, ...], layout: Layout) -> int:
    """The number of inputs of each matrix of a weight."""
    return math.prod(shape[axis] for axis in layout.summed)


@functools.partial(jax.jit, static_argnums=1)
def to_matrices(weight: Array, layout: Layout) -> list[Array]:
    """The weight as matrices (out, in), one for each problem."""
    count, width = problems(weight.shape, layout), input_width(weight.shape, layout)
    if weight.ndim > 2:
        weight = whole(weight)
    return list(weight.transpose(_order(layout)).reshape(count, -1, width))


@functools.partial(jax.jit, static_argnums=(1, 2))
def from_matrices(matrices: Sequence[Array], layout: Layout, shape: tuple[int, ...]) -> Array:
    """The weight of the given shape, made of its matrices; the inverse of `to_matrices`."""
    order = _order(layout)
    return jnp.stack(matrices).reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


def _order(layout: Layout) -> tuple[int, ...]:
    return layout.stacked + layout.outputs + layout.summed
