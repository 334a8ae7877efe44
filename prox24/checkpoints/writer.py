"""Writing HF folders that are complete or absent."""

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prox24.checkpoints import flax_file, safetensors_file
from prox24.checkpoints.checkpoint import DTYPES, Checkpoint, config_json, parameter_shapes
from prox24.checkpoints.hf_folder import WeightFiles
from prox24.errors import CheckpointError


class Output(NamedTuple):
    """A format to write.

    Attributes:
      files: how they are called.
      names: of the tensors that it holds, by HF's names.
      entry: what stands in a file for a tensor of that name: name and values.
      write: a file of entries.
    """

    files: WeightFiles
    names: Collection[str]
    entry: Callable[[str, NDArray[Any]], tuple[str, NDArray[Any]]]
    write: Callable[[Path, Mapping[str, NDArray[Any]]], None]


def _safetensors(source: Checkpoint) -> Output:
    return Output(
        files=safetensors_file.FILES,
        names=source.tensors.keys(),
        entry=lambda name, values: (name, values),
        write=safetensors_file.write_file,
    )


def _flax(source: Checkpoint) -> Output:
    norm = flax_file.norm_leaf(source.config["model_type"])
    return Output(
        files=flax_file.FILES,
        # Flax classes had no buffers.
        names=parameter_shapes(source.config, source.tensors).keys(),
        entry=lambda name, values: flax_file.tree_leaf(name, values, norm),
        write=flax_file.write_file,
    )


OUTPUTS: dict[str, Callable[[Checkpoint], Output]] = {"safetensors": _safetensors, "flax": _flax}
"""The formats to write in: safetensors, and the msgpack files of transformers' Flax classes."""


def check_destination(destination: Path, source: Path, overwrite: bool) -> None:
    """Raises CheckpointError where writing to `destination` would fail or lose something."""
    if destination.exists() and source.exists() and destination.samefile(source):
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
    max_shard_bytes: int | None = None,
    file_format: str = "safetensors",
    note: str | None = None,
) -> list[str]:
    """Writes `source` with some tensors replaced, as an HF folder with the same names.

    The folder is written beside the destination, synchronised to disk and renamed, so that the
    destination is complete or absent, whatever happens.

    Args:
      source: gives the names, the order, the config, the tokenizer and every other file.
      destination: a folder that does not exist yet, unless `overwrite`.
      replaced: new values by tensor name; others are copied bit for bit.
      dtype: "float32", "float16" or "bfloat16" for every tensor; None keeps each tensor's own.
      overwrite: replaces an existing folder, which stays until the new one is complete.
      max_shard_bytes: of the tensors in one file, unless a single one is larger; None keeps
        together what is in one file of the source.
      file_format: one of `OUTPUTS`.
      note: Markdown that is appended to the model card, README.md.

    Returns:
      The names of the tensors that were written: all, but for the buffers that Flax files lack.

    Raises:
      CheckpointError: the destination exists, the source cannot be read, or the disk fails.
      UnsupportedModelError: there is no Flax class for the model.
    """
    check_destination(destination, source.path, overwrite)
    output = OUTPUTS[file_format](source)
    shards = _shards(source, output.names, dtype, max_shard_bytes)
    with _complete_or_absent(destination) as folder:
        weight_map: dict[str, str] = {}
        size = 0
        for file, names in zip(output.files.names(len(shards)), shards, strict=True):
            entries = dict(
                output.entry(name, _values(source, name, replaced, dtype)) for name in names
            )
            output.write(folder / file, entries)
            weight_map |= dict.fromkeys(entries, file)
            size += sum(values.nbytes for values in entries.values())
        if len(shards) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (folder / output.files.index_file).write_text(config_json(index), encoding="utf-8")
        for carried in source.carried:
            shutil.copyfile(carried, folder / carried.name)
        if source.path.is_file():  # which holds the tokenizer as well
            source.load_tokenizer().save_pretrained(folder)
        if note is not None:
            with (folder / "README.md").open("ab") as card:
                card.write(f"\n{note}".encode() if card.tell() else note.encode())
        config = {k: v for k, v in source.config.items() if k != "quantization_config"}
        if dtype is not None:
            config = {k: v for k, v in config.items() if k != "dtype"} | {"torch_dtype": dtype}
        (folder / "config.json").write_text(config_json(config), encoding="utf-8")
    return [name for names in shards for name in names]


def _shards(
    source: Checkpoint, names: Collection[str], dtype: str | None, max_bytes: int | None
) -> list[list[str]]:
    """Names of tensors, file by file, in the order of the source."""
    kept = [[name for name in shard if name in names] for shard in source.shards]
    if max_bytes is None:
        return [shard for shard in kept if shard]
    shards: list[list[str]] = [[]]
    size = 0
    for name in (name for shard in kept for name in shard):
        own = source.tensors[name].dtype
        width = own if dtype is None or own not in DTYPES.values() else DTYPES[dtype]
        length = math.prod(source.tensors[name].shape) * width.itemsize
        if shards[-1] and size + length > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += length
    return shards


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
    return np.asarray(converted, order="C")


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
