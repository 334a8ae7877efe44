"""Which part of a decoder's tensors each device has, and which it computes with, in a training.

The mesh has two axes. Devices along `AXIS` share the windows, and each keeps a part of every tensor
that is gathered from the others when its layer runs (fully sharded data parallelism). Devices along
`TENSOR` share the heads and the widths: what enters attention and MLP is divided by rows, what
leaves them by columns, and the sum over the devices is all that they send (tensor parallelism).
"""

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prox24.devices import AXIS, TENSOR
from prox24.models.decoder import Config, Weights


def training_mesh(mesh: Mesh) -> Mesh:
    """The devices of a mesh of one axis or two along both."""
    devices = mesh.devices
    return Mesh(devices.reshape(len(devices), -1), (AXIS, TENSOR))


def check_divides(config: Config, devices: int) -> None:
    """Raises ValueError where so many devices do not divide the heads or the width of a layer."""
    for index, layer in enumerate(config.layers):
        counts = {
            "key-value heads": layer.attention.key_value_heads,
            "heads": layer.attention.heads,
            "columns of the MLP": layer.mlp.width,
        }
        for name, count in counts.items():
            if count % devices:
                raise ValueError(
                    f"{devices} devices do not divide the {count} {name} of layer {index}"
                )


def kept(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Of a tensor of all layers, shape (layers, ...): a part for every device."""
    return NamedSharding(mesh, _spec(mesh, name, shape, (TENSOR, AXIS)))


def used(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Of the same tensor of one layer, shape (...): what devices along `AXIS` have in common."""
    return NamedSharding(mesh, PartitionSpec(*_spec(mesh, name, (1, *shape), (TENSOR,))[1:]))


def outer(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Of a tensor before or behind the layers: rows of the vocabulary along `TENSOR`."""
    divided = len(shape) == 2 and shape[0] % mesh.shape[TENSOR] == 0
    return NamedSharding(mesh, PartitionSpec(TENSOR) if divided else PartitionSpec())


def gathered(mesh: Mesh | None, weights: Weights, hidden: Array) -> tuple[Weights, Array]:
    """What a layer computes with, inside a program: its weights, and every device's own windows."""
    if mesh is None:
        return weights, hidden
    constrain = jax.lax.with_sharding_constraint
    weights = {name: constrain(w, used(mesh, name, w.shape)) for name, w in weights.items()}
    return weights, constrain(hidden, NamedSharding(mesh, PartitionSpec(AXIS)))


def _spec(mesh: Mesh, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> PartitionSpec:
    """Without the axes that do not divide their dimension: those devices have copies."""
    leaves = name.endswith(("o_proj.weight", "down_proj.weight"))
    enters = "_proj." in name and "o_proj." not in name and "down_proj." not in name
    parts: list[list[str]] = [[] for _ in shape]
    for axis in axes:
        dimension = (2 if leaves else 1 if enters else None) if axis == TENSOR else 1
        if dimension is None:
            continue
        among = mesh.shape[axis]
        for other in parts[dimension]:
            among *= mesh.shape[other]
        if shape[dimension] % among == 0:
            parts[dimension].append(axis)
    return PartitionSpec(*(tuple(part) or None for part in parts))
