"""Where a program that is being lowered will run, which decides whether a kernel may be in it."""

from typing import Any


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
