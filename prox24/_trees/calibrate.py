"""The Grams of the inputs of every weight of any model."""

import functools
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prox24._pruning.grams import Sums, add_tokens, empty_gram, is_finite, is_sent
from prox24._pruning.runner import Inputs
from prox24._trees.layout import Layout
from prox24._trees.products import Apply, find_products, split_arrays
from prox24.errors import CalibrationError
from prox24.optax._leaves import PyTree, check_paths, check_values


class InputGram(NamedTuple):
    """The Grams of the inputs of one weight.

    Attributes:
      gram: sum of x x^T over the rows x, float32, shape (problems, in, in). Grouped convolutions,
        batched products and weights that `lax.scan` runs over have several problems. Any other
        weight has one.
      rows: for each problem, the number of rows with a nonzero entry.
      layout: the axes of the weight that make the matrices (out, in) of the problems.
      cross: sum of x' x^T, where x' is the same row in the dense model. None if x' = x.
    """

    gram: Array
    rows: tuple[int, ...]
    layout: Layout
    cross: Array | None = None

    def inputs(self) -> list[Inputs]:
        """The inputs of each problem."""
        crosses = itertools.repeat(None) if self.cross is None else jnp.asarray(self.cross)
        return list(map(Inputs, jnp.asarray(self.gram), self.rows, crosses))


class Calibration(NamedTuple):
    """The result of `calibrate`.

    Attributes:
      grams: an `InputGram` for each weight, by its path, in the order of the calls.
      left_out: why a weight has no Gram, by its path.
    """

    grams: dict[str, InputGram]
    left_out: dict[str, str]


class Survey(NamedTuple):
    """The products of a model, traced on one batch; weights in the order of their first calls."""

    layouts: dict[str, Layout]
    shapes: dict[str, tuple[int, int]]  # For each path: problems, input width.
    groups: list[list[str]]  # Neighbours in this order whose only input is the same array.
    left_out: dict[str, str]  # For each path: why the weight has no products.
    products: list[str]  # The path of each product. The jaxpr returns its inputs at this index.
    unpaired: set[str]  # Paths whose rows cannot be matched with the dense rows.
    jaxpr: Any  # Takes the arrays of the parameters and the batch. Its calls are inlined.


def calibrate(
    apply: Apply,
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    names: Collection[str] | None = None,
) -> Calibration:
    """Gathers the Gram sum x x^T of the inputs x of every weight of a model, for `prune_params`.

    The model is any function of JAX. A weight is found where it meets activations in a matrix
    product or a convolution. The layer may be Flax's `Dense`, `DenseGeneral`, `Einsum`, `Conv` or
    attention, in linen or NNX, a layer of Equinox, or `x @ w`. It may be inside `jax.jit`,
    `jax.checkpoint`, `jax.vmap` or `lax.scan`. Experts may share one `lax.ragged_dot`. For any
    other use, `tap` gives the inputs of a weight. A weight used twice has the sum of both Grams.

    A convolution's input is the patch under the kernel, with channels as the fastest axis. So N:M
    blocks run over consecutive input channels at each place of the kernel.

    Grams are float32 sums of products at the highest precision, compensated from batch to batch.
    Each takes 4 in^2 bytes, and as much again while it is summed. A scan also keeps the inputs of
    all its steps for one batch: give small batches. Each call compiles one program for each shape
    of a batch.

    Args:
      apply: maps parameters and a batch to any value: `lambda p, x: model.apply({"params": p}, x)`
        for linen, `lambda p, x: nnx.merge(graph, p)(x)` for NNX. It should compute the model as in
        use, without dropout.
      params: pytree; its arrays are the weights, named by their paths.
      batches: pytrees of arrays, read one at a time.
      names: paths of the weights to calibrate; None for every weight with products.

    Returns:
      A `Calibration`.

    Raises:
      CalibrationError: there is no batch, `batches` is a single array, a name has no products, a
        tap does not fit the parameters, or inputs are not finite. Also if a later batch uses a
        weight in another way than the first. The message names the weight.
      ValueError: two leaves have one path, or `params` has no arrays or traced ones.

    Example:
      >>> def apply(params, x):
      ...     return x @ params["kernel"]
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> found = calibrate(apply, params, [jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0]])])
      >>> found.grams["kernel"].gram.tolist(), found.grams["kernel"].rows
      ([[[2.0, 2.0], [2.0, 4.0]]], (2,))
    """
    check_values(params, "prox24.calibrate")
    if isinstance(names, str):
        raise CalibrationError(f"names is one text: give a list of paths, as [{names!r}]")
    return gather(apply, Stream(params, batches), names=names)


