"""Writing HF folders that are complete or absent."""

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prox24.checkpoints import flax_file, safetensors_file
from prox24.checkpoints.checkpoint import DTYPES, Checkpoint, config_json, parameter_shapes
from prox24.checkpoints.hf_folder import WeightFiles
from prox24.checkpoints.tensors import Put, Spec, is_finite
from prox24.errors import CheckpointError


class Output(NamedTuple):
    """A format to write.

    Attributes:
      files: how they are called.
      names: of the tensors that it holds, by HF's names.
      stored_name: what a file calls a tensor, by HF's name and its number of dimensions.
      create: a file for tensors of those names, and what writes one of them to it.
    """

    files: WeightFiles
    names: Collection[str]
    stored_name: Callable[[str, int], str]
    create: Callable[[Path, Mapping[str, Spec]], contextlib.AbstractContextManager[Put]]


def _safetensors(source: Checkpoint) -> Output:
    return Output(
        files=safetensors_file.FILES,
        names=source.tensors.keys(),
        stored_name=lambda name, dimensions: name,
        create=safetensors_file.create_file,
    )


def _flax(source: Checkpoint) -> Output:
    norm = flax_file.norm_leaf(source.config["model_type"])
    return Output(
        files=flax_file.FILES,
        # Flax classes had no buffers.
        names=parameter_shapes(source.config, source.tensors).keys(),
        stored_name=lambda name, dimensions: flax_file.leaf_path(name, dimensions, norm),
        create=lambda path, specs: flax_file.create_file(path, norm),
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
    replaced: Iterable[tuple[str, NDArray[Any]]] = (),
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
      replaced: names and new values of tensors, each of which is written before the next is asked
        for; the others are copied bit for bit.
      dtype: "float32", "float16" or "bfloat16" for every tensor; None keeps each tensor's own.
      overwrite: replaces an existing folder, which stays until the new one is complete.
      max_shard_bytes: of the tensors in one file, unless a single one is larger; None keeps
        together what is in one file of the source.
      file_format: one of `OUTPUTS`.
      note: Markdown that is appended to the model card, README.md.

    Returns:
      The names of the tensors that were written: all, but for the buffers that Flax files lack.

    Raises:
      CheckpointError: the destination exists, the source cannot be read, the disk is full or fails,
        or `replaced` holds a name twice, or one or a shape that the source has not.
      UnsupportedModelError: there is no Flax class for the model.
    """
    check_destination(destination, source.path, overwrite)
    output = OUTPUTS[file_format](source)
    specs = {name: _spec(source, name, dtype) for name in output.names}
    shards = _shards(source, specs, max_shard_bytes)
    files = output.files.names(len(shards))
    with _complete_or_absent(destination) as folder:
        size = sum(map(_bytes, specs.values()))
        if shutil.disk_usage(folder).free < size:
            raise CheckpointError(f"cannot write {destination}: its {size} bytes do not fit")
        _write_companions(source, folder, dtype, note)
        if len(shards) > 1:
            weight_map = {
                output.stored_name(name, len(specs[name].shape)): file
                for file, names in zip(files, shards, strict=True)
                for name in names
            }
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (folder / output.files.index_file).write_text(config_json(index), encoding="utf-8")
        with contextlib.ExitStack() as opened:
            puts: dict[str, Put] = {}
            for file, names in zip(files, shards, strict=True):
                own = {name: specs[name] for name in names}
                put = opened.enter_context(output.create(folder / file, own))
                puts |= dict.fromkeys(names, put)
            for name, values in replaced:
                if name not in puts or values.shape != specs[name].shape:
                    raise CheckpointError(
                        f"{source.path} has no place for a tensor {name} of shape {values.shape}"
                    )
                puts.pop(name)(name, _converted(name, values, specs[name].dtype))
            for name, put in puts.items():
                put(name, _converted(name, source.read(name), specs[name].dtype))
    return [name for names in shards for name in names]


def _write_companions(
    source: Checkpoint, folder: Path, dtype: str | None, note: str | None
) -> None:
    """Everything but the weights."""
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


def _spec(source: Checkpoint, name: str, dtype: str | None) -> Spec:
    """Of a tensor as it is written; integer buffers, which nothing is computed with, stay."""
    own = source.tensors[name]
    if not own.dtype.itemsize:
        raise CheckpointError(f"{source.path}: tensor {name} has a dtype that is not supported")
    if dtype is None or own.dtype not in DTYPES.values():
        return Spec(own.shape, own.dtype)
    return Spec(own.shape, DTYPES[dtype])


def _bytes(spec: Spec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize


def _shards(
    source: Checkpoint, specs: Mapping[str, Spec], max_bytes: int | None
) -> list[list[str]]:
    """Names of tensors, file by file, in the order of the source."""
    kept = [[name for name in shard if name in specs] for shard in source.shards]
    if max_bytes is None:
        return [shard for shard in kept if shard]
    shards: list[list[str]] = [[]]
    size = 0
    for name in (name for shard in kept for name in shard):
        length = _bytes(specs[name])
        if shards[-1] and size + length > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += length
    return shards


def _converted(name: str, values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        converted = values.astype(dtype, copy=False)
    if not is_finite(converted):
        raise CheckpointError(f"tensor {name} overflows {dtype}; choose another dtype")
    return converted


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
