"""Which leaves of a parameter tree are pruned, and along which axis."""

import collections
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from prox24._core.pattern import Pattern, PatternLike, as_pattern
from prox24._core.tracing import is_traced

PyTree = Any
Mask = PyTree | Callable[[PyTree], PyTree]
Axis = int | Callable[[str], int]

# The axis along which a layer sums, by the end of the path. The first match counts. Flax has
# kernels (in, out) and (height, width, in, out). Its attention has kernels (in, heads, width) and
# (heads, width, out). These may be stacked along a leading axis. PyTorch and Equinox have weights
# (out, in) and (out, in, height, width).
SUMMED_AXIS = (
    (re.compile(r"(.*/)?(query|key|value)/kernel"), -3),  # the first of two axes
    (re.compile(r"(.*/)?conv\dd_transpose(_\d+)?/kernel"), -1),  # of Keras: (..., out, in)
    (re.compile(r"(.*[/_])?kernel"), -2),  # Keras has recurrent_kernel and pointwise_kernel
    (re.compile(r".*"), 1),
)

VECTORS = "bias or normalization"

# Components of a path that mark a dense leaf.
DENSE_NAMES = (
    (re.compile(r".*embed.*|wte|wpe"), "embedding"),
    (re.compile(r"(.*_)?heads?|classifier|logits|score|output_projection"), "head"),
    (re.compile(r"bias|scale|.*norm.*|ln\d*|ln_.*"), VECTORS),
    (re.compile(r".*depthwise.*"), "depthwise"),  # it sums over no channels
)


class Leaf(NamedTuple):
    """One leaf of a parameter tree, and whether it is pruned.

    Attributes:
      path: path of the leaf, with components joined by "/".
      shape: shape of the leaf, () if it is no array.
      axis: the axis along which its blocks run. If the leaf has this axis, it is counted from the
        first.
      pruned: whether it is pruned.
      reason: why the leaf is pruned or not.
    """

    path: str
    shape: tuple[int, ...]
    axis: int
    pruned: bool
    reason: str

    def __str__(self) -> str:
        verdict = "pruned" if self.pruned else "dense"
        axis = f"axis {self.axis}" if self.pruned else ""
        # The path comes last, since its length has no bound.
        return f"{verdict:6}  {self.shape!s:18}  {axis:6}  {self.reason:34}  {self.path}"


def describe(
    params: PyTree,
    pattern: PatternLike = (2, 4),
    *,
    axis: Axis | None = None,
    mask: Mask | None = None,
) -> tuple[Leaf, ...]:
    """Lists the leaves of `params`, whether they are pruned, along which axis, and why.

    By default a leaf is pruned under three conditions:

    - It is a floating-point array of two or more dimensions.
    - M divides its length along the axis.
    - Its path names no embedding, head, bias, normalization or depthwise convolution.

    The default axis is the one along which the layer sums, since hardware needs the pattern there:

    - axis -3 for the query, key and value kernels of Flax attention, or the first of two axes,
    - axis -1 for transposed convolutions with the names that Keras gives them,
    - axis -2 for all other Flax kernels,
    - axis 1 for all other leaves, such as the weights of Equinox and PyTorch.

    Give `axis` for other transposed convolutions: 0 for PyTorch, -1 for Flax with
    `transpose_kernel` and for Keras.

    If `optax.masked` or `optax.partition` has left out leaves, for example by a label, the name
    keeps no other leaf dense, except that its own last part names a bias or normalization.

    Args:
      params: pytree of arrays, or of `jax.ShapeDtypeStruct`.
      pattern: (N, M), or `prox24.Pattern`.
      axis: the axis along which blocks of M run. It is one axis for all leaves, a function of the
        path, or None for the default.
      mask: bool pytree like `params` or a prefix, with True for the leaves to prune. It can also be
        a function of `params` that returns such a tree (see `by_path`). None is the default.

    Returns:
      One `Leaf` for each leaf, in the order of `jax.tree.leaves`. A `Leaf` prints as one line.

    Raises:
      ValueError: the pattern is not N:M, an axis is no integer, a leaf of `mask` is no bool, or it
        is True for a leaf that cannot be pruned. Such a leaf is not floating-point, lacks the axis,
        or has a length along it that M does not divide.

    Example:
      >>> params = {"dense": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}}
      >>> print(*describe(params), sep="\\n")
      dense   (6,)                        fewer than two dimensions           dense/bias
      pruned  (8, 6)              axis 0  default                             dense/kernel
    """
    pattern = as_pattern(pattern)
    leaves = named_leaves(params)
    by_name = not any(map(_is_masked, jax.tree.leaves(params, is_leaf=_is_masked)))
    chosen = choices(mask, params)

    def described(path: str, leaf: Any, choice: bool | None) -> Leaf:
        shape = tuple(getattr(leaf, "shape", ()))
        along = _axis(path, axis, len(shape))
        if -len(shape) <= along < len(shape):
            along %= len(shape)
        obstacle = _obstacle(leaf, shape, along, pattern)
        if choice is None:
            reason = None if hasattr(leaf, "dtype") else "no array"
            reason = reason or _exception(path, shape, by_name) or obstacle
            return Leaf(path, shape, along, reason is None, reason or "default")
        if choice and obstacle:
            raise ValueError(
                f"{path} of shape {shape} cannot be pruned to {pattern} along axis {along}: "
                f"{obstacle}; leave it out of mask or choose its axis"
            )
        return Leaf(path, shape, along, choice, "in mask" if choice else "not in mask")

    return tuple(described(*each, own) for each, own in zip(leaves, chosen, strict=True))


