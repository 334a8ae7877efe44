"""The product on TPUs, by a Pallas kernel that reads every packed weight once for a small batch.

It was compiled for v5e and v6e, and its numbers were tested in interpreted mode. No TPU has run it.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from prox24._core.precision import PRECISION
from prox24.packed._codes import BITS, BLOCK, CODES_PER_WORD, KEPT
from prox24.packed._kernels import xla

OUTPUTS = 128
"""Rows of the weight in a tile: the number of lanes."""
BLOCKS = 128
"""Blocks of every row that are unpacked at once."""
INPUTS = BLOCKS * BLOCK
"""The number of inputs must be a multiple of this."""
LARGEST_ROW = 2 * 28672
"""Maximal bytes of a dense row, so that the rows of a tile fit into on-chip memory."""
ROWS = 16
"""The vectors of x are padded to a multiple of this: the rows of a tile in 16-bit types."""


def run(x: Array, values: Array, codes: Array, interpret: bool = False) -> Array:
    """x W^T, see `prox24.packed._choice.Implementation`.

    A tile of the weight is transposed. Its rows then lie along lanes, and the two values of a block
    lie in neighbouring rows of registers. Plane p has the entries in place p of all blocks, and is
    made by comparing codes with p. The product is the sum over p of the products of plane p with
    x[p::4]. With `interpret` it runs as ordinary JAX, on any device.
    """
    # Imported here, since only TPUs need these modules, and their import is slow.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    outputs, words = codes.shape
    batch, inputs = math.prod(x.shape[:-1]), x.shape[-1]
    rows = -(-batch // ROWS) * ROWS
    flat = jnp.pad(x.reshape(batch, inputs), [(0, rows - batch), (0, 0)])
    planes = flat.reshape(rows, inputs // BLOCK, BLOCK).transpose(2, 0, 1)
    step = BLOCKS // CODES_PER_WORD

    def tile(
        x_ref: Array, values_ref: Array, codes_ref: Array, y_ref: Array, turned: Array, word: Array
    ) -> None:
        turned[...] = values_ref[...].astype(jnp.float32).T
        word[...] = codes_ref[...].T

        def add_blocks(i: Array, total: Array) -> Array:
            packed = word[pl.ds(i * step, step), :]
            shifts = BITS * lax.broadcasted_iota(jnp.int32, (step, CODES_PER_WORD, OUTPUTS), 1)
            code = lax.shift_right_logical(
                jnp.broadcast_to(packed[:, None, :], shifts.shape), shifts
            ).reshape(BLOCKS, OUTPUTS)
            first, second = (
                turned[pl.ds(i * BLOCKS * KEPT + place, BLOCKS, stride=KEPT), :]
                for place in range(KEPT)
            )
            for place in range(BLOCK):
                weight = jnp.where(
                    (code & 3) == place, first, jnp.where((code >> 2 & 3) == place, second, 0.0)
                )
                total += lax.dot_general(
                    x_ref[place, :, pl.ds(i * BLOCKS, BLOCKS)],
                    weight.astype(x_ref.dtype),
                    (((1,), (0,)), ((), ())),
                    precision=PRECISION if x_ref.dtype == jnp.float32 else None,
                    preferred_element_type=jnp.float32,
                )
            return total

        total = lax.fori_loop(0, words // step, add_blocks, jnp.zeros(y_ref.shape, jnp.float32))
        y_ref[...] = total.astype(y_ref.dtype)

    # The indices of a grid would be 64-bit integers, which Mosaic does not have.
    with jax.enable_x64(False):
        y = pl.pallas_call(
            tile,
            grid=(outputs // OUTPUTS,),
            in_specs=[
                pl.BlockSpec(planes.shape, lambda i: (0, 0, 0)),
                pl.BlockSpec((OUTPUTS, inputs // KEPT), lambda i: (i, 0)),
                pl.BlockSpec((OUTPUTS, words), lambda i: (i, 0)),
            ],
            out_specs=pl.BlockSpec((rows, OUTPUTS), lambda i: (0, i)),
            # Inside shard_map this also says over which axes the result varies.
            out_shape=jax.eval_shape(xla.run, flat, values, codes),
            scratch_shapes=[
                pltpu.VMEM((inputs // KEPT, OUTPUTS), jnp.float32),
                pltpu.VMEM((words, OUTPUTS), jnp.int32),
            ],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
            cost_estimate=pl.CostEstimate(
                flops=2 * rows * inputs * outputs,
                transcendentals=0,
                bytes_accessed=planes.nbytes
                + values.nbytes
                + codes.nbytes
                + rows * outputs * x.dtype.itemsize,
            ),
            interpret=interpret,
            name="matmul24",
        )(planes, values, lax.bitcast_convert_type(codes, jnp.int32))
    return y[:batch].reshape(*x.shape[:-1], outputs)
