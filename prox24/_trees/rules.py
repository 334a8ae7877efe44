"""Rules that find the inputs of weights, one for each kind of equation of a jaxpr.

A rule maps an equation and its operands to its outputs. A value keeps its weight's path while it is
only cast or transposed. When such a value meets activations in a matrix product or a convolution,
the rule keeps the activations as rows. The layer computes rows @ matrix^T, with the matrices of the
weight's `Layout`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from prox24._core.placement import whole
from prox24._trees.layout import Layout
from prox24._trees.tap import tap_p
from prox24.errors import CalibrationError

Rule = Callable[[Any, list["Operand"], "Found"], list["Operand"]]


class Product(NamedTuple):
    """A weight's inputs in one of its uses.

    The matrices of the weight's layout are multiplied with `rows`, shape (problems, rows, in).
    The rows are made from `source`. Weights with one common input have the same object there. The
    product may be inside scans over the axes `scanned` of the weight. With `tapped`, the rows are
    from `prox24.tap`. Without `paired`, the order of the rows depends on values, so they
    cannot be matched with the rows of another model.
    """

    path: str
    layout: Layout
    rows: Any
    source: Any
    scanned: tuple[int, ...] = ()
    tapped: bool = False
    paired: bool = True


class View(NamedTuple):
    """A weight as a value of the jaxpr, or a slice of it within a scan.

    `axes` has the weight's axis for each axis of the value. Scans run over the `stacked` axes. Any
    other axis has length 1, and the value lacks it.
    """

    path: str
    axes: tuple[int, ...]
    stacked: tuple[int, ...] = ()


class Operand(NamedTuple):
    """A value, with its `View` if it is a weight."""

    value: Any
    view: View | None = None


@dataclasses.dataclass
class Found:
    """The products so far, in the order of the calls, and the other uses of weights, by path.

    `other_uses` has the name of the first operation that uses the weight without being a product.
    """

    shapes: dict[str, tuple[int, ...]]
    products: list[Product] = dataclasses.field(default_factory=list)
    other_uses: dict[str, str] = dataclasses.field(default_factory=dict)


def note_other_uses(
    equation: Any, operands: list[Operand], found: Found, use: str | None = None
) -> None:
    """Notes the weights among the operands as used by this equation; `use` is a better name."""
    for operand in operands:
        if operand.view is not None:
            found.other_uses.setdefault(operand.view.path, use or equation.primitive.name)


def other_use(
    equation: Any, operands: list[Operand], found: Found, use: str | None = None
) -> list[Operand]:
    """The rule of any other equation: its outputs are not known as weights."""
    note_other_uses(equation, operands, found, use)
    return _compute(equation, operands)


def bind(equation: Any, values: list[Any]) -> list[Any]:
    """The outputs of an equation of a jaxpr."""
    primitive = equation.primitive
    with equation.ctx.manager:  # For example, how random bits are made.
        result = primitive.bind(*values, **primitive.get_bind_params(equation.params))
    return list(result) if primitive.multiple_results else [result]


def _compute(equation: Any, operands: list[Operand]) -> list[Operand]:
    return list(map(Operand, bind(equation, [operand.value for operand in operands])))


def _same(equation: Any, operands: list[Operand], found: Found) -> list[Operand]:
    """The output is still the weight: its dtype, placement and axes may differ."""
    (output,), view = _compute(equation, operands), operands[0].view
    if view is not None:
        order = equation.params.get("permutation", range(len(view.axes)))
        removed = equation.params.get("dimensions", ())
        view = view._replace(axes=tuple(view.axes[i] for i in order if i not in removed))
    return [output._replace(view=view)]


def _tap(equation: Any, operands: list[Operand], found: Found) -> list[Operand]:
    name, axes, source = equation.params["name"], equation.params["axes"], operands[0].value
    if name not in found.shapes:
        raise CalibrationError(f"tap names {name}, which is not in the parameters")
    shape = found.shapes[name]
    features = source.shape[max(0, source.ndim - len(axes)) :]
    if features != tuple(dict(enumerate(shape)).get(axis) for axis in axes):
        raise CalibrationError(
            f"tap of {name}: the last axes of {source.shape} are not the axes {axes} of {shape}"
        )
    outputs = tuple(axis for axis in range(len(shape)) if axis not in axes)
    rows = whole(source).reshape(1, -1, math.prod(features))
    found.products.append(Product(name, Layout((), outputs, axes), rows, source, tapped=True))
    return operands


def _matrix_product(equation: Any, operands: list[Operand], found: Found) -> list[Operand]:
    weights = [side for side in (0, 1) if operands[side].view is not None]
    contracted, batched = equation.params["dimension_numbers"]
    empty = any(0 in operand.value.shape for operand in operands)
    if len(weights) != 1 or not contracted[0] or empty:
        return other_use(equation, operands, found, "an empty product" if empty else None)
    (own,) = weights
    view, source = operands[own].view, operands[1 - own].value
    assert view is not None

    def pairs(dimensions: Any) -> list[tuple[int, int]]:
        """Pairs of an axis of the weight and its axis of the source, sorted by the weight's."""
        of_weight = (view.axes[i] for i in dimensions[own])
        return sorted(zip(of_weight, dimensions[1 - own], strict=True))

    summed, stacked = pairs(contracted), pairs(batched)
    layout = _layout(view, found, [axis for axis, _ in stacked], [axis for axis, _ in summed])
    first, last = [i for _, i in stacked], [i for _, i in summed]
    free = [i for i in range(source.ndim) if i not in first + last]
    problems = math.prod(source.shape[i] for i in first)
    width = math.prod(source.shape[i] for i in last)
    rows = whole(source).transpose(first + free + last).reshape(problems, -1, width)
    found.products.append(Product(view.path, layout, rows, source, view.stacked))
    return _compute(equation, operands)


