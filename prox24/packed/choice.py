"""Whether a weight is better kept packed or dense: what was measured on this machine."""

from collections.abc import Iterable

from jax import Array

from prox24.packed import table
from prox24.packed.codes import BLOCK, KEPT
from prox24.packed.format import Packed24, unpack
from prox24.packed.implementation import Case, default_platform


def packed_or_dense(w: Packed24, batches: Iterable[int] = (1,)) -> Packed24 | Array:
    """The weight as it is, or unpacked for good where its products would be slower than dense ones.

    It stays packed if what `matmul` runs was measured by `prox24 tune`, for every batch, to take at
    most 2% longer than the faster of XLA's dense products x W^T and W x^T in the dtype of the
    weight, at the default precision. The dense weights take their memory.

    Args:
      w: packed, (out, in) along -1 or (in, out) along -2.
      batches: numbers of vectors that it will be multiplied with, on the default platform.

    Returns:
      `w`, or an array of its shape and dtype.

    Raises:
      ValueError: `w` has another number of axes, or there are no batches.

    Example:
      >>> import jax.numpy as jnp
      >>> from prox24.packed import pack
      >>> packed_or_dense(pack(jnp.array([[0.0, 1.0, 0.0, 2.0]]))).tolist()  # was never measured
      [[0.0, 1.0, 0.0, 2.0]]
    """
    batches = list(batches)
    if not batches:
        raise ValueError("packed_or_dense takes the number of vectors of one product at least")
    if w.values.ndim != 2:
        raise ValueError(f"packed_or_dense takes a weight of two axes, not of shape {w.shape}")
    outputs, half = w.values.shape
    case = Case(default_platform(), w.dtype.name, outputs, half // KEPT * BLOCK, 1)
    if all(table.keeps_up(case._replace(batch=batch)) for batch in batches):
        return w
    return unpack(w)
