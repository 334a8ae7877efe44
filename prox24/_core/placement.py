"""Placement of arrays when devices share the work.

Windows, and rows of weights, are cut among the devices. All other arrays have a copy on every
device. With `shard_grams`, columns of Grams and weights are cut, and rows are not. Without a mesh
all arrays are on one device.

The devices of a mesh may belong to several processes, one process after the other. Each process has
the windows of its own devices on the host. All processes call these functions together.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from prox24.errors import Prox24Error

AXIS, TENSOR = "devices", "tensor"


def common_mesh(windows: int, tensor: int = 1) -> Mesh | None:
    """A mesh of as many devices of every process as divide the windows; None for a single device.

    `windows` is the number of windows in memory together. `tensor` is the number of devices with
    the same windows, along the second axis of the mesh.
    """
    if tensor < 1:
        raise Prox24Error(f"tensor_parallel is {tensor}, not a positive number of devices")
    processes = jax.process_count()
    if windows % processes:
        raise Prox24Error(f"{windows} windows are not divisible by {processes} processes")
    devices = [jax.local_devices(process_index=index) for index in range(processes)]
    fewest = min(map(len, devices))
    most = fewest // tensor
    if most == 0:
        raise Prox24Error(
            f"{tensor} devices are to share heads and widths, and a process has {fewest}"
        )
    count = divisors(windows // processes, most)[0]
    used = np.array([device for own in devices for device in own[: count * tensor]])
    return None if used.size == 1 else Mesh(used.reshape(-1, tensor), (AXIS, TENSOR))


def divisors(windows: int, most: int) -> list[int]:
    """The divisors of a number of windows up to `most`, the largest first."""
    return [size for size in range(min(most, windows), 0, -1) if windows % size == 0]


def varying_like(x: Array, other: Array) -> Array:
    """x; in `jax.shard_map` it differs from device to device if the scalar `other` does.

    A loop whose steps depend on values of each device must start from values of each device.
    """
    return jnp.where(jnp.zeros_like(other, bool), 0, x)


def one_axis(mesh: Mesh | None) -> Mesh | None:
    """The devices of a mesh along one automatic axis: JAX then places intermediate arrays."""
    return None if mesh is None else Mesh(mesh.devices.ravel(), (AXIS,))


def parts(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One part of an axis for each device."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def parts_or_copies(length: int, mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Cuts an axis among the devices, or copies the array to each if they do not divide its length.

    If it is copied, every device solves the whole linear, which takes as long as on one device.
    """
    return NamedSharding(mesh, PartitionSpec()) if length % mesh.size else parts(mesh, axis)


def apart(array: Array, mesh: Mesh | None, axis: int = 0) -> Array:
    """Places an array by `parts_or_copies`."""
    return array if mesh is None else _put(array, parts_or_copies(array.shape[axis], mesh, axis))


def in_parts(array: Array, mesh: Mesh | None) -> Array:
    """Cuts the first axis among the devices, inside a program."""
    return array if mesh is None else jax.lax.with_sharding_constraint(array, parts(mesh))


def own_windows(count: int, mesh: Mesh | None) -> range:
    """The windows that this process keeps, of a micro-batch of `count` windows."""
    if mesh is None:
        return range(count)
    processes = [device.process_index for device in mesh.devices.flat]
    first = processes.index(jax.process_index())
    share = count // mesh.size
    return range(share * first, share * (first + processes.count(jax.process_index())))


def placed(batch: NDArray[Any], mesh: Mesh | None) -> Array:
    """Cuts a micro-batch among the devices; every process gives its own windows."""
    if mesh is None:
        return jnp.asarray(batch)
    return jax.make_array_from_process_local_data(parts(mesh), batch)


def taken(batch: Array, mesh: Mesh | None) -> NDArray[Any]:
    """This process's own windows of a micro-batch, on the host."""
    if batch.is_fully_addressable:
        return np.asarray(batch)
    shards = apart(batch, mesh).addressable_shards
    in_order = sorted(shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in in_order])


def everywhere(arrays: Any, mesh: Mesh | None) -> Any:
    """Copies each array of a tree to every device."""
    if mesh is None:
        return arrays
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda array: _put(array, sharding), arrays)


def _put(array: Array, sharding: NamedSharding) -> Array:
    """Like `jax.device_put`, which would compare the copies of an array that every process has."""
    if sharding.is_fully_addressable or not array.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def is_on_one_device(context: Any) -> bool:
    """Whether a lowering rule, given its context, has its arrays whole on one device.

    XLA does not partition kernels. They run in programs of one device, and inside shard_map over
    all axes of a mesh.
    """
    placed = context.module_context.axis_context
    manual: frozenset[Any] = getattr(placed, "manual_axes", frozenset())
    alone = getattr(placed, "num_devices", None) == 1
    return alone or (len(manual) > 0 and set(manual) == set(placed.mesh.axis_names))


def replicated(array: Array) -> Array:
    """Copies the array to every device of its mesh, in a program whose placement XLA chooses.

    Without a mesh, or if the caller places arrays by hand, it does nothing.
    """
    mesh = jax.typeof(array).sharding.mesh
    if mesh.empty or not mesh.are_all_axes_auto:
        return array
    return lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec()))


def whole(array: Array) -> Array:
    """Copies the array to every device, if the mesh has explicit axes.

    JAX refuses to join axes that devices share, and to add some parts.
    """
    context, sharding = jax.sharding.get_abstract_mesh(), jax.typeof(array).sharding
    mesh = sharding.mesh if context.empty else context
    if not mesh.explicit_axes:
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec()))


def explicit_sharding(weight: Array, gram: Array) -> NamedSharding | None:
    """The weight's sharding, or copies on the Gram's mesh; None without explicit axes."""
    placed, of_gram = (jax.typeof(array).sharding for array in (weight, gram))
    if placed.mesh.explicit_axes:
        return placed
    return NamedSharding(of_gram.mesh, PartitionSpec()) if of_gram.mesh.explicit_axes else None


def has_whole_blocks(array: Array, width: int, axis: int) -> bool:
    """False if the array's type says that an explicit axis of a mesh cuts a block."""
    sharding = jax.typeof(array).sharding
    names = sharding.spec[axis] or ()
    names = (names,) if isinstance(names, str) else names
    parts = math.prod(sharding.mesh.shape[name] for name in names)
    return array.shape[axis] // parts % width == 0


def placed_like(array: Array, other: Array) -> Array:
    """Gives the array the sharding of the other's type, if the mesh has explicit axes."""
    wanted = jax.typeof(other).sharding
    return jax.sharding.reshard(array, wanted) if wanted.mesh.explicit_axes else array
