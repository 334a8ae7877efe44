"""Where the arrays of a program are: on one device or on several, whole or in parts."""

from typing import Any

import jax
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec


def is_on_one_device(context: Any) -> bool:
    """Whether the arrays of a lowering rule are whole on one device.

    XLA does not partition a kernel, so that one is for programs of one device, and for the insides
    of shard_map.

    Args:
      context: what `jax.interpreters.mlir` gives to the rule.
    """
    placed = context.module_context.axis_context
    manual: frozenset[Any] = getattr(placed, "manual_axes", frozenset())
    alone = getattr(placed, "num_devices", None) == 1
    return alone or (len(manual) > 0 and set(manual) == set(placed.mesh.axis_names))


def whole(array: Array) -> Array:
    """The array on every device of its mesh, inside a program whose placement XLA chooses.

    Without a mesh, or where the caller places arrays by hand, nothing is done.
    """
    mesh = jax.typeof(array).sharding.mesh
    if mesh.empty or not mesh.are_all_axes_auto:
        return array
    return lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec()))
