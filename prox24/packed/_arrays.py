"""Packed weights as arrays that files of tensors and other libraries can hold."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from numpy.typing import NDArray

from prox24.errors import CheckpointError
from prox24.packed._codes import (
    BITS,
    BLOCK,
    CODES_PER_WORD,
    ENTRIES_PER_WORD,
    KEPT,
    PAIRS,
    words_of,
)
from prox24.packed._format import DTYPES, Packed24, check_words

PARTS = ("values", "codes", "axis")
CUTLASS_DTYPES = ("float16", "bfloat16")
CUTLASS_ROWS, CUTLASS_COLUMNS = 32, 64
"""The weight's shape must be a multiple of these for PyTorch's kernels."""


def to_arrays(name: str, w: Packed24) -> dict[str, NDArray[Any]]:
    """Host arrays that hold a packed weight, by name.

    Args:
      name: name of the weight. The names of its arrays begin with it.
      w: the packed weight.

    Returns:
      NAME.values and NAME.codes as in `Packed24`, and NAME.axis, int32 of shape (1,).

    Raises:
      ValueError: codes and values do not fit each other.

    Example:
      >>> from prox24.packed import pack
      >>> arrays = to_arrays("up", pack(jnp.zeros((2, 32))))
      >>> [(name, array.shape) for name, array in arrays.items()]
      [('up.values', (2, 16)), ('up.codes', (2, 1)), ('up.axis', (1,))]
    """
    check_words(w)
    parts = (np.asarray(w.values), np.asarray(w.codes), np.array([w.axis], np.int32))
    return {f"{name}.{part}": array for part, array in zip(PARTS, parts, strict=True)}


def from_arrays(name: str, arrays: Mapping[str, ArrayLike]) -> Packed24:
    """The packed weight that `to_arrays` wrote; checks every code.

    Args:
      name: name of the weight.
      arrays: arrays by name. There may be arrays of other weights too.

    Returns:
      `Packed24` on JAX's default device.

    Raises:
      CheckpointError: an array is missing or has another dtype or shape, or JAX would round the
        values. Also if a code is invalid, or unused bits of the last word are set.

    Example:
      >>> from prox24.packed import pack, unpack
      >>> w = from_arrays("up", to_arrays("up", pack(jnp.array([0.0, 1.0, 0.0, 2.0]))))
      >>> unpack(w).tolist()
      [0.0, 1.0, 0.0, 2.0]
    """
    values, codes, axis = (_find(name, part, arrays) for part in PARTS)
    if values.dtype.name not in DTYPES or values.ndim < 1 or values.shape[-1] % KEPT:
        raise CheckpointError(
            f"tensor {name}.values is {values.dtype} of shape {values.shape}; expected is one of "
            f"{', '.join(DTYPES)} and an even last axis"
        )
    if jax.dtypes.canonicalize_dtype(values.dtype) != values.dtype:
        raise CheckpointError(
            f"tensor {name}.values is {values.dtype}, which JAX rounds unless jax_enable_x64 is set"
        )
    entries = values.shape[-1] // KEPT * BLOCK
    expected = (*values.shape[:-1], words_of(entries))
    if codes.dtype != np.uint32 or codes.shape != expected:
        raise CheckpointError(
            f"tensor {name}.codes is {codes.dtype} of shape {codes.shape}; expected is uint32 of "
            f"shape {expected}"
        )
    if axis.dtype != np.int32 or axis.shape != (1,) or not -values.ndim <= axis[0] < 0:
        raise CheckpointError(
            f"tensor {name}.axis is not one int32 between {-values.ndim} and -1; write the weight "
            "anew"
        )
    _check_codes(name, codes, entries // BLOCK)
    return Packed24(
        jnp.asarray(values), jnp.asarray(codes), int(axis[0]), entries % ENTRIES_PER_WORD
    )


def to_cutlass(w: Packed24) -> tuple[Array, Array]:
    """Values and metadata of a weight (out, in), in the format of CUTLASS's sparse products.

    PyTorch's `SparseSemiStructuredTensorCUTLASS` holds both in one tensor: `torch.cat` of the
    values and of the metadata, viewed in the weight's dtype. cuSPARSELt compresses a dense weight
    by itself, so give it the result of `unpack`.

    A code has the same four bits in CUTLASS. Four codes make an int16, the first in its lowest
    bits. The int16 are then reordered:

    - Within every 32 rows, row 8 i + j comes to 4 j + i.
    - Every square of two rows and two columns is transposed.
    - Pairs of columns are stored one after the other.

    Args:
      w: a float16 or bfloat16 weight (out, in), packed along its last axis. Here out is a multiple
        of 32, and in is a multiple of 64.

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
    if w.values.ndim != 2 or w.axis != -1:
        raise ValueError(
            "to_cutlass takes a weight (out, in) that is packed along its last axis, not one of "
            f"shape {w.shape} packed along axis {w.axis}"
        )
    check_words(w)
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


def _find(name: str, part: str, arrays: Mapping[str, ArrayLike]) -> NDArray[Any]:
    if f"{name}.{part}" not in arrays:
        raise CheckpointError(f"tensor {name}.{part} is missing")
    return np.asarray(arrays[f"{name}.{part}"])


def _check_codes(name: str, codes: NDArray[np.uint32], blocks: int) -> None:
    valid = np.isin(np.arange(2**BITS), PAIRS)
    for place in range(CODES_PER_WORD):
        code = codes >> np.uint32(BITS * place) & np.uint32(2**BITS - 1)
        block = np.arange(codes.shape[-1]) * CODES_PER_WORD + place
        wrong = np.where(block < blocks, ~valid[code], code != 0)
        if wrong.any():
            *row, word = (int(i) for i in np.argwhere(wrong)[0])
            raise CheckpointError(
                f"tensor {name}.codes: the code {code[(*row, word)]} of block "
                f"{(*row, int(block[word]))} is invalid; the file is damaged"
            )
