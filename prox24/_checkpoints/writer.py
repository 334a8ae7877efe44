"""Writes HF folders, complete or not at all."""

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from prox24._checkpoints import flax_file, safetensors_file
from prox24._checkpoints.checkpoint import DTYPES, Checkpoint, config_json
from prox24._checkpoints.hf_folder import WeightFiles, carried_files
from prox24._checkpoints.tensors import Put, TensorSource, byte_count, is_finite, writing
from prox24._checkpoints.unfinished import (
    Unfinished,
    Written,
    check_replaceable,
    check_unchanged,
    sha256,
    source_files,
    unfinished_folder,
    work_folder,
)
from prox24._models.spec import tensor_shapes
from prox24.errors import CheckpointError, DiskError, first_line

Replacement = TypeVar("Replacement", bound=tuple[Any, ...])


class Output(NamedTuple):
    """A format to write."""

    files: WeightFiles
    names: Collection[str]  # HF's names of its tensors
    stored_name: Callable[[str, int], str]  # from HF's name and the number of axes to the index's
    create: Callable[[Path, Mapping[str, TensorSource]], contextlib.AbstractContextManager[Put]]
    remark: str  # on the speed of a model in this format


ZEROS_ARE_STORED = "zeros are stored like other weights: no runtime skips them by itself"


def _safetensors(source: Checkpoint) -> Output:
    return Output(
        files=safetensors_file.FILES,
        names=source.tensors.keys(),
        stored_name=lambda name, dimensions: name,
        create=safetensors_file.create_file,
        remark=f"{ZEROS_ARE_STORED}; PyTorch's to_sparse_semi_structured packs a 2:4 linear",
    )


def _flax(source: Checkpoint) -> Output:
    norm, model = flax_file.norm_leaf(source.config["model_type"]), source.decoder
    return Output(
        files=flax_file.FILES,
        # Flax classes had no buffers.
        names=tensor_shapes(model).keys() if model else source.tensors.keys(),
        stored_name=lambda name, dimensions: flax_file.leaf_path(name, dimensions, norm),
        create=lambda path, specs: flax_file.create_file(path, norm),
        remark=ZEROS_ARE_STORED,
    )


OUTPUTS: dict[str, Callable[[Checkpoint], Output]] = {"safetensors": _safetensors, "flax": _flax}
"""The output formats: safetensors, and the msgpack files of transformers' Flax classes."""


