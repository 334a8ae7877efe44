"""What every format is read into: a config, tensors that are read when asked for, a tokenizer."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prox24.checkpoints import gguf_file, hf_folder
from prox24.checkpoints.tensors import TensorSource
from prox24.errors import CheckpointError
from prox24.models.registry import family_of

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes that checkpoints are written in, by HF's names."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    Attributes:
      path: the folder or file that was opened.
      config: HF's config.json as a dict.
      tensors: by HF's names; nothing is read until `read` is called.
      shards: file names in the order of writing, each with its tensors.
      load_tokenizer: builds the tokenizer.
      carried: files of the source that are copied to an output as they are.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorSource]
    shards: Mapping[str, list[str]]
    load_tokenizer: Callable[[], PreTrainedTokenizerBase]
    carried: list[Path]

    def read(self, name: str) -> NDArray[Any]:
        """The values of a tensor, in the dtype of the file.

        Raises:
          CheckpointError: the tensor cannot be read, or holds NaN or Inf.
        """
        values = self.tensors[name].read()
        if not np.isfinite(values.astype(np.float32)).all():
            raise CheckpointError(f"{self.path}: tensor {name} holds NaN or Inf")
        return values


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens an HF folder with safetensors, or a GGUF file, and checks names, shapes and dtypes.

    Args:
      path: a folder with config.json and model.safetensors (or the index of a sharded one), or a
        file that ends in .gguf.

    Returns:
      A `Checkpoint` whose tensors are those the model's family computes with, and no fewer.

    Raises:
      CheckpointError: something is missing, truncated, of a wrong shape or of an unsupported
        dtype; the message names the file or the tensor.
      UnsupportedModelError: the architecture, or a setting of it, has no forward pass here.
    """
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        checkpoint = _open_gguf(path)
    elif path.is_dir():
        checkpoint = _open_folder(path)
    else:
        raise CheckpointError(f"{path} is neither a folder nor a .gguf file")
    _check_tensors(checkpoint)
    return checkpoint


def _open_folder(path: Path) -> Checkpoint:
    config = hf_folder.read_json(path / "config.json")
    family_of(config)
    shards = hf_folder.open_shards(path)
    tensors = {name: source for shard in shards.values() for name, source in shard.items()}

    def load_tokenizer() -> PreTrainedTokenizerBase:
        try:
            return AutoTokenizer.from_pretrained(path, local_files_only=True)
        except Exception as error:  # transformers raises a different type for each missing file
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{path}: the tokenizer cannot be loaded: {reason}") from error

    return Checkpoint(
        path=path,
        config=config,
        tensors=tensors,
        shards={name: list(shard) for name, shard in shards.items()},
        load_tokenizer=load_tokenizer,
        carried=hf_folder.carried_files(path),
    )


def _open_gguf(path: Path) -> Checkpoint:
    contents = gguf_file.open_gguf(path)
    return Checkpoint(
        path=path,
        config=contents.config,
        tensors=contents.tensors,
        shards={"model.safetensors": list(contents.tensors)},
        load_tokenizer=contents.load_tokenizer,
        carried=[],
    )


def _check_tensors(checkpoint: Checkpoint) -> None:
    family = family_of(checkpoint.config)
    for name, shape in family.tensor_shapes(family.config_from_hf(checkpoint.config)).items():
        if name not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.path}: tensor {name} is missing")
        source = checkpoint.tensors[name]
        if source.shape != shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} has shape {source.shape}, "
                f"config.json says {shape}"
            )
        if source.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} has dtype {source.dtype}; "
                f"supported are {', '.join(DTYPES)}"
            )


def config_json(config: Mapping[str, Any]) -> str:
    """The text of a config.json."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"
