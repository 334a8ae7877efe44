"""The files of an HF folder: config.json, weights with or without an index, and other files."""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prox24._checkpoints.tensors import TensorSource
from prox24.errors import CheckpointError

MANIFEST = "prox24.json"
"""The manifest of `prox24 prune`, see `prox24._checkpoints.manifest`."""

# Weights in other formats would contradict the pruned ones.
NOT_CARRIED = (
    *(".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".ot"),
    *(".gguf", ".onnx", ".tflite", ".index.json"),
)

MAX_DEPTH = 100
"""The most levels of a JSON file. Python cannot compare, print or write much deeper ones."""


class WeightFiles(NamedTuple):
    """The names of a format's files, and the function that reads one."""

    stem: str  # of a file's name, before the number of the shard
    suffix: str
    open_file: Callable[[Path], dict[str, TensorSource]]  # the tensors by HF's names
    tensor_name: Callable[[str], str] = str  # HF's name for a name in the index

    @property
    def single_file(self) -> str:
        """Name of the file that holds all tensors."""
        return self.stem + self.suffix

    @property
    def index_file(self) -> str:
        """Name of the file with the shard of each tensor."""
        return f"{self.single_file}.index.json"

    def names(self, count: int) -> list[str]:
        """Names of `count` files."""
        if count == 1:
            return [self.single_file]
        return [f"{self.stem}-{i:05d}-of-{count:05d}{self.suffix}" for i in range(1, count + 1)]

    def are_in(self, folder: Path) -> bool:
        """Whether a folder has weights in this format."""
        return (folder / self.single_file).is_file() or (folder / self.index_file).is_file()


def read_json(path: Path) -> dict[str, Any]:
    """Decodes a file with a JSON object; raises CheckpointError for a link out of its folder."""
    if not path.is_file():
        raise CheckpointError(f"cannot read {path}: there is no such file")
    check_inside(path)
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        depth = _depth(value)
        if "\\u" in text and depth <= MAX_DEPTH:
            json.dumps(value, ensure_ascii=False).encode()  # raises ValueError for lone surrogates
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except RecursionError:
        depth = MAX_DEPTH + 1
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{path} is nested in more than {MAX_DEPTH} levels")
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def _depth(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)


def open_shards(folder: Path, formats: Sequence[WeightFiles]) -> list[dict[str, TensorSource]]:
    """The tensors of a folder, file by file, in the first format with weights there."""
    files = next((files for files in formats if files.are_in(folder)), None)
    if files is None:
        names = ", ".join(files.single_file for files in formats)
        raise CheckpointError(f"{folder} has no weights: none of {names}, nor an index of shards")
    if (folder / files.single_file).is_file():
        return [_open_file(folder / files.single_file, files)]
    index = folder / files.index_file
    places = {files.tensor_name(name): shard for name, shard in _read_index(index).items()}
    shards = {name: _open_file(folder / name, files) for name in sorted(set(places.values()))}
    for name, shard in places.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"{index} places tensor {name} in {shard}, which does not hold it"
            )
    return [
        {name: source for name, source in tensors.items() if places.get(name) == shard}
        for shard, tensors in shards.items()
    ]


def weight_files(folder: Path, formats: Sequence[WeightFiles]) -> list[str]:
    """Names of the files that `open_shards` reads in a folder."""
    files = next(files for files in formats if files.are_in(folder))
    if (folder / files.single_file).is_file():
        return [files.single_file]
    return [files.index_file, *sorted(set(_read_index(folder / files.index_file).values()))]


def is_whole(folder: Path, formats: Sequence[WeightFiles]) -> bool:
    """Whether a folder has every file that `open_shards` reads."""
    has_weights = any(files.are_in(folder) for files in formats)
    return has_weights and all((folder / name).is_file() for name in weight_files(folder, formats))


def _read_index(index: Path) -> dict[str, str]:
    """The name of the shard of each tensor."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".."):
            raise CheckpointError(f"{index} places tensor {name} outside the folder: {shard!r}")
    return weight_map


def _open_file(path: Path, files: WeightFiles) -> dict[str, TensorSource]:
    if not os.path.isfile(path):  # Path.is_file raises an error for a very long name
        raise CheckpointError(f"shard {path} is missing")
    check_inside(path)
    return files.open_file(path)


def check_inside(path: Path) -> None:
    """Raises CheckpointError for a link out of a file's folder, except in a cache of the hub.

    In this cache MODEL/snapshots/REVISION/FILE is a link to MODEL/blobs/HASH. This may be a link to
    blobs/HA/HASH, which the models share.
    """
    if not path.is_symlink():
        return
    target, folder = path.resolve(), path.parent.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        model = folder.parent.parent
        allowed.append(model / "blobs")
        if re.fullmatch("[0-9a-f]{64}", target.name):
            allowed.append(model.parent / "blobs" / target.name[:2])
    if target.parent not in allowed:
        raise CheckpointError(f"{path} is a link to outside the folder")


def hub_hash(path: Path) -> str | None:
    """The hash by which the hub's cache names a file; None for a file elsewhere."""
    if not path.is_symlink() or path.parent.parent.name != "snapshots":
        return None
    target = path.readlink()
    return target.name if target.parent.name == "blobs" else None


def carried_files(folder: Path) -> list[Path]:
    """The files of a model that do not depend on its weights, such as tokenizer and licence.

    config.json is left out: it is written anew. The manifest is left out: it describes this model
    only. A link out of the folder raises CheckpointError: its target would be copied.
    """
    carried = sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and path.name not in ("config.json", MANIFEST)
        and not path.name.startswith(".")
        and not path.name.endswith(NOT_CARRIED)
    )
    for path in carried:
        check_inside(path)
    return carried
