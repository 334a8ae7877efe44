"""Packed weights in the layouts of other libraries."""

import jax.numpy as jnp
from jax import Array, lax

from prox24.packed.format import Packed24, check_words

CUTLASS_DTYPES = ("float16", "bfloat16")
CUTLASS_ROWS, CUTLASS_COLUMNS = 32, 64
"""The weight's shape must be a multiple of these for PyTorch's kernels."""


def to_cutlass(w: Packed24) -> tuple[Array, Array]:
    """Values and metadata of a weight (out, in) as CUTLASS's sparse products read them.

    PyTorch's `SparseSemiStructuredTensorCUTLASS` holds the two side by side, `torch.cat` of the
    values and of the metadata viewed in the weight's dtype. cuSPARSELt compresses a dense weight
    by itself: `unpack` is its input.

    A code is the same four bits there. Four make an int16, the first in its lowest bits, and the
    int16 are reordered: within every 32 rows, row 8 i + j comes to 4 j + i; every square of two
    rows and two columns is transposed; and pairs of columns are stored one after the other.

    Args:
      w: packed along the last axis of (out, in), out a multiple of 32 and in of 64; float16 or
        bfloat16.

    Returns:
      values (out, in / 2) as in `w`, and metadata (out, in / 16), int16.

    Raises:
      ValueError: another dtype, axis or shape, or codes that do not fit the values.

    References:
      torch/sparse/_semi_structured_conversions.py of PyTorch, and reorder_meta in
      tools/util/include/cutlass/util/host_reorder.h of CUTLASS.

    Example:
      >>> from prox24.packed import pack
      >>> values, metadata = to_cutlass(pack(jnp.zeros((32, 64), jnp.float16)))
      >>> values.shape, metadata.shape
      ((32, 32), (32, 4))
    """
    _check_weight("to_cutlass", w)
    if w.dtype.name not in CUTLASS_DTYPES:
        raise ValueError(f"to_cutlass takes {' or '.join(CUTLASS_DTYPES)}, not {w.dtype}")
    rows, columns = w.shape
    if rows % CUTLASS_ROWS or columns % CUTLASS_COLUMNS:
        raise ValueError(
            f"to_cutlass takes weights of shape (out, in) that are multiples of {CUTLASS_ROWS} and "
            f"{CUTLASS_COLUMNS}, not {w.shape}"
        )
    # The low half of a word comes first.
    metadata = lax.bitcast_convert_type(w.codes, jnp.int16).reshape(rows, -1)
    metadata = metadata.reshape(rows // 32, 4, 8, -1).swapaxes(1, 2)
    squares = metadata.reshape(rows // 2, 2, -1, 2)
    return w.values, squares.transpose(2, 0, 3, 1).reshape(rows, -1)


def _check_weight(function: str, w: Packed24) -> None:
    if w.values.ndim != 2 or w.axis != -1:
        raise ValueError(
            f"{function} takes a weight (out, in) that is packed along its last axis, not one of "
            f"shape {w.shape} packed along axis {w.axis}"
        )
    check_words(w)
