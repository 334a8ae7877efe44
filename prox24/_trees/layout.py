"""A weight of any shape as matrices (out, in), and back."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax import Array


class Layout(NamedTuple):
    """Which axes of a weight its product sums over, and what the others are.

    Attributes:
      stacked: axes that number independent matrices, as of a batched product or under `lax.scan`.
      outputs: axes of the outputs.
      summed: axes that are summed over, in the order of the flattened input, of which the last
        varies fastest; blocks of M run along that one.
      groups: how many equal parts the outputs have, each with inputs of its own, as in a grouped
        convolution.
    """

    stacked: tuple[int, ...]
    outputs: tuple[int, ...]
    summed: tuple[int, ...]
    groups: int = 1


def to_matrices(weight: Array, layout: Layout) -> Array:
    """The weight as matrices, shape (problems, out, in).

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = jnp.ones((3, 3, 8, 16))  # height, width, in, out
      >>> to_matrices(kernel, Layout((), (3,), (0, 1, 2))).shape
      (1, 16, 72)
    """
    problems = math.prod(weight.shape[axis] for axis in layout.stacked) * layout.groups
    width = math.prod(weight.shape[axis] for axis in layout.summed)
    return weight.transpose(_order(layout)).reshape(problems, -1, width)


def from_matrices(matrices: Array, layout: Layout, shape: Sequence[int]) -> Array:
    """The weight of that shape whose matrices these are.

    Example:
      >>> import jax.numpy as jnp
      >>> from_matrices(jnp.ones((1, 16, 72)), Layout((), (3,), (0, 1, 2)), (3, 3, 8, 16)).shape
      (3, 3, 8, 16)
    """
    order = _order(layout)
    return matrices.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


def _order(layout: Layout) -> tuple[int, ...]:
    return layout.stacked + layout.outputs + layout.summed
