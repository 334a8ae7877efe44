"""The Grams of the inputs of every weight of any model."""

import functools
import itertools
from collections.abc import Collection, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from prox24.calibration.gram import GramSum, Sums, add_tokens, empty_gram
from prox24.calibration.layout import Layout
from prox24.calibration.products import Apply, find_products, split_arrays
from prox24.errors import CalibrationError
from prox24.optax.leaves import PyTree


class InputGram(NamedTuple):
    """What calibration knows of a weight's inputs.

    Attributes:
      gram: sum of x x^T over the rows x, float32, shape (problems, in, in). There is one problem,
        but for grouped convolutions, batched products and weights that `lax.scan` runs over.
      rows: how many rows each problem has seen that were not all zero.
      layout: which axes of the weight make the matrices (out, in) of the problems.
    """

    gram: Array
    rows: tuple[int, ...]
    layout: Layout


class Calibration(NamedTuple):
    """What calibration knows of a model.

    Attributes:
      grams: by path of the weight, in the order of the calls.
      left_out: by path, why other weights have none.
    """

    grams: dict[str, InputGram]
    left_out: dict[str, str]


class Survey(NamedTuple):
    """What the shapes of one batch say about a model.

    Attributes:
      layouts: of every weight with products, by path, in the order of its first call.
      shapes: of their inputs, (problems, in).
      groups: the paths in that order, those side by side that see nothing but one common input.
      left_out: why weights have no products.
    """

    layouts: dict[str, Layout]
    shapes: dict[str, tuple[int, int]]
    groups: list[list[str]]
    left_out: dict[str, str]


def calibrate(
    apply: Apply,
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    names: Collection[str] | None = None,
) -> Calibration:
    """Gathers the Gram sum x x^T of the inputs x of every weight of a model, for `prune_params`.

    The model is any function of JAX. Its weights are found where they meet activations in a matrix
    product or a convolution, of whatever layer: Flax's `Dense`, `DenseGeneral`, `Einsum`, `Conv`
    and attention, linen or NNX, Equinox's layers, or `x @ w`; inside `jax.jit`, `jax.checkpoint`,
    `jax.vmap` and `lax.scan` too. Elsewhere `tap` says what a weight is multiplied with. A weight
    that is used twice has the sum of both Grams.

    A convolution's input is the patch that the kernel sees, with channels as the fastest axis, so
    that N:M blocks run over consecutive input channels at each place of the kernel.

    Grams are float32 sums of products at the highest precision, compensated from batch to batch.
    Each takes 4 in^2 bytes, and as much again while it is summed. One program is compiled for each
    shape of a batch.

    Args:
      apply: from parameters and a batch to anything; `lambda p, x: model.apply({"params": p}, x)`
        for linen, `lambda p, x: nnx.merge(graph, p)(x)` for NNX. It should compute what the model
        computes when it is used, without dropout.
      params: pytree; its arrays are the weights, named by their paths.
      batches: pytrees of arrays, which are looked at one by one.
      names: the weights to calibrate; all that can be if None.

    Returns:
      A `Calibration`.

    Raises:
      CalibrationError: there is no batch, a name has no products, a tap does not fit the
        parameters, or inputs are not finite; names the weight.

    Example:
      >>> def apply(params, x):
      ...     return x @ params["kernel"]
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> found = calibrate(apply, params, [jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0]])])
      >>> found.grams["kernel"].gram.tolist(), found.grams["kernel"].rows
      ([[[2.0, 2.0], [2.0, 4.0]]], (2,))
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise CalibrationError("there is no batch to calibrate on")
    survey = survey_products(apply, params, first)
    for name in names or ():
        if name not in survey.layouts:
            raise CalibrationError(f"{name} has no products: {survey.left_out.get(name, 'unused')}")
    arrays, join = split_arrays(params)
    sums = {
        path: _empty_grams(shape)
        for path, shape in survey.shapes.items()
        if names is None or path in names
    }

    @functools.partial(jax.jit, donate_argnames="sums")
    def add(arrays: list[Array], batch: PyTree, sums: Sums) -> Sums:
        sums = dict(sums)
        for product in find_products(apply, join(arrays), batch)[0]:
            if product.path in sums:
                sums[product.path] = jax.vmap(add_tokens)(
                    sums[product.path], product.rows, product.rows
                )
        return sums

    for batch in itertools.chain([first], batches):
        sums = add(arrays, batch, sums)
    grams = {}
    # Compiled functions return dicts in the order of their keys.
    for path, layout in survey.layouts.items():
        if path in sums:
            gram = sums[path]
            if not jnp.all(jnp.isfinite(jnp.trace(gram.total, axis1=1, axis2=2))):
                raise CalibrationError(f"NaN or Inf in the inputs of {path}")
            grams[path] = InputGram(gram.total, tuple(gram.tokens.tolist()), layout)
    return Calibration(grams, survey.left_out)


def survey_products(apply: Apply, params: PyTree, batch: PyTree) -> Survey:
    """Traces `apply` on the shapes of one batch, and computes nothing.

    Raises:
      CalibrationError: a tap does not fit the parameters.
    """
    arrays, join = split_arrays(params)
    surveys: list[Survey] = []

    def trace(arrays: list[Array], batch: PyTree) -> None:
        products, left_out = find_products(apply, join(arrays), batch)
        survey = Survey({}, {}, [], left_out)
        paths = [product.path for product in products]
        source = None
        for product in products:
            path = product.path
            if path in survey.layouts:
                continue
            problems, _, width = product.rows.shape
            survey.layouts[path] = product.layout
            survey.shapes[path] = (problems, width)
            # A later use may depend on what shares the input of the first.
            source_alone = None if paths.count(path) > 1 else product.source
            if source is None or source_alone is not source:
                survey.groups.append([])
            survey.groups[-1].append(path)
            source = source_alone
        surveys.append(survey)

    jax.eval_shape(trace, arrays, batch)
    return surveys[-1]


def _empty_grams(shape: tuple[int, int]) -> GramSum:
    """As many Grams of no rows as there are problems."""
    problems, width = shape
    return jax.tree.map(
        lambda part: jnp.zeros((problems, *part.shape), part.dtype), empty_gram(width)
    )
