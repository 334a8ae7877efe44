"""The archival format sparse-24-bitmask: the kept values of a linear, and a bit for every entry.

compressed-tensors 0.14.0.1 is the last release that reads it.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from prox24.checkpoints import safetensors_file
from prox24.checkpoints.tensors import Put, Spec
from prox24.errors import CheckpointError, UnsupportedModelError
from prox24.models import decoder
from prox24.packed import pack, to_bitmask
from prox24.packed.codes import BLOCK, KEPT

REMARK = (
    "no runtime of today multiplies with this file: compressed-tensors 0.14.0.1, with "
    "transformers 4, unpacks it when it is loaded"
)
WEIGHT = ".weight"


def config_entries(config: decoder.Config) -> dict[str, Any]:
    """What config.json says besides."""
    head = decoder.outer_tensor(config.names, f"lm_head{WEIGHT}").removesuffix(WEIGHT)
    sparsity = {
        "format": "sparse-24-bitmask",
        "sparsity_structure": "2:4",
        "global_sparsity": 0.5,
        "targets": ["Linear"],
        "ignore": [head],
    }
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "version": "0.14.0.1",
            "sparsity_config": sparsity,
        }
    }


def packed_linears(config: decoder.Config) -> set[str]:
    """The weights of every linear of the layers, by the checkpoint's names.

    Raises:
      UnsupportedModelError: the reader would not find all of them, or others.
    """
    if config.names.transposed or any(layer.mlp.experts for layer in config.layers):
        raise UnsupportedModelError(
            "sparse-24-bitmask holds every Linear module of PyTorch: not a model with experts or "
            "with weights stored as (in, out); choose another --format"
        )
    return {
        decoder.layer_tensor(config.names, index, f"{name}{WEIGHT}")
        for index, layer in enumerate(config.layers)
        for name in decoder.linear_inputs(layer)
    }


def stored(name: str, spec: Spec, linears: Collection[str]) -> dict[str, Spec]:
    """What a file holds of a tensor: itself, or the parts of a linear.

    Raises:
      CheckpointError: the width of a linear is not divisible by four.

    Example:
      >>> list(stored("up.weight", Spec((8, 16), np.dtype(np.float32)), {"up.weight"}))
      ['up.shape', 'up.compressed', 'up.bitmask']
    """
    if name not in linears:
        return {name: spec}
    rows, columns = spec.shape
    if columns % BLOCK:
        raise CheckpointError(f"tensor {name} of shape {spec.shape} has no 2:4 blocks")
    module = name.removesuffix(WEIGHT)
    return {
        f"{module}.shape": Spec((2, 1), np.dtype(np.int64)),
        f"{module}.compressed": Spec((rows, columns // BLOCK * KEPT), spec.dtype),
        f"{module}.bitmask": Spec((rows, -(-columns // 8)), np.dtype(np.uint8)),
    }


@contextlib.contextmanager
def create_file(path: Path, specs: Mapping[str, Spec], linears: Collection[str]) -> Iterator[Put]:
    """A file of tensors whose values are written one by one, in any order.

    Args:
      path: of the file.
      specs: of every tensor, by HF's name.
      linears: the names of those to pack.

    Yields:
      What writes a tensor. It raises CheckpointError for a linear that is not 2:4.
    """
    parts = {name: stored(name, spec, linears) for name, spec in specs.items()}
    held = {part: spec for of_tensor in parts.values() for part, spec in of_tensor.items()}
    with safetensors_file.create_file(path, held) as put_part:

        def put(name: str, values: NDArray[Any]) -> None:
            arrays = _packed(name, values) if name in linears else [values]
            for part, array in zip(parts[name], arrays, strict=True):
                put_part(part, array)

        yield put


def _packed(name: str, values: NDArray[Any]) -> list[NDArray[Any]]:
    try:
        compressed, bits = to_bitmask(pack(jnp.asarray(values)))
    except ValueError as error:
        raise CheckpointError(f"tensor {name} cannot be packed: {error}") from error
    return [np.array(values.shape, np.int64)[:, None], np.asarray(compressed), np.asarray(bits)]
