"""The proximal operator on interleaved blocks as one TPU kernel, with one read and one write.

The planes of a (rows, columns) array are columns with a stride. A TPU keeps columns in the lanes of
its registers, which have no stride. XLA therefore changes the layout in HBM, there and back. The
kernel transposes a tile in on-chip memory instead, where planes are rows with a stride.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from prox24._core import planes
from prox24._core.pattern import Pattern
from prox24._core.placement import is_on_one_device

# Mosaic loads rows with a stride only from arrays with the width of a register.
LANES = 128
# A float32 tile takes 1 MiB, and a kernel uses about six of the 16 MiB on the chip.
COLUMNS = 2048
# Rows of a plane in one step. Their chains of Newton steps are independent and hide each other's
# latency.
STEP = 32


def serves(y: Array, lam: Array, pattern: Pattern, axis: int) -> bool:
    """Whether the kernel takes these arrays: others are too small, or have no layout of tiles."""
    return (
        y.dtype in (jnp.float32, jnp.bfloat16)
        and lam.ndim == 0
        and y.ndim >= 2
        and axis in (-1, y.ndim - 1)
        and pattern.group in (2, 4, 8)
        and pattern.unit == 1
        and _fits(y.shape)
        and (not jax.sharding.get_abstract_mesh().manual_axes or _varies_alike(y, lam))
    )


def planar(y: Array, lam: Array, kept: int, group: int, unit: int = 1, axis: int = -1) -> Array:
    """prox_{lam R}(y) by XLA, along any axis and for any lam."""
    blocks = planes.split(y, Pattern(kept, group, unit), axis)
    return planes.join(planes.prox(blocks, lam, kept, unit), axis)


def _lower_for_tpu(context: Any, *operands: Any, kept: int, group: int) -> Any:
    chosen: Callable[..., Array] = kernel if is_on_one_device(context) else planar
    function = functools.partial(chosen, kept=kept, group=group)
    return mlir.lower_fun(function, multiple_results=False)(context, *operands)


def _map(operands: Any, axes: Any, kept: int, group: int) -> tuple[Array, int]:
    (y, lam), (of_y, of_lam) = operands, axes
    if of_lam is None:
        return prox_p.bind(jnp.moveaxis(y, of_y, 0), lam, kept=kept, group=group), 0
    return jax.vmap(functools.partial(planar, kept=kept, group=group), axes)(y, lam), 0


# Takes y (..., columns) for which `serves` is true, and a scalar lam. It has no derivative.
prox_p = Primitive("prox")
prox_p.def_abstract_eval(lambda y, lam, **pattern: y)
prox_p.def_impl(planar)
mlir.register_lowering(prox_p, mlir.lower_fun(planar, multiple_results=False))
mlir.register_lowering(prox_p, _lower_for_tpu, platform="tpu")
batching.primitive_batchers[prox_p] = _map


def kernel(y: Array, lam: Array, kept: int, group: int, interpret: bool = False) -> Array:
    """`prox_p` on one device, for y (..., columns) and a scalar lam.

    With `interpret` it runs as ordinary JAX, on any device.
    """
    # Imported here, since only TPUs need these modules, and their import is slow.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    shape = y.shape
    rows, columns = math.prod(shape[:-1]), shape[-1]
    width = min(columns, COLUMNS)
    y = y.reshape(rows, columns)

    def tile(lam_ref: Array, y_ref: Array, w_ref: Array, turned: Array) -> None:
        turned[...] = y_ref[...].astype(jnp.float32).T

        @pl.loop(0, width, step=STEP * group)
        def _(start: Array) -> None:
            places = [pl.ds(start + i, STEP, stride=group) for i in range(group)]
            blocks = [turned[place, :] for place in places]
            lam = jnp.full_like(blocks[0], lam_ref[0])
            for place, w in zip(places, planes.prox(blocks, lam, kept), strict=True):
                turned[place, :] = w

        w_ref[...] = turned[...].T.astype(w_ref.dtype)

    block = pl.BlockSpec((LANES, width), lambda i, j: (i, j))
    # The indices of a grid would be 64-bit integers, which Mosaic does not have.
    with jax.enable_x64(False):
        w = pl.pallas_call(
            tile,
            grid=(pl.cdiv(rows, LANES), pl.cdiv(columns, width)),
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), block],
            out_specs=block,
            # Inside shard_map this also says over which axes y varies.
            out_shape=jax.eval_shape(lambda y: y, y),
            scratch_shapes=[pltpu.VMEM((width, LANES), jnp.float32)],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
            # A rough estimate, from the instructions for 2:4. XLA schedules by it.
            cost_estimate=pl.CostEstimate(
                flops=300 * y.size, transcendentals=12 * y.size, bytes_accessed=2 * y.nbytes
            ),
            interpret=interpret,
            name="prox",
        )(lam.astype(jnp.float32).reshape(1), y)
    return w.reshape(shape)


def _varies_alike(y: Array, lam: Array) -> bool:
    """Whether, inside shard_map, y varies over all axes over which lam varies.

    The result varies over the axes of both, but the kernel's result varies only over those of y.
    """
    both = jax.eval_shape(lambda y, lam: y + lam.astype(y.dtype), y, lam)
    return both == jax.eval_shape(lambda y: y, y)


def _fits(shape: tuple[int, ...]) -> bool:
    if not all(isinstance(length, int) for length in shape):
        return False  # symbolic
    return math.prod(shape[:-1]) >= LANES and shape[-1] > 0 and shape[-1] % (8 * STEP) == 0
