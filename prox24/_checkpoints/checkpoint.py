"""A model in any format: its config, its tensors, which are read on demand, and its tokenizer."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from prox24._checkpoints import (
    flax_file,
    float8,
    gguf_file,
    hf_folder,
    hub,
    pickle_file,
    safetensors_file,
)
from prox24._checkpoints.tensors import TensorSource, is_finite
from prox24._models.families import config_from_hf, with_names_of
from prox24._models.spec import Config, outer_tensor, tensor_shapes
from prox24.errors import CheckpointError, first_line

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes of written checkpoints, by HF's names."""

FORMATS = (safetensors_file.FILES, pickle_file.FILES, flax_file.FILES)
"""The formats of weights in an HF folder, the preferred format first."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    The model does not compute with the tensors in `buffers`. Their values are not checked: a mask
    of -1e9 is -inf in float16.
    """

    path: Path  # the opened folder or file
    config: dict[str, Any]  # HF's config.json
    tensors: Mapping[str, TensorSource]  # by HF's names
    shards: list[list[str]]  # names of tensors in the order of writing, file by file
    load_tokenizer: Callable[[], PreTrainedTokenizerBase]
    carried: list[Path]  # files of the source to copy to an output without a change
    buffers: frozenset[str] = frozenset()
    decoder: Config | None = None  # for models with a forward pass here
    described_by: str | None = None  # the source of names and shapes if there are no weights
    pruned_dtype: str | None = None  # default dtype of `prune`; None for each tensor's own
    card_metadata: dict[str, Any] = dataclasses.field(default_factory=dict)  # stored in a GGUF

    def read(self, name: str) -> NDArray[Any]:
        """The values of a tensor, in the dtype of the file; finite unless it is a buffer."""
        values = self.tensors[name].read()
        if name not in self.buffers and not is_finite(values):
            raise CheckpointError(f"{self.path}: tensor {name} holds NaN or Inf")
        return values


def open_checkpoint(path: str | Path, *, any_family: bool = False) -> Checkpoint:
    """Opens a model and checks names, shapes and dtypes.

    The path is a folder, a file that ends in .gguf, or an id of the hub: "owner/name" or
    "owner/name@revision". A folder has config.json and weights as safetensors, PyTorch's .bin or
    Flax's msgpack, in one file or with an index of shards. With `any_family`, a model in a folder
    needs no forward pass here. Its tensors are then not checked.

    Raises:
      CheckpointError: something is missing, truncated, of a wrong shape or of an unsupported
        dtype; the message names the file or the tensor.
      UnsupportedModelError: the architecture, or one of its settings, has no forward pass here.
    """
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        return _open_gguf(path)
    if path.is_dir():
        return _open_folder(path, any_family)
    if not path.exists() and hub.is_id(path.as_posix()):
        return _open_folder(hub.download(path.as_posix(), FORMATS), any_family)
    raise CheckpointError(f"{path} is neither a folder, nor a .gguf file, nor an id of the hub")


def open_described(path: str | Path) -> Checkpoint:
    """Opens a model for its names, shapes and dtypes; no weights are downloaded.

    Without weights on this machine it differs from `open_checkpoint`. A model of the hub outside
    the local cache is described by the headers of its safetensors files. A folder without weights,
    or a model of the hub without safetensors files, is described by its config.json. The dtype is
    float32 if config.json has none. Reading a tensor then raises CheckpointError.
    """
    path = Path(path)
    if path.is_dir() and not any(files.are_in(path) for files in FORMATS):
        return _open_folder(path, False, lambda: [])
    if not path.exists() and hub.is_id(path.as_posix()):
        folder = hub.snapshot(path.as_posix(), ["config.json"])
        if hf_folder.is_whole(folder, FORMATS):
            return _open_folder(folder, False)
        return _open_folder(folder, False, lambda: hub.headers(path.as_posix(), folder.name))
    return open_checkpoint(path)


def stop_tokens(checkpoint: Checkpoint) -> list[int]:
    """The ids that end a text, from generation_config.json, or else from config.json."""
    path = checkpoint.path / "generation_config.json"
    found = hf_folder.read_json(path).get("eos_token_id") if path.exists() else None
    given = checkpoint.config.get("eos_token_id") if found is None else found
    if given is None:
        return []
    ids = given if isinstance(given, list) else [given]
    if not all(type(token) is int for token in ids):
        raise CheckpointError(f"{checkpoint.path}: eos_token_id {given!r} is no id or list of ids")
    return ids


