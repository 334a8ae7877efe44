"""Low-rank adapters of pruned weights, which keep the zeros in training and when they are merged.

The update of a weight is a product of two thin matrices, cut to the entries that pruning kept. It
is cut in the forward pass too: what was trained is what is merged. `init` starts adapters, `merge`
adds them to the parameters, in the loss and at the end; any optax optimizer trains them between.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

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

    A is normal of variance 1 / n, and B is zero, so that `merge` gives the parameters back.

    Only shapes are looked at: zeros are found by `merge`. A leaf that is dense stays dense, and one
    that is wholly zero stays zero.

    A leaf with more than two axes is adapted as the matrix whose columns run along its axis and
    whose rows along all others. So A is a 1x1 convolution to rank channels in front of a Flax or
    PyTorch convolution, and (rank, inputs) for an attention's query, key and value; heads share it
    in an attention's `out` kernel, and so do layers or experts that are stacked.

    Args:
      key: of `jax.random`.
      params: pytree of arrays, or of `jax.ShapeDtypeStruct`.
      rank: of each update, at most the lesser side of that matrix.
      pattern: (N, M), see `prox24.optax.describe`.
      axis: see `prox24.optax.describe`.
      mask: see `prox24.optax.describe`.

    Returns:
      Pytree like `params`, with an `Adapter` of float32 in the place of each pruned leaf, and None
      in that of the others.

    Raises:
      ValueError: no leaf is pruned, `mask` selects one that cannot be, or the rank is less than 1
        or too large for one, which the message names.

    References:
      "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, without the masks.

    Example:
      >>> params = {"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)}
      >>> adapters = init(jax.random.key(0), params, rank=2)
      >>> adapters["bias"], adapters["kernel"].a.shape, adapters["kernel"].b.shape
      (None, (2, 8), (2, 6))
    """
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
    """Adds to every adapted weight what its adapter says of its nonzeros: W + scale (W != 0) (B A).

    This is the forward pass of training, as in loss(apply(merge(params, adapters, scale), batch)),
    and the final merge: they compute the same. Zeros stay exactly zero, so a weight stays N:M. It
    is differentiable in all its arguments; the gradients at zeros of W are zero.

    The product B A is taken at full precision and added in float32 (in float64 to such a weight),
    and the sum is rounded once, to the weight's dtype. The adapters of a bfloat16 model are
    therefore trained on the weights that it will have, rounding included; the gradient of the
    rounding is taken as that of the identity.

    For each adapted leaf it makes an array of the leaf's shape. Nothing more of that size is kept
    for the gradient than the merged weights, as a model of plain weights keeps its own. To have
    those of one layer at a time, put the merge and the layer into one `jax.checkpoint`.

    Args:
      params: pytree of arrays, with the zeros to keep.
      adapters: of `init`, for the same pytree or, subtree by subtree, for a part of it.
      scale: scalar, alpha / rank in the terms of LoRA. Merge with the one of training.

    Returns:
      Pytree like `params`, in its dtypes.

    Raises:
      ValueError: the adapters are those of other parameters.

    Example:
      >>> params = {"kernel": jnp.array([[1.0], [0.0], [0.0], [2.0]])}
      >>> adapters = {"kernel": Adapter(jnp.ones((1, 4)), jnp.full((1, 1), 0.5), axis=0)}
      >>> merge(params, adapters, scale=2.0)["kernel"].ravel().tolist()
      [2.0, 0.0, 0.0, 3.0]
    """
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
@jax.checkpoint
def _merged(weight: Array, adapter: Adapter, scale: ArrayLike) -> Array:
    product = jnp.tensordot(adapter.b, adapter.a, (adapter.axis, 0), precision=PRECISION)
    update = jnp.moveaxis(product, -1, adapter.axis)
    dtype = np.promote_types(weight.dtype, update.dtype)  # JAX's would refuse in its strict mode
    moved = weight.astype(dtype) + jnp.asarray(scale, dtype) * update.astype(dtype)
    return jnp.where(weight != 0, moved, 0).astype(weight.dtype)
