"""The proximal operator on many leaves of a tree in one call, which XLA compiles once."""

import collections
import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from prox24._core import planes
from prox24._core.pattern import Pattern
from prox24._core.placement import placed_like
from prox24._core.prox import prox
from prox24._core.tracing import is_traced
from prox24.optax._leaves import Leaf

TOGETHER = 2**24
"""Maximal number of entries of several leaves in one call of the operator."""


def landing_updates(
    leaves: Sequence[Leaf],
    params: Sequence[Any],
    updates: Sequence[Any],
    penalty: Array,
    pattern: Pattern,
) -> list[Any]:
    """The updates; with them, pruned leaves land on the result of the operator.

    Small leaves of the same dtypes go through the operator in one call: XLA compiles each call. On
    several devices only equal leaves share a call. A call copies its leaves, so large leaves go
    alone.
    """
    groups = collections.defaultdict[Any, list[int]](list)
    sharded = _may_be_sharded([params[i] for i, leaf in enumerate(leaves) if leaf.pruned])
    for i, leaf in enumerate(leaves):
        if leaf.pruned:
            both = params[i], updates[i]
            # For the sharding of a traced leaf, JAX would search the program for its origin.
            devices = [None if is_traced(x) else getattr(x, "sharding", None) for x in both]
            key: tuple[Any, ...] = (*(jax.typeof(x).dtype for x in both), *devices)
            if sharded:
                # Traced leaves may hide their sharding. Leaves of several layers with the same
                # role usually have the same.
                role = re.sub(r"\d+", "", leaf.path)
                key = (leaf.axis, role, *map(jax.typeof, both), *devices)
            groups[key].append(i)
    landing = list(updates)
    for group in groups.values():
        for places in _packed(group, [params[i].size for i in group]):
            own = [[tree[i] for i in places] for tree in (params, updates)]
            axes = tuple(leaves[i].axis for i in places)
            found = _landing_updates(*own, penalty, pattern, axes, sharded)
            for i, update in zip(places, found, strict=True):
                landing[i] = update
    return landing


def _may_be_sharded(leaves: Sequence[Any]) -> bool:
    """Whether the leaves may have parts on several devices, or axes of a mesh in their types."""
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in leaves]
    meshes.append(jax.sharding.get_abstract_mesh())
    return jax.device_count() > 1 or not all(mesh.empty for mesh in meshes)


def _packed(places: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """The places in groups: of at most `TOGETHER` entries, or of one large leaf."""
    alone, groups = list[list[int]](), list[list[int]]()
    total = 0
    for place, size in zip(places, sizes, strict=True):
        if size > TOGETHER // 2:
            alone.append([place])
            continue
        total += size
        if not groups or total > TOGETHER:
            groups.append([])
            total = size
        groups[-1].append(place)
    return alone + groups


@functools.partial(jax.jit, static_argnames=("pattern", "axes", "sharded"))
def _landing_updates(
    params: list[Array],
    updates: list[Array],
    penalty: Array,
    pattern: Pattern,
    axes: tuple[int, ...],
    sharded: bool,
) -> list[Array]:
    """The updates from leaves to the operator's result for params + update.

    All leaves have the dtype of the first, and so have their updates.
    """
    dtype = jnp.promote_types(params[0].dtype, updates[0].dtype)
    params, updates = ([x.astype(dtype) for x in tree] for tree in (params, updates))
    updates = list(map(placed_like, updates, params))  # JAX selects among equal shardings only.
    targets = list(map(jnp.add, params, updates))
    # An unchanged entry keeps its update, since w - own would round it once more. For w = 0,
    # w - own is exact.
    return [
        lax.select(w == target, update, w - own)
        for own, update, target, w in zip(
            params,
            updates,
            targets,
            _prox_of(targets, penalty, pattern, axes, sharded),
            strict=True,
        )
    ]


def _prox_of(
    leaves: list[Array], penalty: Array, pattern: Pattern, axes: tuple[int, ...], sharded: bool
) -> list[Array]:
    """The operator on leaves of one dtype."""
    if len(leaves) == 1:
        return [prox(leaves[0], penalty, pattern, axes[0])]
    if sharded:
        # The caller gives equal leaves. A stack keeps their sharding.
        stacked = prox(jnp.stack(leaves), penalty, pattern, axes[0] + 1)
        places = _places(range(len(leaves)), penalty)
        return [lax.dynamic_index_in_dim(stacked, place, keepdims=False) for place in places]

    rows = jnp.concatenate(
        [_rows(leaf, pattern, axis) for leaf, axis in zip(leaves, axes, strict=True)], 1
    )
    landed = planes.prox(list(rows), penalty, pattern.kept, pattern.unit)
    # Without the barrier a GPU computes the operator again for each row.
    rows = jnp.stack(lax.optimization_barrier(landed))
    lengths = [leaf.size // pattern.width for leaf in leaves]
    starts = _places(itertools.accumulate(lengths[:-1], initial=0), penalty)
    return [
        _from_rows(lax.dynamic_slice_in_dim(rows, start, length, 1), leaf.shape, axis)
        for start, length, leaf, axis in zip(starts, lengths, leaves, axes, strict=True)
    ]


def _rows(leaf: Array, pattern: Pattern, axis: int) -> Array:
    """Row i holds entry i of every block."""
    width = pattern.width
    before, length, after = leaf.shape[:axis], leaf.shape[axis], leaf.shape[axis + 1 :]
    blocks = leaf.reshape(*before, length // width, width, *after)
    return jnp.moveaxis(blocks, axis + 1, 0).reshape(width, leaf.size // width)


def _from_rows(rows: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Undoes `_rows`."""
    width = len(rows)
    blocks = rows.reshape(width, *shape[:axis], shape[axis] // width, *shape[axis + 1 :])
    return jnp.moveaxis(blocks, 0, axis + 1).reshape(shape)


def _places(known: Iterable[int], penalty: Array) -> list[Array]:
    """The places of leaves; on a CPU, as numbers that XLA does not know.

    XLA's CPU backend compiles a kernel for each known place, 20 milliseconds each, and one kernel
    for all others. With NaN as the penalty all leaves are NaN, and any place will do.
    """

    def unknown(places: list[Array], penalty: Array) -> list[Array]:
        undefined = lax.optimization_barrier(jnp.isnan(penalty))  # The penalty may be a constant.
        return lax.cond(undefined, lambda: [jnp.uint32(0)] * len(places), lambda: places)

    places = [jnp.uint32(place) for place in known]
    return lax.platform_dependent(
        places, penalty, cpu=unknown, default=lambda places, penalty: places
    )
