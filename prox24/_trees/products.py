"""Finds where a model multiplies its weights with activations, in any library.

The model is traced to a jaxpr, which is evaluated equation by equation. A value keeps its weight's
path while it is only cast or transposed. When such a value meets activations in a matrix product or
a convolution, the activations are kept as rows. The layer computes rows @ matrix^T, with the
matrices of the weight's `Layout`. The code depends on no library of layers.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Literal

from prox24._core.placement import whole
from prox24._trees.layout import Layout
from prox24._trees.tap import tap_p
from prox24.errors import CalibrationError
from prox24.optax._leaves import PyTree, named_leaves

Apply = Callable[[Any, Any], Any]


class Product(NamedTuple):
    """A weight's inputs in one of its uses.

    The matrices of the weight's layout are multiplied with `rows`, shape (problems, rows, in).
    The rows are made from `source`. Weights with one common input have the same object there. With
    `tapped`, the rows are from `prox24.tap`.
    """

    path: str
    layout: Layout
    rows: Array
    source: Any
    tapped: bool = False


class View(NamedTuple):
    """A weight as a value of the jaxpr, or a slice of it within a scan.

    `axes` has the weight's axis for each axis of the value. Scans run over the `stacked` axes.
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


def find_products(
    apply: Apply, params: PyTree, batch: PyTree
) -> tuple[list[Product], dict[str, str]]:
    """Evaluates `apply(params, batch)`, and returns the inputs of its weights instead of its value.

    Returns the products in the order of the calls, and by path why a weight has none. A tapped
    weight has the products of its taps only. A weight has no products if they sum over different
    axes, or if its inputs are complex. A weight without a tap also has none if another operation
    uses it. In all these cases its Gram would not measure the cost of pruning. Raises
    CalibrationError if a tap does not fit the parameters.

    Example:
      >>> def apply(params, x):
      ...     return params["scale"] * (x @ params["kernel"])
      >>> params = {"kernel": jnp.ones((4, 2)), "scale": jnp.float32(2)}
      >>> (product,), others = find_products(apply, params, jnp.ones((5, 3, 4)))
      >>> product.path, product.rows.shape, others
      ('kernel', (1, 15, 4), {'scale': 'used by mul'})
    """
    named = [(path, leaf) for path, leaf in named_leaves(params) if is_array(leaf)]
    arrays, join = split_arrays(params)

    def results(arrays: list[Array], batch: PyTree) -> list[Array]:
        return [leaf for leaf in jax.tree.leaves(apply(join(arrays), batch)) if is_array(leaf)]

    closed = jax.make_jaxpr(results)(arrays, batch)
    weights = [Operand(leaf, View(path, tuple(range(leaf.ndim)))) for path, leaf in named]
    found = Found({path: leaf.shape for path, leaf in named})
    _evaluate(closed, [*weights, *map(Operand, jax.tree.leaves(batch))], found)

    tapped = {product.path for product in found.products if product.tapped}
    products = [p for p in found.products if p.tapped or p.path not in tapped]
    reasons = {
        path: f"used by {use}" for path, use in found.other_uses.items() if path not in tapped
    }
    layouts: dict[str, Layout] = {}
    for product in products:
        if layouts.setdefault(product.path, product.layout) != product.layout:
            reasons[product.path] = "summed over different axes by different products"
        if jnp.iscomplexobj(product.rows):
            reasons[product.path] = "its inputs are complex"
    return [product for product in products if product.path not in reasons], reasons


