"""Which part of a decoder's tensors each device has, and which it computes with, in a training.

The mesh has two axes. Devices along `AXIS` share the windows, and each keeps a part of every tensor
that is gathered from the others when its layer runs (fully sharded data parallelism). Devices along
`TENSOR` share the heads and the widths: what enters attention and MLP is divided by rows, what
leaves them by columns (tensor parallelism). If query, key and value are linears of their own, as
gate and up, they send the sums of what leaves; else parts of the activations too.
"""

import functools
import math

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prox24._core.placement import AXIS, TENSOR
from prox24._models.decoder import Weights
from prox24._models.spec import Config
from prox24.errors import Prox24Error


def training_mesh(mesh: Mesh) -> Mesh:
    """The devices of a mesh of one axis or two along both."""
    devices = mesh.devices
    return Mesh(devices.reshape(len(devices), -1), (AXIS, TENSOR))


def check_divides(config: Config, mesh: Mesh, windows: int) -> None:
    """Raises Prox24Error where devices do not divide windows in memory, or heads or width."""
    if windows % mesh.shape[AXIS]:
        raise Prox24Error(f"{mesh.shape[AXIS]} devices do not divide {windows} windows")
    devices = mesh.shape[TENSOR]
    for index, layer in enumerate(config.layers):
        counts = {
            "key-value heads": layer.attention.key_value_heads,
            "heads": layer.attention.heads,
            "columns of the MLP": layer.mlp.width,
        }
        for name, count in counts.items():
            if count % devices:
                raise Prox24Error(
                    f"{devices} devices do not divide the {count} {name} of layer {index}"
                )


def stored(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Of a tensor of all layers, shape (layers, ...): a part for every device."""
    return NamedSharding(mesh, _spec(mesh, name, shape, (TENSOR, AXIS)))


def outer(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Of a tensor before or behind the layers: rows of a table along `TENSOR`."""
    divided = len(shape) == 2 and shape[0] % mesh.shape[TENSOR] == 0
    return NamedSharding(mesh, PartitionSpec(TENSOR) if divided else PartitionSpec())


def gathered(mesh: Mesh | None, weights: Weights, hidden: Array) -> tuple[Weights, Array]:
    """The weights of a layer, of parts as `stored` has them, and each device's own windows.

    For the inside of a program.
    """
    if mesh is None:
        return weights, hidden

    def divided(tensor: Array, spec: PartitionSpec) -> Array:
        return jax.lax.with_sharding_constraint(tensor, NamedSharding(mesh, spec))

    def common(name: str, weight: Array) -> Array:
        # The first is for the gradient: it would be whole on each device that has its own windows.
        for axes in ((TENSOR, AXIS), (TENSOR,)):
            spec = [*_spec(mesh, name, (1, *weight.shape), axes)]
            weight = divided(weight, PartitionSpec(*spec[1:]))
        return weight

    weights = {
        name: jax.tree.map(functools.partial(common, name), weight)
        for name, weight in weights.items()
    }
    return weights, divided(hidden, PartitionSpec(AXIS))


def _spec(mesh: Mesh, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> PartitionSpec:
    """Without the axes that do not divide their dimension: those devices have copies.

    As programs write it, without axes of one device and what is whole at the end: arrays that come
    out of a step are then placed as those that went in, and it is compiled once.
    """
    dimensions = {AXIS: 1, TENSOR: _shared_dimension(name)}
    parts: list[tuple[str, ...]] = [()] * len(shape)
    for axis in axes:
        dimension = dimensions[axis]
        if dimension is None or mesh.shape[axis] == 1:
            continue
        divided = (*parts[dimension], axis)
        if shape[dimension] % math.prod(mesh.shape[part] for part in divided) == 0:
            parts[dimension] = divided
    while parts and not parts[-1]:
        parts.pop()
    return PartitionSpec(*(part or None for part in parts))


def _shared_dimension(name: str) -> int | None:
    """Of a tensor of all layers, the one that belongs to heads or to the width of the MLP."""
    *_, module, kind = name.split(".")
    if module in ("o_proj", "down_proj"):
        return 2 if kind == "weight" else None
    return 1 if module.endswith("_proj") else None
