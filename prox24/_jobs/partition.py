"""The parts of a decoder's tensors that each device stores, and computes with, in a training.

The mesh has two axes. Devices along `AXIS` share the windows (fully sharded data parallelism). Each
keeps a part of every tensor. When a layer runs, its tensors are gathered from the parts.

Devices along `TENSOR` share the heads and the widths (tensor parallelism). The input linears of
attention and MLP are divided by rows, the output linears by columns. These devices send each other
the sums of the outputs. If query, key and value, or gate and up, are one linear, they also send
parts of the activations.
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


def check_divides(config: Config, mesh: Mesh, windows: int) -> None:
    """Raises Prox24Error if devices do not divide the windows of a micro-batch, heads or widths."""
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
    """The stored form of a tensor of all layers, shape (layers, ...): a part on every device."""
    return NamedSharding(mesh, _spec(mesh, name, shape, (TENSOR, AXIS)))


def outer(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The stored form of a tensor before or after the layers: rows of a table along `TENSOR`."""
    divided = len(shape) == 2 and shape[0] % mesh.shape[TENSOR] == 0
    return NamedSharding(mesh, PartitionSpec(TENSOR) if divided else PartitionSpec())


def gathered(mesh: Mesh | None, weights: Weights, hidden: Array) -> tuple[Weights, Array]:
    """A layer's weights, gathered from their `stored` parts, and each device's own windows.

    It is for use inside a program.
    """
    if mesh is None:
        return weights, hidden

    def divided(tensor: Array, spec: PartitionSpec) -> Array:
        return jax.lax.with_sharding_constraint(tensor, NamedSharding(mesh, spec))

    def common(name: str, weight: Array) -> Array:
        # The first constraint keeps the gradient in parts: a device never holds a whole gradient.
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
    """The partition along `axes`. An axis that does not divide its dimension is left out.

    The devices of such an axis have copies. Axes of one device and undivided last dimensions are
    left out too, as in the outputs of programs. So the outputs of a step have the same placement as
    its inputs, and the step is compiled once.
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
    """The dimension of heads or of the MLP's width, in a tensor of all layers; None without it."""
    *_, module, kind = name.split(".")
    if module in ("o_proj", "down_proj"):
        return 2 if kind == "weight" else None
    return 1 if module.endswith("_proj") else None
