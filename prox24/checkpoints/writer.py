"""Writing HF folders that are complete or absent."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from prox24.checkpoints.checkpoint import DTYPES, Checkpoint, config_json
from prox24.checkpoints.hf_folder import INDEX
from prox24.errors import CheckpointError


def check_destination(destination: Path, source: Path, overwrite: bool) -> None:
    """Raises CheckpointError where writing to `destination` would fail or lose something."""
    if destination.exists() and destination.samefile(source):
        raise CheckpointError(f"{destination} is the source; choose another destination")
    if destination.exists() and not overwrite:
        raise CheckpointError(f"{destination} exists; pass --overwrite to replace it")
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is a file; choose a folder")
    if not destination.absolute().parent.is_dir():
        raise CheckpointError(f"the folder of {destination} does not exist")


def write_checkpoint(
    source: Checkpoint,
    destination: Path,
    replaced: Mapping[str, NDArray[Any]],
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes `source` with some tensors replaced, as an HF folder with the same names and shards.

    The folder is written beside the destination, synchronised to disk and renamed, so that the
    destination is complete or absent, whatever happens.

    Args:
      source: gives the names, the order, the config, the tokenizer and every other file.
      destination: a folder that does not exist yet, unless `overwrite`.
      replaced: new values by tensor name; others are copied bit for bit.
      dtype: "float32", "float16" or "bfloat16" for every tensor; None keeps each tensor's own.
      overwrite: replaces an existing folder, which stays until the new one is complete.

    Raises:
      CheckpointError: the destination exists, the source cannot be read, or the disk fails.
    """
    check_destination(destination, source.path, overwrite)
    with _complete_or_absent(destination) as folder:
        weight_map: dict[str, str] = {}
        size = 0
        for shard, names in source.shards.items():
            tensors = {name: _values(source, name, replaced, dtype) for name in names}
            save_file(tensors, folder / shard, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, shard)
            size += sum(values.nbytes for values in tensors.values())
        if len(source.shards) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (folder / INDEX).write_text(config_json(index), encoding="utf-8")
        for file in source.carried:
            shutil.copyfile(file, folder / file.name)
        if not source.carried:
            source.load_tokenizer().save_pretrained(folder)
        config = {k: v for k, v in source.config.items() if k != "quantization_config"}
        if dtype is not None:
            config = {k: v for k, v in config.items() if k != "dtype"} | {"torch_dtype": dtype}
        (folder / "config.json").write_text(config_json(config), encoding="utf-8")


def _values(
    source: Checkpoint, name: str, replaced: Mapping[str, NDArray[Any]], dtype: str | None
) -> NDArray[Any]:
    own = source.tensors[name].dtype
    values = replaced[name] if name in replaced else source.read(name)
    if own not in DTYPES.values():  # an integer buffer, which the computation does not use
        return values
    with np.errstate(over="ignore"):
        converted = values.astype(own if dtype is None else DTYPES[dtype])
    if not np.isfinite(converted.astype(np.float32)).all():
        raise CheckpointError(f"tensor {name} overflows {converted.dtype}; choose another dtype")
    return np.ascontiguousarray(converted)


@contextlib.contextmanager
def _complete_or_absent(destination: Path) -> Iterator[Path]:
    parent = destination.absolute().parent
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=parent))
    except OSError as error:
        raise CheckpointError(f"cannot write beside {destination}: {error.strerror}") from error
    try:
        yield folder
        folder.chmod(0o755)
        for file in folder.iterdir():
            _synchronise(file)
        _synchronise(folder)
        if destination.exists():
            replaced = folder.with_name(folder.name + ".replaced")
            destination.rename(replaced)
            folder.rename(destination)
            shutil.rmtree(replaced)
        else:
            folder.rename(destination)
        _synchronise(parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {destination}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
