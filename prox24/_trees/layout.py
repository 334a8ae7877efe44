"""A weight of any shape as matrices (out, in), and back."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax import Array


class Layout(NamedTuple):
    """The axes of a weight, by their role in its product."""

    # They number independent matrices, as in a batched product or under `lax.scan`.
    stacked: tuple[int, ...]
    outputs: tuple[int, ...]
    # In the order of the flattened input: the last varies fastest, and blocks of M run along it.
    summed: tuple[int, ...]
    # Equal parts of the outputs, each with inputs of its own, as in a grouped convolution.
    groups: int = 1


def to_matrices(weight: Array, layout: Layout) -> Array:
    """The weight as matrices, shape (problems, out, in)."""
    problems = math.prod(weight.shape[axis] for axis in layout.stacked) * layout.groups
    width = math.prod(weight.shape[axis] for axis in layout.summed)
    return weight.transpose(_order(layout)).reshape(problems, -1, width)


def from_matrices(matrices: Array, layout: Layout, shape: Sequence[int]) -> Array:
    """The weight of the given shape, made of its matrices; the inverse of `to_matrices`."""
    order = _order(layout)
    return matrices.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


def _order(layout: Layout) -> tuple[int, ...]:
    return layout.stacked + layout.outputs + layout.summed