def _ragged_product(equation: Any, operands: list[Operand], found: Found) -> list[Operand]:
    """Rows (rows, in) sorted by expert, with a weight (experts, in, out); no other axes.

    Each expert is a problem with all rows. Rows of other experts are zero there.
    """
    source, weight, counts = operands
    dimensions = equation.params["ragged_dot_dimension_numbers"]
    contracted, batched = dimensions.dot_dimension_numbers
    plain = (
        equation.params["group_offset"] is None
        and (source.value.ndim, weight.value.ndim, len(contracted[0])) == (2, 3, 1)
        and not batched[0]
        and tuple(dimensions.lhs_ragged_dimensions) != tuple(contracted[0])
    )
    view = weight.view
    if not plain or view is None or source.view is not None:
        return other_use(equation, operands, found)
    of_weight = dimensions.rhs_group_dimensions, contracted[1]
    stacked, summed = ([view.axes[i] for i in axes] for axes in of_weight)
    rows = jnp.moveaxis(whole(source.value), contracted[0][0], -1)
    sizes = whole(counts.value)[:, None]
    after = jnp.cumsum(sizes, axis=0, dtype=sizes.dtype)
    place = jnp.arange(len(rows), dtype=sizes.dtype)[None]
    own = (place < after) & (place >= after - sizes)
    rows = jnp.where(own[..., None], rows, 0)
    layout = _layout(view, found, stacked, summed)
    product = Product(view.path, layout, rows, source.value, view.stacked, paired=False)
    found.products.append(product)
    return _compute(equation, operands)


def _layout(view: View, found: Found, stacked: Sequence[int], summed: Sequence[int]) -> Layout:
    """The layout of a product; all other axes are outputs."""
    taken = (*view.stacked, *stacked, *summed)
    others = (axis for axis in range(len(found.shapes[view.path])) if axis not in taken)
    return Layout((*view.stacked, *stacked), tuple(others), tuple(summed))


def _convolution(equation: Any, operands: list[Operand], found: Found) -> list[Operand]:
    params, (image, kernel) = equation.params, operands
    if image.view is not None or kernel.view is None or params["batch_group_count"] != 1:
        return other_use(equation, operands, found)
    image_axes, kernel_axes, _ = params["dimension_numbers"]
    _, inputs, *places = (kernel.view.axes[i] for i in kernel_axes)
    groups, window = params["feature_group_count"], [kernel.value.shape[i] for i in kernel_axes[2:]]
    # The patches are copies of the input, and exact only at the highest precision.
    patches = lax.conv_general_dilated_patches(
        whole(image.value).transpose(image_axes),
        window,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        precision=lax.Precision.HIGHEST,
    )
    # From (images, channels * window, ...) to rows with channels as the fastest axis. So M
    # consecutive channels are M consecutive entries of a row.
    count, size = patches.shape[0], math.prod(window)
    channels = patches.shape[1] // (groups * size)
    split = patches.reshape(count, groups, channels, size, -1)
    rows = split.transpose(1, 0, 4, 3, 2).reshape(groups, -1, size * channels)
    layout = _layout(kernel.view, found, (), (*places, inputs))._replace(groups=groups)
    found.products.append(Product(kernel.view.path, layout, rows, image.value, kernel.view.stacked))
    return _compute(equation, operands)


# Any other primitive counts as another use of the weight.
RULES: dict[str, Rule] = {
    "dot_general": _matrix_product,
    "ragged_dot_general": _ragged_product,
    "conv_general_dilated": _convolution,
    "transpose": _same,
    "squeeze": _same,
    "convert_element_type": _same,
    "copy": _same,
    "name": _same,
    "reshard": _same,
    "sharding_constraint": _same,
    "stop_gradient": _same,
    tap_p.name: _tap,
}
