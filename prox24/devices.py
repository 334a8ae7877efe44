"""Where arrays are kept when devices share the work: windows and rows apart, the rest on all.

Without a mesh everything stays as it is, on one device.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

AXIS = "devices"


def local_mesh(windows: int) -> Mesh | None:
    """As many of this machine's devices as divide the number of windows; None for a single one."""
    devices = jax.local_devices()
    count = max(count for count in range(1, len(devices) + 1) if windows % count == 0)
    return None if count == 1 else Mesh(np.array(devices[:count]), (AXIS,))


def one_axis(mesh: Mesh | None) -> Mesh | None:
    """The devices of a mesh along one automatic axis, so that JAX places what is in between."""
    return None if mesh is None else Mesh(mesh.devices.ravel(), (AXIS,))


def parts(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One part of an axis for each device."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def apart(array: Array, mesh: Mesh | None, axis: int = 0) -> Array:
    """An axis cut among the devices; a copy on each of them where its length does not divide.

    A linear of few or odd rows is then solved by every device: it takes as long as on one.
    """
    if mesh is None or array.shape[axis] % mesh.size:
        return everywhere(array, mesh)
    return jax.device_put(array, parts(mesh, axis))


def placed(batch: ArrayLike, mesh: Mesh | None) -> Array:
    """A micro-batch from the host, its windows cut among the devices."""
    return jnp.asarray(batch) if mesh is None else jax.device_put(batch, parts(mesh))


def everywhere(arrays: Any, mesh: Mesh | None) -> Any:
    """A copy of each array of a tree on every device."""
    return arrays if mesh is None else jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))
