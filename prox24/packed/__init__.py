"""2:4 weights at run time: a packed format, and products with it."""

from prox24.packed._arrays import from_arrays, to_arrays, to_cutlass
from prox24.packed._format import Packed24, pack, unpack
from prox24.packed._product import matmul

__all__ = [
    "Packed24",
    "from_arrays",
    "matmul",
    "pack",
    "to_arrays",
    "to_cutlass",
    "unpack",
]
