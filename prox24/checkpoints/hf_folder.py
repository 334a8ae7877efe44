"""Reading HF folders: config.json, safetensors shards and their index, and other files."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from prox24.checkpoints.tensors import TensorSource
from prox24.errors import CheckpointError

SINGLE_SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"

SAFETENSORS_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

# Weights in other formats would contradict the pruned ones, and pruning notes describe another run.
NOT_CARRIED = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".msgpack",
    ".h5",
    ".gguf",
    ".onnx",
    ".index.json",
)


def read_json(path: Path) -> dict[str, Any]:
    """Decodes a JSON object.

    Raises:
      CheckpointError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def open_shards(folder: Path) -> dict[str, dict[str, TensorSource]]:
    """The safetensors files of a folder, by name, each with its tensors.

    Raises:
      CheckpointError: no weights, a shard that is missing or damaged, or an index that disagrees
        with the shards or points outside the folder.
    """
    if (folder / SINGLE_SHARD).is_file():
        return {SINGLE_SHARD: _open_shard(folder / SINGLE_SHARD)}
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} has neither {SINGLE_SHARD} nor {INDEX}")
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in (".", ".."):
            raise CheckpointError(f"{index} places tensor {name} outside the folder: {shard!r}")
    shards = {shard: _open_shard(folder / shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"{index} places tensor {name} in {shard}, which does not hold it"
            )
    return {
        shard: {name: source for name, source in tensors.items() if weight_map.get(name) == shard}
        for shard, tensors in shards.items()
    }


def _open_shard(path: Path) -> dict[str, TensorSource]:
    if not path.is_file():
        raise CheckpointError(f"shard {path} is missing")
    if path.is_symlink() and path.resolve().parent != path.parent.resolve():
        _check_hub_link(path)
    try:
        with safe_open(path, "numpy") as shard:
            headers = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
            return {
                name: TensorSource(
                    tuple(header.get_shape()),
                    SAFETENSORS_DTYPES.get(header.get_dtype(), np.dtype(np.void)),
                    _reader(path, name),
                )
                for name, header in headers.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"shard {path} cannot be read: {error}") from error


def _check_hub_link(path: Path) -> None:
    """Lets through the links of a hub cache (snapshots/REVISION/FILE to blobs/HASH), no others."""
    snapshots = path.parent.resolve().parent
    if snapshots.name != "snapshots" or path.resolve().parent != snapshots.parent / "blobs":
        raise CheckpointError(f"shard {path} is a link to outside the folder")


def _reader(path: Path, name: str) -> Any:
    def read() -> NDArray[Any]:
        try:
            with safe_open(path, "numpy") as shard:
                return shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"tensor {name} of {path} cannot be read: {error}") from error

    return read


def carried_files(folder: Path) -> list[Path]:
    """The files that go with a model whatever its weights: tokenizer, generation config, licence.

    config.json is written anew and is not among them.
    """
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and path.name != "config.json"
        and not path.name.startswith(".")
        and not path.name.endswith(NOT_CARRIED)
    )