def check_destination(
    destination: Path, inputs: Iterable[str | Path | None], overwrite: bool
) -> None:
    """Raises CheckpointError if writing the folder would fail or overwrite one of the inputs.

    It raises DiskError if the folder around the destination cannot be written.
    """
    if destination.name in ("", ".."):
        raise CheckpointError(f"{destination} has no name of its own; choose another destination")
    for path in (Path(given) for given in inputs if given is not None):
        if path.exists():
            check_outside(destination, path)
    if destination.is_symlink():
        raise CheckpointError(
            f"{destination} is a link to {destination.readlink()}: give the folder itself, or "
            "remove the link"
        )
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is a file; choose a folder")
    if os.path.ismount(destination):  # Path.is_mount fails on Windows with Python 3.11
        raise CheckpointError(f"{destination} is a mount point; choose a folder in it")
    check_replaceable(destination, overwrite)
    if not (folder := destination.absolute().parent).is_dir():
        raise CheckpointError(f"the folder of {destination} does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DiskError(f"cannot write {destination}: its folder cannot be written")


def check_outside(destination: Path, path: Path) -> None:
    """Raises CheckpointError if a path is, or is in, the destination or its unfinished folder.

    The path and both folders may be missing.
    """
    whole, work = path.resolve(), work_folder(destination)
    places = {destination: f"{destination}", work: f"{work}, where {destination} is made,"}
    for folder, name in places.items():
        for place in (whole, *whole.parents):
            if place == folder.resolve() or (
                place.exists() and folder.exists() and place.samefile(folder)
            ):
                raise CheckpointError(f"{name} is or holds {path}; choose another destination")


def write_checkpoint(
    source: Checkpoint,
    destination: Path,
    replaced: Iterable[tuple[str, NDArray[Any]]] = (),
    *,
    overwrite: bool = False,
    **options: Any,
) -> list[str]:
    """Writes an HF folder by `fill_folder`, with its options, and returns the tensors' names.

    The folder is written next to the destination, synchronised to disk and renamed. So the
    destination is always complete or absent.
    """
    check_destination(destination, [source.path], overwrite)
    files = source_files(source.path)
    with unfinished_folder(destination, overwrite=overwrite) as unfinished:
        written = fill_folder(source, unfinished, replaced, **options)
        check_unchanged(source.path, files)
    return list(written)


def fill_folder(
    source: Checkpoint,
    unfinished: Unfinished,
    replaced: Iterable[Replacement] = (),
    *,
    dtype: str | None = None,  # of all tensors except buffers and integers; None keeps each dtype
    max_shard_bytes: int | None = None,  # a larger tensor gets its own file; None: as the source
    file_format: str = "safetensors",  # a key of `OUTPUTS`
    on_replaced: Callable[[Written, Replacement], None] = lambda written, replacement: None,
) -> dict[str, dict[str, str]]:
    """Writes the files of an HF folder; returns "dtype" and "sha256" of their tensors by name.

    A replacement is a tuple: the name of a tensor, its new values, and any further items, which
    are ignored. It is written, and `on_replaced` is called with it, before the next replacement is
    read. Finished tensors stay. All other tensors are copied, and converted only to `dtype`. Flax
    files have no buffers.
    """
    folder = unfinished.folder
    output = OUTPUTS[file_format](source)
    specs = {name: written_spec(source, name, dtype) for name in output.names}
    sizes = {name: byte_count(spec) for name, spec in specs.items()}
    shards = _shards(source, sizes, max_shard_bytes)
    files = [folder / file for file in output.files.names(len(shards))]
    size = sum(sizes.values())
    check_space(folder, size)
    with writing(folder):
        _write_companions(source, folder, dtype)
        if len(shards) > 1:
            weight_map = {
                output.stored_name(name, len(specs[name].shape)): file.name
                for file, names in zip(files, shards, strict=True)
                for name in names
            }
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (folder / output.files.index_file).write_text(config_json(index), encoding="utf-8")
    digests = {name: entry["sha256"] for name, entry in unfinished.entries.items()}
    with contextlib.ExitStack() as opened:
        places: dict[str, tuple[Path, Put]] = {}
        for file, names in zip(files, shards, strict=True):
            with writing(file):
                put = opened.enter_context(
                    output.create(file, {name: specs[name] for name in names})
                )
            places |= {name: (file, put) for name in names if name not in digests}

        def write(name: str, values: NDArray[Any]) -> Written:
            file, put = places.pop(name)
            converted = _converted(source, name, values, specs[name].dtype)
            with writing(file):
                put(name, converted)
            digests[name] = sha256(converted)
            return Written(name, file, digests[name])

        for replacement in replaced:
            name, values = replacement[:2]
            if name not in places or values.shape != specs[name].shape:
                raise CheckpointError(
                    f"{source.path} has no place for a tensor {name} of shape {values.shape}"
                )
            on_replaced(write(name, values), replacement)
        for name in list(places):
            write(name, source.read(name))
    return {
        name: {"dtype": specs[name].dtype.name, "sha256": digests[name]}
        for names in shards
        for name in names
    }


def check_space(folder: Path, size: int) -> None:
    """Raises DiskError if a folder cannot grow to a size in bytes."""
    with writing(folder):
        if shutil.disk_usage(folder).free < size - _allocated(folder):
            raise DiskError(f"cannot write {folder}: its {size} bytes do not fit")


def _write_companions(source: Checkpoint, folder: Path, dtype: str | None) -> None:
    """Writes all files except the weights."""
    for left in carried_files(folder):  # from an earlier run, perhaps with other source files
        left.unlink()
    for carried in source.carried:
        try:
            file = carried.open("rb")
        except OSError as error:
            raise DiskError(f"cannot read {carried}: {error.strerror}") from error
        with file, (folder / carried.name).open("wb") as copy:
            shutil.copyfileobj(file, copy)
    if source.path.is_file():  # a GGUF file, which also holds the tokenizer
        tokenizer = source.load_tokenizer()
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:
            if type(error) is not Exception:  # tokenizers raises a plain Exception for a full disk
                raise
            raise DiskError(f"cannot write {folder}: {first_line(error)}") from error
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    if dtype is not None:
        config = {k: v for k, v in config.items() if k != "dtype"} | {"torch_dtype": dtype}
    (folder / "config.json").write_text(config_json(config), encoding="utf-8")


def written_spec(source: Checkpoint, name: str, dtype: str | None) -> TensorSource:
    """Shape and dtype of a tensor in the output; buffers and integers keep their dtype."""
    own = source.tensors[name]
    if not own.dtype.itemsize:
        raise CheckpointError(f"{source.path}: tensor {name} has a dtype that is not supported")
    if dtype is None or name in source.buffers or own.dtype not in DTYPES.values():
        return own
    return TensorSource(own.shape, DTYPES[dtype])


def _allocated(folder: Path) -> int:
    """The bytes on disk that the files of a folder already occupy."""
    # Windows does not count blocks.
    return sum(512 * getattr(file.stat(), "st_blocks", 0) for file in folder.iterdir())


def _shards(source: Checkpoint, sizes: Mapping[str, int], max_bytes: int | None) -> list[list[str]]:
    """Names of tensors, file by file, in the order of the source."""
    kept = [[name for name in shard if name in sizes] for shard in source.shards]
    if max_bytes is None:
        return [shard for shard in kept if shard]
    shards: list[list[str]] = [[]]
    size = 0
    for name in (name for shard in kept for name in shard):
        if shards[-1] and size + sizes[name] > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += sizes[name]
    return shards


def check_tensor(source: Checkpoint, name: str, dtype: str | None) -> None:
    """Raises CheckpointError unless a tensor can be read, is finite, and fits its new dtype."""
    _converted(source, name, source.read(name), written_spec(source, name, dtype).dtype)


def _converted(
    source: Checkpoint, name: str, values: NDArray[Any], dtype: np.dtype[Any]
) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        converted = values.astype(dtype, copy=False)
    if name not in source.buffers and not is_finite(converted):
        raise CheckpointError(f"tensor {name} overflows {dtype}; choose another dtype")
    return converted
