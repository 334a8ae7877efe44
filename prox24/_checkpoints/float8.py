"""float8 weights, read as their products with their scales."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from prox24._checkpoints.tensors import TensorSource
from prox24.errors import CheckpointError

FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
SCALE = "_scale_inv"
"""HF's suffix for a weight's scale. Despite this name, the scale multiplies the weight."""


def dequantise(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorSource], dtype: np.dtype[Any]
) -> dict[str, TensorSource]:
    """Replaces each float8 weight by its product with its scale; scales are left out.

    A scale is one number for the weight, or one number for each block, as in DeepSeek-V3. The
    `quantization_config` has the size of a block as `weight_block_size`. Blocks at the end may be
    incomplete. The products have the given dtype.
    """
    weights = {name for name, source in tensors.items() if source.dtype in FLOAT8}
    # A static scheme also stores scales of activations. Only float8 arithmetic needs them.
    modules = {name.removesuffix(".weight") for name in weights}
    dropped = {f"{name}{SCALE}" for name in weights}
    dropped |= {f"{module}.activation_scale" for module in modules}
    block = (config.get("quantization_config") or {}).get("weight_block_size")
    values = {name: source for name, source in tensors.items() if name not in dropped}
    for name in weights:
        scale = tensors.get(f"{name}{SCALE}")
        if scale is None:
            raise CheckpointError(
                f"{path}: tensor {name} is {tensors[name].dtype} without {name}{SCALE}; "
                "dequantise the model first"
            )
        if math.prod(scale.shape) != 1 and scale.shape != _blocks(tensors[name].shape, block):
            raise CheckpointError(
                f"{path}: tensor {name}{SCALE} has shape {scale.shape}, which does not fit "
                f"{tensors[name].shape} in blocks of {block}"
            )
        values[name] = _product(tensors[name], scale, block, dtype)
    return values


def _blocks(shape: tuple[int, ...], block: Any) -> tuple[int, ...] | None:
    fits = isinstance(block, list) and len(shape) == len(block) == 2
    if not fits or not all(type(size) is int and size > 0 for size in block):
        return None
    return tuple(-(-length // size) for length, size in zip(shape, block, strict=True))


def _product(
    weight: TensorSource, scale: TensorSource, block: Any, dtype: np.dtype[Any]
) -> TensorSource:
    def read() -> NDArray[Any]:
        with np.errstate(over="ignore"):
            factors = scale.read().astype(np.float32)
        if factors.size == 1:
            factors = factors.reshape(())
        else:  # A block may be much larger than the weight.
            places = (np.arange(n) // min(b, n) for n, b in zip(weight.shape, block, strict=True))
            factors = factors[np.ix_(*places)]
        with np.errstate(all="ignore"):  # the caller checks for NaN and Inf
            return (weight.read().astype(np.float32) * factors).astype(dtype)

    return TensorSource(weight.shape, dtype, read)