def nonzeros(params: PyTree, leaves: Sequence[Leaf]) -> PyTree:
    """Marks the nonzeros of pruned leaves; other leaves get a scalar True."""
    own = iter(leaves)

    def marks(weight: Any) -> Array:
        leaf = next(own)
        check_has_value(leaf.path, weight)
        return weight != 0 if leaf.pruned else jnp.ones((), bool)

    return jax.tree.map(marks, params)


def by_path(predicate: Callable[[str], object]) -> Callable[[PyTree], PyTree]:
    """Makes a mask from a predicate on paths.

    Args:
      predicate: function of a path such as "encoder/layers/0/kernel". It returns something true for
        the chosen leaves.

    Returns:
      A function from a pytree to the bool pytree of the same structure.

    Example:
      >>> mask = by_path(lambda path: path.endswith("kernel"))
      >>> mask({"dense": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}})
      {'dense': {'bias': False, 'kernel': True}}
    """

    def mask(params: PyTree) -> PyTree:
        return map_named(lambda path, leaf: bool(predicate(path)), params)

    return mask


def named_leaves(params: PyTree) -> list[tuple[str, Any]]:
    """Pairs of path and leaf, in the order of `jax.tree.leaves`; "/" joins the parts of a path."""
    # Empty nodes too: optax puts them in the place of masked leaves.
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_empty)[0]
    within = collections.Counter(path[:n] for path, _ in leaves for n in range(len(path)))

    def name(path: tuple[Any, ...]) -> str:
        # A Flax NNX variable holds only its array, in an attribute outside of the name.
        if path and path[-1] == jax.tree_util.GetAttrKey("value") and within[path[:-1]] == 1:
            path = path[:-1]
        return jax.tree_util.keystr(path, simple=True, separator="/")

    return [(name(path), leaf) for path, leaf in leaves if not _is_empty(leaf)]


def check_values(params: PyTree, caller: str) -> None:
    """Raises ValueError unless leaves have values and paths of their own, and one is an array."""
    if not any(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(params)):
        raise ValueError(
            "params has no arrays: give a pytree of arrays, of a Keras model "
            "{v.path: v.value for v in model.trainable_variables}"
        )
    check_paths(params)
    for path, leaf in named_leaves(params):
        if is_traced(leaf):
            raise ValueError(f"{path} is traced and has no value: call {caller} outside of jax.jit")


def check_paths(params: PyTree) -> None:
    """Raises ValueError if two leaves have one path."""
    for path, count in collections.Counter(path for path, _ in named_leaves(params)).items():
        if count > 1:
            raise ValueError(f"{path} is the path of {count} leaves: rename a key that holds a /")


