"""Low-rank adapters for pruned weights: the zeros stay zero in training and after the merge.

The update of a weight is the product of two thin matrices, masked to the kept entries. The forward
pass uses the same mask, so the merged weights are exactly the trained ones. `init` makes adapters.
`merge` adds them to the parameters, in the loss and at the end. Any optax optimizer trains them.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from prox24._core.counts import check_whole
from prox24._core.pattern import PatternLike
from prox24._core.precision import PRECISION
from prox24.optax._leaves import Axis, Leaf, Mask, PyTree, describe, map_named


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """The two factors of one weight's update.

    Attributes:
      a: shape (rank, n), where n is the length of the weight along `axis`.
      b: shape of the weight, with rank in the place of n.
      axis: the axis of the weight along which its blocks run; static.
    """

    a: Array
    b: Array
    axis: int = dataclasses.field(metadata={"static": True})


def init(
    key: Array,
    params: PyTree,
    rank: int,
    pattern: PatternLike = (2, 4),
    *,
    axis: Axis | None = None,
    mask: Mask | None = None,
) -> PyTree:
    """Starts an adapter for each leaf that `prox24.optax.describe` prunes; merging it is no change.

    A is normal of variance 1 / n, and B is zero, so `merge` returns the parameters unchanged.

    Only shapes are read; `merge` finds the zeros. A dense leaf stays dense, and a leaf of zeros
    stays zero.

    A leaf with more than two axes is adapted as a matrix: its columns run along its axis, and its
    rows along all other axes. So A is a 1x1 convolution to rank channels in front of a Flax or
    PyTorch convolution. For an attention's query, key and value, A has shape (rank, inputs). In an
    attention's `out` kernel the heads share A. Stacked layers or experts share A too.

    Args:
      key: of `jax.random`.
      params: pytree of arrays, or of `jax.ShapeDtypeStruct`.
      rank: of each update; at most the smaller side of each leaf's matrix.
      pattern: (N, M) or `prox24.Pattern`, see `prox24.optax.describe`.
      axis: see `prox24.optax.describe`.
      mask: see `prox24.optax.describe`.

    Returns:
      Pytree like `params`, with a float32 `Adapter` in place of each pruned leaf, and None in place
      of each other leaf.

    Raises:
      ValueError: no leaf is pruned, `mask` selects a leaf that cannot be pruned, or the rank is
        no integer, less than 1, or too large for a leaf; the message names that leaf.

    References:
      "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, without the masks.

    Example:
      >>> params = {"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)}
      >>> adapters = init(jax.random.key(0), params, rank=2)
      >>> adapters["bias"], adapters["kernel"].a.shape, adapters["kernel"].b.shape
      (None, (2, 8), (2, 6))
    """
    check_whole("rank", rank)
    leaves = describe(params, pattern, axis=axis, mask=mask)
    if not any(leaf.pruned for leaf in leaves):
        raise ValueError("no leaf is pruned: describe(params) says why, mask chooses others")
    keys = jax.random.split(key, len(leaves))
    adapters = [
        _start(key, leaf, rank) if leaf.pruned else None
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), adapters)


def merge(params: PyTree, adapters: PyTree, scale: ArrayLike) -> PyTree:
    """Adds the adapters to the nonzeros of the adapted weights: W + scale (W != 0) (B A).

    Training and the final merge both call this function: the loss is
    loss(apply(merge(params, adapters, scale), batch)). Zeros stay exactly zero, so a weight stays
    N:M. The function is differentiable in all its arguments. The gradients at zeros of W are zero.

    The product B A is computed at full precision. It is added in the wider dtype of weight and
    adapter: float32 for adapters from `init`. The sum is rounded once, to the weight's dtype. So
    the adapters of a bfloat16 model are trained on its final, rounded weights. The gradient passes
    through the rounding unchanged.

    For each adapted leaf it makes two arrays of the leaf's shape: B A, and the merged weight. For
    the gradient only the merged weights are kept, as a model of plain weights keeps its own. To
    keep the merged weights of one layer at a time, put the merge and the layer into one
    `jax.checkpoint`.

    Args:
      params: pytree of arrays, with the zeros to keep.
      adapters: from `init`, for the same pytree; or the same subtree of both.
      scale: scalar, alpha / rank in the terms of LoRA. Merge with the scale of the training.

    Returns:
      Pytree like `params`, in its dtypes.

    Raises:
      ValueError: the adapters do not fit the parameters, or the scale is no scalar.

    Example:
      >>> params = {"kernel": jnp.array([[1.0], [0.0], [0.0], [2.0]])}
      >>> adapters = {"kernel": Adapter(jnp.ones((1, 4)), jnp.full((1, 1), 0.5), axis=0)}
      >>> merge(params, adapters, scale=2.0)["kernel"].ravel().tolist()
      [2.0, 0.0, 0.0, 3.0]
    """
    if jnp.shape(scale):
        raise ValueError(f"scale has shape {jnp.shape(scale)}: give one number")
    return map_named(functools.partial(_merge_leaf, scale=scale), params, adapters)


def _start(key: Array, leaf: Leaf, rank: int) -> Adapter:
    before, after = leaf.shape[: leaf.axis], leaf.shape[leaf.axis + 1 :]
    columns = leaf.shape[leaf.axis]
    most = min(columns, math.prod(before + after))
    if not 1 <= rank <= most:
        raise ValueError(
            f"{leaf.path} of shape {leaf.shape} has adapters of rank 1 to {most} along axis "
            f"{leaf.axis}, not {rank}: choose another rank, or leave it out of mask"
        )
    a = jax.random.normal(key, (rank, columns), jnp.float32) / math.sqrt(columns)
    return Adapter(a, jnp.zeros((*before, rank, *after), jnp.float32), leaf.axis)


def _merge_leaf(path: str, weight: Array, adapter: Adapter | None, *, scale: ArrayLike) -> Array:
    if adapter is None:
        return weight
    rank, columns = adapter.a.shape
    fitting = list(adapter.b.shape)
    fitting[adapter.axis] = columns
    if weight.shape != tuple(fitting) or adapter.b.shape[adapter.axis] != rank:
        raise ValueError(
            f"{path} has shape {weight.shape}, but its adapter is for {tuple(fitting)}: "
            "merge adapters with the parameters that init was given"
        )
    return _merged(weight, adapter, scale)


# Without the checkpoint, the gradient would keep the mask of every weight.
@jax.jit
@jax.checkpoint
def _merged(weight: Array, adapter: Adapter, scale: ArrayLike) -> Array:
    product = jnp.tensordot(adapter.b, adapter.a, (adapter.axis, 0), precision=PRECISION)
    update = jnp.moveaxis(product, -1, adapter.axis)
    dtype = np.promote_types(weight.dtype, update.dtype)  # JAX's would refuse in its strict mode
    moved = weight.astype(dtype) + jnp.asarray(scale, dtype) * update.astype(dtype)
    return jnp.where(weight != 0, moved, 0).astype(weight.dtype)