class Stream(NamedTuple):
    """A model's parameters, and the batches that run through it."""

    params: PyTree
    batches: Iterable[PyTree]


def gather(
    apply: Apply,
    stream: Stream,
    dense: Stream | None = None,
    *,
    names: Collection[str] | None = None,
) -> Calibration:
    """`calibrate`, with the cross-Grams of the inputs in the dense model, if one is given.

    The dense model runs on the same data. A dense input of zeros, as for a token routed to other
    experts, is replaced by the pruned model's input.
    """
    batches = iter(_no_array(stream.batches))
    first = next(batches, None)
    if first is None:
        raise CalibrationError(NO_BATCH)
    survey = survey_products(apply, stream.params, first)
    for name in names or ():
        if name not in survey.layouts:
            raise CalibrationError(f"{name} has no products: {survey.left_out.get(name, 'unused')}")
    chosen = {
        path: shape for path, shape in survey.shapes.items() if names is None or path in names
    }
    grams = {path: empty_gram(width, first=(own,)) for path, (own, width) in chosen.items()}
    crosses = {} if dense is None else jax.tree.map(jnp.copy, grams)
    on_host, join = split_arrays(stream.params)
    of_dense, join_dense = (on_host, join) if dense is None else split_arrays(dense.params)
    # Sent to the device once, not for each batch.
    arrays, dense_arrays = (list(map(jnp.asarray, own)) for own in (on_host, of_dense))

    @functools.partial(jax.jit, donate_argnames=("grams", "crosses"))
    def add(
        arrays: list[Array],
        dense_arrays: list[Array],
        batch: PyTree,
        dense_batch: PyTree,
        grams: Sums,
        crosses: Sums,
    ) -> tuple[Sums, Sums]:
        products, left_out = find_products(apply, join(arrays), batch)
        check_same(survey, {own.path: own.layout for own in products}, left_out, names)
        of_dense = find_products(apply, join_dense(dense_arrays), dense_batch)[0] if crosses else []
        rows, dense_rows = ([(own.path, own.rows) for own in each] for each in (products, of_dense))
        return add_products(rows, dense_rows, grams, crosses, survey.unpaired)

    alongside = itertools.repeat(None) if dense is None else dense.batches
    for batch, dense_batch in zip(itertools.chain([first], batches), alongside, strict=False):
        grams, crosses = add(arrays, dense_arrays, batch, dense_batch, grams, crosses)
    # Compiled functions return dicts in the order of their keys.
    grams, crosses = ({path: sums[path] for path in chosen if sums} for sums in (grams, crosses))
    unnamed = {path: "not in names" for path in survey.layouts if path not in chosen}
    return Calibration(found_grams(grams, crosses, survey.layouts), survey.left_out | unnamed)