def check_has_value(path: str, leaf: Any) -> None:
    """Raises ValueError for the shape of an array in the place of an array."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(f"{path} has no value: give arrays; prox24.optax.describe takes shapes")


def check_array(path: str, leaf: Any) -> None:
    """Raises ValueError for a leaf that no optimizer can have a state for."""
    if not hasattr(leaf, "dtype") or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise ValueError(
            f"{path} is no array of numbers: give the parameters alone, as "
            "eqx.filter(model, eqx.is_inexact_array) or nnx.state(model, nnx.Param)"
        )


def map_named(function: Callable[..., Any], params: PyTree, *trees: PyTree) -> PyTree:
    """`jax.tree.map` with the path of the leaf as the first argument of the function."""
    paths = iter([path for path, _ in named_leaves(params)])
    return jax.tree.map(lambda *leaves: function(next(paths), *leaves), params, *trees)


def _is_empty(node: Any) -> bool:
    return not jax.tree.leaves(node)


def spread(tree: Mask, params: PyTree) -> PyTree:
    """Gives each leaf of `params` its entry of `tree`, a prefix or a function that makes one.

    Raises ValueError for a tree of other nodes.
    """
    # A tree of bools may be callable, like an Equinox module. A function is its own leaf.
    is_function = callable(tree) and all(map(callable, jax.tree.leaves(tree)))
    prefix = tree(params) if is_function else tree
    try:
        return jax.tree.broadcast(prefix, params)
    except ValueError as error:
        paths, nodes = ({f"{path}/" for path, _ in named_leaves(own)} for own in (params, prefix))
        without = sorted(path for path in paths if not path.startswith(tuple(nodes)))
        found = f"; {without[0][:-1]} has no bool" if without else ""
        raise ValueError(
            f"bools in a {type(prefix).__name__} do not fit parameters in a "
            f"{type(params).__name__}{found}: give a tree of the same nodes; of an NNX module, "
            "nnx.state(module, nnx.Param)"
        ) from error


def choices(mask: Mask | None, params: PyTree) -> list[bool | None]:
    """Whether the mask is True for each leaf, or None without a mask.

    Raises ValueError for an entry of the mask that is no bool.
    """
    if mask is None:
        return [None] * len(jax.tree.leaves(params))

    def checked(path: str, leaf: Any, choice: Any) -> bool:
        given = np.asarray(choice)
        if given.shape or given.dtype != bool:
            found = f"an array of shape {given.shape}" if given.shape else repr(choice)
            raise ValueError(
                f"mask has {found} for {path}: give True or False for each leaf, or "
                "prox24.optax.by_path; keep_pattern takes entries as trainable"
            )
        return bool(choice)

    return jax.tree.leaves(map_named(checked, params, spread(mask, params)))


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _axis(path: str, axis: Axis | None, dimensions: int) -> int:
    if axis is None:
        name = "/".join(_components(path))
        found = next(axis for suffix, axis in SUMMED_AXIS if suffix.fullmatch(name))
        return max(found, -dimensions) if dimensions > 1 else found
    found = axis(path) if callable(axis) else axis
    try:
        return operator.index(found)
    except TypeError:
        raise ValueError(
            f"axis of {path} is {found!r}: give an integer, or a function of the path"
        ) from None


def _obstacle(leaf: Any, shape: tuple[int, ...], axis: int, pattern: Pattern) -> str | None:
    """The reason why a leaf cannot be pruned along the axis, or None."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return "it is not a floating array"
    if not 0 <= axis < len(shape):
        return f"it has no axis {axis}"
    if 0 in shape:
        return "it is empty"
    if shape[axis] % pattern.width:
        return f"axis {axis} is not divisible by {pattern.width}"
    return None


def _exception(path: str, shape: tuple[int, ...], by_name: bool) -> str | None:
    """The reason why the default leaves a leaf dense that could be pruned, or None."""
    if len(shape) < 2:
        return "fewer than two dimensions"
    components = _components(path)
    for names, kind in DENSE_NAMES:
        if by_name and any(map(names.fullmatch, components)):
            return kind
        if kind == VECTORS and names.fullmatch(components[-1]):
            return kind
    return None


def _components(path: str) -> list[str]:
    # The names of checkpoints are flat, with dots: "model.layers.0.mlp.up_proj.weight".
    return re.split(r"[/.]", path.lower())
