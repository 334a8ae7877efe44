"""Packed weights as named arrays, which safetensors and other files of tensors can hold."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray

from prox24.errors import CheckpointError
from prox24.packed.codes import (
    BITS,
    BLOCK,
    CODES_PER_WORD,
    ENTRIES_PER_WORD,
    KEPT,
    PAIRS,
    words_of,
)
from prox24.packed.format import DTYPES, Packed24, check_words

PARTS = ("values", "codes", "axis")


def to_arrays(name: str, w: Packed24) -> dict[str, NDArray[Any]]:
    """Host arrays that hold a packed weight, by names that begin with its own.

    Args:
      name: of the weight.
      w: the weight.

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
    """Reads what `to_arrays` gave, from among other arrays too, and checks every code.

    Args:
      name: of the weight.
      arrays: by name.

    Returns:
      `Packed24` on JAX's default device.

    Raises:
      CheckpointError: an array is missing, or of another dtype or shape, or a code is not of two
        places in order, or bits of the last word are set that tell of no entry, or JAX would round
        the values.

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
                f"{(*row, int(block[word]))} is no pair of places in order; the file is damaged"
            )
