"""Finds where a model multiplies its weights with activations, in any library.

The model is traced to a jaxpr, which is evaluated equation by equation, by the rules of `rules`.
The code depends on no library of layers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Literal

from prox24._core.placement import whole
from prox24._trees.layout import Layout
from prox24._trees.rules import (
    RULES,
    Found,
    Operand,
    Product,
    Rule,
    View,
    note_other_uses,
    other_use,
)
from prox24.errors import CalibrationError
from prox24.optax._leaves import PyTree, named_leaves

Apply = Callable[[Any, Any], Any]


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
        rule = CALLS.get(name := equation.primitive.name) or RULES.get(name, other_use)
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


def _inline(name: str) -> Rule:
    """The rule of a call, where `name` is the parameter that holds its jaxpr."""
    return lambda equation, operands, found: _evaluate(equation.params[name], operands, found)


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
    note_other_uses(equation, carry, found)
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
        note_other_uses(equation, [*results[:carried], *others], within)
        outputs = [operand.value for operand in results]
        bodies.append(within)
        rows = [product.rows for product in within.products]
        # The body's values must not stay after its trace. Only the identity of a source matters.
        marks = {id(product.source): object() for product in within.products}
        within.products = [
            product._replace(rows=None, source=marks[id(product.source)])
            for product in within.products
        ]
        return outputs[:carried], (outputs[carried:], rows)

    final, (stacks, rows) = lax.scan(
        step,
        [operand.value for operand in carry],
        [run.value for run in runs],
        equation.params["length"],
        equation.params["reverse"],
    )
    within = bodies[-1]
    for product, stack in zip(within.products, rows, strict=True):
        found.products.append(_merge(product, stack, [view for view in views if view is not None]))
    found.other_uses = within.other_uses | found.other_uses
    return [*map(Operand, final), *map(Operand, stacks, handed_on)]


def _count_scanned(outside: list[Any], inside: list[Any]) -> int:
    """The number of variables that a scan runs over: they have one axis less inside."""
    pairs = zip(outside, inside, strict=True)
    return sum(len(out.aval.shape) != len(within.aval.shape) for out, within in pairs)


def _merge(product: Product, stack: Array, views: Sequence[View]) -> Product:
    """The product with the rows of all steps; `stack` has shape (steps, problems, rows, in).

    If the steps run over an axis of the weight, as one of `views`, each step has its own problems.
    """
    _, problems, _, width = stack.shape
    own = [view.stacked for view in views if view.path == product.path]
    if not (own if product.tapped else product.scanned in own):
        rows = jnp.moveaxis(stack, 0, 1).reshape(problems, -1, width)
        return product._replace(rows=rows)
    layout, scanned = product.layout, product.scanned[:-1]
    if product.tapped:
        layout = _stacked(product.path, layout, own[0][-1])
    rows = stack.reshape(-1, *stack.shape[-2:])
    return product._replace(rows=rows, layout=layout, scanned=scanned)


def _stacked(path: str, layout: Layout, axis: int) -> Layout:
    """The layout of a tap within a scan over an axis of the weight; a tap has no stacked axes."""
    if axis in layout.summed:
        raise CalibrationError(
            f"tap of {path} sums over axis {axis}, which a scan runs over: count the axes of the "
            "whole weight"
        )
    outputs = tuple(other for other in layout.outputs if other != axis)
    return layout._replace(stacked=(axis, *layout.stacked), outputs=outputs)


CALLS: dict[str, Rule] = {
    "scan": _scan,
    "jit": _inline("jaxpr"),
    "remat2": _inline("jaxpr"),
    "custom_jvp_call": _inline("call_jaxpr"),
    "custom_vjp_call": _inline("call_jaxpr"),
}