def is_array(leaf: Any) -> bool:
    """Whether a leaf of a tree is an array; modules also hold functions and numbers."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def split_arrays(params: PyTree) -> tuple[list[Array], Callable[[list[Array]], PyTree]]:
    """The arrays of a tree, and a function that makes the tree again with other arrays."""

    def join(arrays: list[Array]) -> PyTree:
        remaining = iter(arrays)
        return jax.tree.map(lambda leaf: next(remaining) if is_array(leaf) else leaf, params)

    return [leaf for leaf in jax.tree.leaves(params) if is_array(leaf)], join


def _evaluate(closed: Any, arguments: list[Operand], found: Found) -> list[Operand]:
    """The outputs of a jaxpr, closed or without constants."""
    jaxpr, constants = opened(closed)
    values = dict(zip(jaxpr.constvars, map(Operand, constants), strict=True))
    values |= zip(jaxpr.invars, arguments, strict=True)

    def read(atom: Any) -> Operand:
        return Operand(atom.val) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        rule = RULES.get(equation.primitive.name, _other)
        earlier = len(found.products)
        with equation.ctx.manager:
            outputs = rule(equation, [read(atom) for atom in equation.invars], found)
        values |= zip(equation.outvars, outputs, strict=True)
        # The equation may be inside jax.sharding.auto_axes, where rows have another mesh.
        new = [product._replace(rows=whole(product.rows)) for product in found.products[earlier:]]
        found.products[earlier:] = new
    return [read(atom) for atom in jaxpr.outvars]


def opened(closed: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr without its constants, and its constants."""
    # JAX 0.12 has one class for open and closed jaxprs, earlier versions have two.
    return getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())


def _compute(equation: Any, operands: list[Operand]) -> list[Operand]:
    return list(map(Operand, bind(equation, [operand.value for operand in operands])))


def bind(equation: Any, values: list[Any]) -> list[Any]:
    """The outputs of an equation of a jaxpr."""
    primitive = equation.primitive
    with equation.ctx.manager:  # For example, how random bits are made.
        result = primitive.bind(*values, **primitive.get_bind_params(equation.params))
    return list(result) if primitive.multiple_results else [result]


def _note_other_uses(equation: Any, operands: list[Operand], found: Found) -> None:
    for operand in operands:
        if operand.view is not None:
            found.other_uses.setdefault(operand.view.path, equation.primitive.name)


def _other(equation: Any, operands: list[Operand], found: Found) -> list[Operand]:
    _note_other_uses(equation, operands, found)
    return _compute(equation, operands)


def _inline(name: str) -> Callable[[Any, list[Operand], Found], list[Operand]]:
    """The rule of a call, where `name` is the parameter that holds its jaxpr."""
    return lambda equation, operands, found: _evaluate(equation.params[name], operands, found)


def _same(equation: Any, operands: list[Operand], found: Found) -> list[Operand]:
    (output,) = _compute(equation, operands)
    return [output._replace(view=operands[0].view)]


def _transpose(equation: Any, operands: list[Operand], found: Found) -> list[Operand]:
    (output,), view = _compute(equation, operands), operands[0].view
    if view is not None:
        view = view._replace(axes=tuple(view.axes[i] for i in equation.params["permutation"]))
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
        return _other(equation, operands, found)
    (own,) = weights
    view, source = operands[own].view, operands[1 - own].value
    assert view is not None

    def pairs(dimensions: Any) -> list[tuple[int, int]]:
        """Pairs of an axis of the weight and its axis of the source, sorted by the weight's."""
        of_weight = (view.axes[i] for i in dimensions[own])
        return sorted(zip(of_weight, dimensions[1 - own], strict=True))

    summed, stacked = pairs(contracted), pairs(batched)
    taken = {axis for axis, _ in summed + stacked}
    layout = Layout(
        stacked=view.stacked + tuple(axis for axis, _ in stacked),
        outputs=tuple(sorted(axis for axis in view.axes if axis not in taken)),
        summed=tuple(axis for axis, _ in summed),
    )
    first, last = [i for _, i in stacked], [i for _, i in summed]
    free = [i for i in range(source.ndim) if i not in first + last]
    problems = math.prod(source.shape[i] for i in first)
    width = math.prod(source.shape[i] for i in last)
    rows = whole(source).transpose(first + free + last).reshape(problems, -1, width)
    found.products.append(Product(view.path, layout, rows, source))
    return _compute(equation, operands)


def _convolution(equation: Any, operands: list[Operand], found: Found) -> list[Operand]:
    params, (image, kernel) = equation.params, operands
    if image.view is not None or kernel.view is None or params["batch_group_count"] != 1:
        return _other(equation, operands, found)
    image_axes, kernel_axes, _ = params["dimension_numbers"]
    outputs, inputs, *places = (kernel.view.axes[i] for i in kernel_axes)
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
    layout = Layout(kernel.view.stacked, (outputs,), (*places, inputs), groups)
    found.products.append(Product(kernel.view.path, layout, rows, image.value))
    return _compute(equation, operands)


