"""The msgpack files of the Flax classes that transformers had until version 4.

They hold a tree of arrays. Its paths are PyTorch's names, except for the last part: the weight of a
linear is `kernel`, transposed, and the weight of an embedding is `embedding`. The weight of a norm
is `scale`, or `weight` for classes with their own norm.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from prox24._checkpoints.hf_folder import WeightFiles
from prox24._checkpoints.safetensors_file import DTYPES
from prox24._checkpoints.tensors import MAX_DIMENSIONS, Put, TensorSource, is_possible, writing
from prox24.errors import CheckpointError, UnsupportedModelError, first_line

NORM_LEAVES = {
    "bloom": "scale",
    "gemma": "weight",
    "gpt2": "scale",
    "llama": "weight",
    "mistral": "weight",
    "opt": "scale",
}
"""The name of a norm's weight in the Flax class of a model_type."""

EMBEDDINGS = ("embed_positions", "embed_tokens", "word_embeddings", "wpe", "wte")
"""Modules whose matrix is an embedding; the matrix of any other module is a linear."""

DTYPE_NAMES = {dtype.name: dtype for dtype in DTYPES.values()}
ARRAY = 1
"""Flax's code of the msgpack extension with the shape, dtype and bytes of an array."""
CHUNKED = "__msgpack_chunked_array__"
"""Marks a dict with an array in pieces: a msgpack extension holds at most 4 GiB."""


def tensor_name(path: str) -> str:
    """PyTorch's name for a path of the tree."""
    *modules, leaf = path.split("/")
    return ".".join([*modules, "weight" if leaf in ("kernel", "scale", "embedding") else leaf])


def norm_leaf(model_type: str) -> str:
    """The name of a norm's weight in the Flax class of a model."""
    if model_type not in NORM_LEAVES:
        raise UnsupportedModelError(
            f"there is no Flax class to write model_type {model_type!r} for; "
            f"there is one for {', '.join(NORM_LEAVES)}"
        )
    return NORM_LEAVES[model_type]


def leaf_path(name: str, dimensions: int, norm: str) -> str:
    """Path of a tensor in the tree, the inverse of `tensor_name`; `norm` is from `norm_leaf`."""
    *modules, leaf = name.split(".")
    if leaf == "weight" and dimensions == 1:
        leaf = norm
    elif leaf == "weight":
        leaf = "embedding" if modules[-1] in EMBEDDINGS else "kernel"
    return "/".join([*modules, leaf])


def open_file(path: Path) -> dict[str, TensorSource]:
    """The tensors of a file by PyTorch's names, in PyTorch's layout; reads the whole file."""
    from flax.traverse_util import flatten_dict  # slow to import, and for few checkpoints

    try:
        # Flax's reader trusts the length that a list claims, and decodes more than arrays.
        tree = msgpack.unpackb(
            path.read_bytes(), ext_hook=_array, object_hook=_joined, raw=False, max_array_len=0
        )
        leaves = flatten_dict(tree, sep="/")
    except Exception as error:  # msgpack, flax and numpy share no type of exception
        raise CheckpointError(f"{path} cannot be read as msgpack: {first_line(error)}") from error
    return {tensor_name(leaf): _source(path, leaf, values) for leaf, values in leaves.items()}


def _array(code: int, data: bytes) -> NDArray[Any] | None:
    if code != ARRAY:
        return None
    shape, dtype, content = msgpack.unpackb(data, max_array_len=MAX_DIMENSIONS)
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"an array has dtype {dtype!r}")
    return _reshaped(np.frombuffer(content, DTYPE_NAMES[dtype]), tuple(shape))


def _joined(tree: dict[str, Any]) -> Any:
    """The array, if the dict holds its chunks; otherwise the dict."""
    if CHUNKED not in tree:
        return tree
    parts = (tree["shape"], tree["chunks"])
    shape, chunks = (tuple(part[str(index)] for index in range(len(part))) for part in parts)
    if len({chunk.dtype for chunk in chunks}) != 1:
        raise ValueError("the chunks of an array differ in dtype")
    return _reshaped(np.concatenate(chunks), shape)


def _reshaped(values: NDArray[Any], shape: tuple[Any, ...]) -> NDArray[Any]:
    is_shape = all(type(length) is int and length >= 0 for length in shape)
    if not is_shape or not is_possible(shape, values.dtype) or math.prod(shape) != values.size:
        raise ValueError("the shape of an array is not that of its entries")
    return values.reshape(shape)


def _source(path: Path, leaf: str, values: Any) -> TensorSource:
    if not isinstance(values, np.ndarray):
        raise CheckpointError(f"{path}: {leaf} is not an array")
    if not leaf.endswith("kernel"):
        return TensorSource(values.shape, values.dtype, lambda: values)
    if values.ndim != 2:
        raise CheckpointError(f"{path}: {leaf} has shape {values.shape} and is not a linear's")
    return TensorSource(values.T.shape, values.dtype, lambda: np.ascontiguousarray(values.T))


@contextlib.contextmanager
def create_file(path: Path, norm: str) -> Iterator[Put]:
    """A file in the format of the Flax classes, written when the block ends.

    Yields a function that takes PyTorch's name of a tensor, and its values in PyTorch's layout.
    """
    from flax.serialization import msgpack_serialize
    from flax.traverse_util import unflatten_dict

    leaves: dict[str, NDArray[Any]] = {}

    def put(name: str, values: NDArray[Any]) -> None:
        leaf = leaf_path(name, values.ndim, norm)
        leaves[leaf] = values.T if leaf.endswith("/kernel") else values

    yield put
    tree = unflatten_dict(leaves, sep="/")
    with writing(path):
        path.write_bytes(msgpack_serialize(tree, in_place=True))


FILES = WeightFiles("flax_model", ".msgpack", open_file, tensor_name)