def add_products(
    rows: Sequence[tuple[Any, Array]],
    of_dense: Sequence[tuple[Any, Array]],
    grams: Sums,
    crosses: Sums,
    unpaired: Collection[Any],
) -> tuple[Sums, Sums]:
    """Adds inputs to the Grams of their keys; with dense inputs, adds to the cross-Grams too.

    Keys in `unpaired` have their own inputs as dense inputs.
    """
    add, grams, crosses = jax.vmap(add_tokens), dict(grams), dict(crosses)
    for key, own in rows:
        if key in grams:
            # Twice: one whole product, not by blocks, since devices may share the features.
            grams[key] = add(grams[key], own, own)
    for (key, own), (_, given) in zip(rows, of_dense, strict=True) if crosses else ():
        if key in crosses:
            paired = key not in unpaired
            given = jnp.where(is_sent(given)[..., None], given, own) if paired else own
            crosses[key] = add(crosses[key], given, own)
    return grams, crosses


def found_grams(grams: Sums, crosses: Sums, layouts: Mapping[str, Layout]) -> dict[str, InputGram]:
    """The finished Grams by path; raises CalibrationError if one is not finite."""
    found = {}
    for path, own in grams.items():
        totals = [sums[path].total for sums in (grams, crosses) if sums]
        if not all(map(is_finite, totals)):
            raise CalibrationError(f"NaN or Inf in the inputs of {path}")
        gram, *cross = totals
        found[path] = InputGram(gram, tuple(own.tokens.tolist()), layouts[path], *cross)
    return found


def check_same(
    first: Survey,
    layouts: Mapping[str, Layout],
    left_out: Mapping[str, str],
    names: Collection[str] | None = None,
) -> None:
    """Raises CalibrationError if a batch has other products of a weight than the first batch."""
    known = first.layouts
    for path in [*known, *layouts] if names is None else names:
        if path in known and path in left_out:
            reason = f"in a later batch {path} has no products: {left_out[path]}"
        elif path in known and layouts.get(path, known[path]) != known[path]:
            reason = f"a later batch sums over other axes of {path} than the first"
        elif path not in known and path not in first.left_out:
            raise CalibrationError(
                f"a later batch uses {path}, the first does not: begin with a batch of all weights"
            )
        else:
            continue
        raise CalibrationError(f"{reason}: give batches that use it in the same way")


NO_BATCH = "there is no batch to calibrate on"


def check_batches(batches: Iterable[PyTree]) -> list[PyTree]:
    """The batches as a list; raises CalibrationError if there is none, or for a single array."""
    found = list(_no_array(batches))
    if not found:
        raise CalibrationError(NO_BATCH)
    return found


def _no_array(batches: Iterable[PyTree]) -> Iterable[PyTree]:
    if isinstance(batches, jax.Array | np.ndarray):
        raise CalibrationError(
            f"batches is one array of shape {batches.shape}; give a list of batches, as [x]"
        )
    if isinstance(batches, Mapping):
        raise CalibrationError("batches is one dict; give a list of batches, as [batch]")
    return batches


def survey_products(apply: Apply, params: PyTree, batch: PyTree) -> Survey:
    """Traces `apply` on the shapes of one batch, and computes nothing."""
    check_paths(params)
    arrays, join = split_arrays(params)
    surveys: list[Survey] = []

    def trace(arrays: list[Array], batch: PyTree) -> list[Array]:
        products, left_out = find_products(apply, join(arrays), batch)
        paths = [product.path for product in products]
        unpaired = {product.path for product in products if not product.paired}
        survey = Survey({}, {}, [], left_out, paths, unpaired, None)
        source = None
        for product in products:
            path = product.path
            if path in survey.layouts:
                continue
            problems, _, width = product.rows.shape
            survey.layouts[path] = product.layout
            survey.shapes[path] = (problems, width)
            # A weight used twice is a group alone: its later use may depend on its neighbours.
            source_alone = None if paths.count(path) > 1 else product.source
            if source is None or source_alone is not source:
                survey.groups.append([])
            survey.groups[-1].append(path)
            source = source_alone
        surveys.append(survey)
        return [product.rows for product in products]

    jaxpr = jax.make_jaxpr(trace)(arrays, batch)
    return surveys[-1]._replace(jaxpr=jaxpr)