def _scan(equation: Any, operands: list[Operand], found: Found) -> list[Operand]:
    """A scan whose body is evaluated by the same rules, and also returns its rows.

    A weight that the scan runs over has a problem for each step. A weight that every step uses has
    the rows of all steps.
    """
    body = equation.params["jaxpr"]
    inner = getattr(body, "jaxpr", body)
    carried = len(equation.outvars) - _count_scanned(equation.outvars, inner.outvars)
    end = len(operands) - _count_scanned(equation.invars, inner.invars)
    constants, carry = operands[: end - carried], operands[end - carried : end]
    runs = operands[end:]
    _note_other_uses(equation, carry, found)
    views = [
        run.view and View(run.view.path, run.view.axes[1:], run.view.stacked + run.view.axes[:1])
        for run in runs
    ]
    # A step may return its slice of a weight, as NNX layers do. Together they are the weight again.
    wholes = dict(zip(views, (run.view for run in runs), strict=True))
    bodies: list[Found] = []
    handed_on: list[View | None] = []

    def step(carry: list[Array], slices: list[Array]) -> Any:
        within = Found(found.shapes)
        arguments = [*constants, *map(Operand, carry), *map(Operand, slices, views)]
        results = _evaluate(body, arguments, within)
        handed_on[:] = [wholes.get(result.view) for result in results[carried:]]
        # After the scan, other outputs are no longer known as weights.
        others = [r for r, whole in zip(results[carried:], handed_on, strict=True) if whole is None]
        _note_other_uses(equation, [*results[:carried], *others], within)
        outputs = [operand.value for operand in results]
        bodies.append(within)
        rows = [product.rows for product in within.products]
        return outputs[:carried], (outputs[carried:], rows)

    final, (stacks, rows) = lax.scan(
        step,
        [operand.value for operand in carry],
        [run.value for run in runs],
        equation.params["length"],
        equation.params["reverse"],
    )
    within = bodies[-1]
    run_over = {view.path: view.stacked[-1] for view in views if view is not None}
    for product, stack in zip(within.products, rows, strict=True):
        found.products.append(_merge(product, stack, run_over.get(product.path)))
    found.other_uses = within.other_uses | found.other_uses
    return [*map(Operand, final), *map(Operand, stacks, handed_on)]


def _count_scanned(outside: list[Any], inside: list[Any]) -> int:
    """The number of variables that a scan runs over: they have one axis less inside."""
    pairs = zip(outside, inside, strict=True)
    return sum(len(out.aval.shape) != len(within.aval.shape) for out, within in pairs)


def _merge(product: Product, stack: Array, run_over: int | None) -> Product:
    """The product with the rows of all steps; `stack` has shape (steps, problems, rows, in).

    If the steps run over the axis `run_over` of the weight, each step has its own problems.
    """
    _, problems, _, width = stack.shape
    if run_over is None:
        rows = jnp.moveaxis(stack, 0, 1).reshape(problems, -1, width)
        return product._replace(rows=rows)
    layout = _stacked(product.path, product.layout, run_over) if product.tapped else product.layout
    return product._replace(rows=stack.reshape(-1, *stack.shape[-2:]), layout=layout)


def _stacked(path: str, layout: Layout, axis: int) -> Layout:
    """The layout of a tap within a scan over an axis of the weight; a tap has no stacked axes."""
    if axis in layout.summed:
        raise CalibrationError(
            f"tap of {path} sums over axis {axis}, which a scan runs over: count the axes of the "
            "whole weight"
        )
    outputs = tuple(other for other in layout.outputs if other != axis)
    return layout._replace(stacked=(axis, *layout.stacked), outputs=outputs)


# Any other primitive counts as another use of the weight.
RULES: dict[str, Callable[[Any, list[Operand], Found], list[Operand]]] = {
    "dot_general": _matrix_product,
    "conv_general_dilated": _convolution,
    tap_p.name: _tap,
    "transpose": _transpose,
    "scan": _scan,
    "convert_element_type": _same,
    "copy": _same,
    "name": _same,
    "reshard": _same,
    "sharding_constraint": _same,
    "stop_gradient": _same,
    "jit": _inline("jaxpr"),
    "remat2": _inline("jaxpr"),
    "custom_jvp_call": _inline("call_jaxpr"),
    "custom_vjp_call": _inline("call_jaxpr"),
}