def _open_folder(
    path: Path,
    any_family: bool,
    describe: Callable[[], list[dict[str, TensorSource]]] | None = None,
) -> Checkpoint:
    config = hf_folder.read_json(path / "config.json")
    # An unknown model raises its error before its files are opened.
    model = None if any_family else config_from_hf(config)
    _check_quantization(path, config)
    described_by = None
    if describe is None:
        shards = hf_folder.open_shards(path, FORMATS)
    elif shards := describe():
        described_by = "headers on the hub"
    else:
        shards, described_by = [_of_config(path, config)], "config.json"
    if model is not None and model.head.tied:
        model, shards = _with_stored_head(model, shards, are_read=described_by is None)
    tensors = {name: source for shard in shards for name, source in shard.items()}
    model = None if model is None else with_names_of(model, tensors)
    shapes = tensor_shapes(model) if model else {}
    # A tensor of the computation may have a second name, such as a tied head. It is left out.
    used = {id(source) for name, source in tensors.items() if name in shapes}
    tensors = {name: x for name, x in tensors.items() if name in shapes or id(x) not in used}
    own = DTYPES.get(_dtype_of(config), DTYPES["bfloat16"])
    tensors = float8.dequantise(path, config, tensors, own)
    # Old models with attention of GPT-J or GPT-Neo hold a mask of -1e9.
    buffers = frozenset(name for name in tensors if name.endswith(".masked_bias"))
    if model:
        # A stored tied head is a copy of the embedding, and must remain equal to it.
        head = outer_tensor(model.names, "lm_head.weight")
        buffers = frozenset(tensors.keys() - shapes.keys() - {head})

    @functools.cache
    def load_tokenizer() -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        try:
            # Code in the folder is never run, and transformers does not ask about it.
            return AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # its type depends on the missing file
            reason = first_line(error)
            if not any(path.glob("*token*")) and not any(path.glob("vocab*")):
                reason = "the folder has no tokenizer files: save the tokenizer into it"
            raise CheckpointError(f"{path}: the tokenizer cannot be loaded: {reason}") from error

    checkpoint = Checkpoint(
        path=path,
        config=config,
        tensors=tensors,
        shards=[[name for name in shard if name in tensors] for shard in shards],
        load_tokenizer=load_tokenizer,
        carried=hf_folder.carried_files(path),
        buffers=buffers,
        decoder=model,
        described_by=described_by,
    )
    _check_tensors(checkpoint, shapes)
    return checkpoint


def _with_stored_head(
    model: Config, shards: list[dict[str, TensorSource]], are_read: bool
) -> tuple[Config, list[dict[str, TensorSource]]]:
    """The decoder and the tensors of a tied model whose files may have a head.

    As in transformers, a head with other values than the embedding is not tied, and a head without
    an embedding is the embedding.
    """
    tensors = {name: source for shard in shards for name, source in shard.items()}
    names = with_names_of(model, tensors).names
    head, embedding = (outer_tensor(names, f"{one}.weight") for one in ("lm_head", "embed_tokens"))
    if head in tensors and embedding not in tensors:
        renamed = {head: embedding}
        return model, [{renamed.get(name, name): shard[name] for name in shard} for shard in shards]
    if are_read and head in tensors and tensors[head] is not tensors[embedding]:
        values, others = tensors[head].read(), tensors[embedding].read()
        if not np.array_equal(values, others):
            return model._replace(head=model.head._replace(tied=False)), shards
    return model, shards


def _dtype_of(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype"))


def _of_config(path: Path, config: Mapping[str, Any]) -> dict[str, TensorSource]:
    """The tensors of the model's computation, in the dtype of its config."""
    name = _dtype_of(config)
    # A dequantised tensor becomes bfloat16 if the config has no dtype, see `_open_folder`.
    default = "float32" if config.get("quantization_config") is None else "bfloat16"
    dtype = DTYPES.get(default if name == "None" else name)
    if dtype is None:
        raise CheckpointError(
            f"{path / 'config.json'} has dtype {name}; supported are {', '.join(DTYPES)}"
        )
    shapes = tensor_shapes(config_from_hf(config))
    return {tensor: TensorSource(shape, dtype) for tensor, shape in shapes.items()}


def _check_quantization(path: Path, config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{path}: the quantization_config of config.json is no JSON object")
    if quantization.get("quant_method") != "fp8":
        raise CheckpointError(
            f"{path}: the weights are quantised ({quantization.get('quant_method')}), "
            "which is read for fp8 only; dequantise the model first"
        )


def _open_gguf(path: Path) -> Checkpoint:
    found = gguf_file.open_gguf(path)
    shards = [list(found.tensors)]
    checkpoint = Checkpoint(path, **found._asdict(), shards=shards, carried=[])
    _check_tensors(checkpoint, tensor_shapes(found.decoder))
    return checkpoint


def _check_tensors(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
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
