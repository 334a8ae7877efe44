"""Where arrays are kept when devices share the work: windows and rows apart, the rest on all.

With `shard_grams`, the columns of Grams and weights are apart instead of rows.

Without a mesh everything stays as it is, on one device. The devices of a mesh may be those of
several processes, one process after the other: each then has the windows of its own devices on the
host, and all of them call these functions together.
"""

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
    """As many devices of every process as divide the number of windows; None for a single one.

    So many `windows` are in memory together, and so many devices, `tensor`, have the same windows
    along the second axis of the mesh.
    """
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
    count = max(n for n in range(1, most + 1) if windows % (n * processes) == 0)
    used = np.array([device for own in devices for device in own[: count * tensor]])
    if used.size == 1:
        return None
    return Mesh(used, (AXIS,)) if tensor == 1 else Mesh(used.reshape(-1, tensor), (AXIS, TENSOR))


def one_axis(mesh: Mesh | None) -> Mesh | None:
    """The devices of a mesh along one automatic axis, so that JAX places what is in between."""
    return None if mesh is None else Mesh(mesh.devices.ravel(), (AXIS,))


def parts(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One part of an axis for each device."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def parts_or_copies(length: int, mesh: Mesh, axis: int = 0) -> NamedSharding:
    """An axis cut among the devices; a copy on each of them if they do not divide its length.

    A linear whose axis they do not divide is solved whole by each: it takes as long as on one.
    """
    return NamedSharding(mesh, PartitionSpec()) if length % mesh.size else parts(mesh, axis)


def apart(array: Array, mesh: Mesh | None, axis: int = 0) -> Array:
    """An array, placed as `parts_or_copies` says."""
    return array if mesh is None else _put(array, parts_or_copies(array.shape[axis], mesh, axis))


def in_parts(array: Array, mesh: Mesh | None) -> Array:
    """The first axis cut among the devices, inside a program."""
    return array if mesh is None else jax.lax.with_sharding_constraint(array, parts(mesh))


def own_windows(count: int, mesh: Mesh | None) -> range:
    """Which windows of a micro-batch of so many are kept by this process."""
    if mesh is None:
        return range(count)
    processes = [device.process_index for device in mesh.devices.flat]
    first = processes.index(jax.process_index())
    share = count // mesh.size
    return range(share * first, share * (first + processes.count(jax.process_index())))


def placed(batch: NDArray[Any], mesh: Mesh | None) -> Array:
    """A micro-batch, of which every process has its own windows, cut among the devices."""
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
    """A copy of each array of a tree on every device."""
    if mesh is None:
        return arrays
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda array: _put(array, sharding), arrays)


def _put(array: Array, sharding: NamedSharding) -> Array:
    """What `jax.device_put` does, which would compare an array that every process has."""
    if sharding.is_fully_addressable or not array.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def is_on_one_device(context: Any) -> bool:
    """Whether the arrays of a lowering rule, given its context, are whole on one device.

    XLA does not partition a kernel: one is for programs of one device, and for the inside of
    shard_map.
    """
    placed = context.module_context.axis_context
    manual: frozenset[Any] = getattr(placed, "manual_axes", frozenset())
    alone = getattr(placed, "num_devices", None) == 1
    return alone or (len(manual) > 0 and set(manual) == set(placed.mesh.axis_names))


def replicated(array: Array) -> Array:
    """The array on every device of its mesh, inside a program whose placement XLA chooses.

    Without a mesh, or where the caller places arrays by hand, nothing is done.
    """
    mesh = jax.typeof(array).sharding.mesh
    if mesh.empty or not mesh.are_all_axes_auto:
        return array
    return lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec()))
