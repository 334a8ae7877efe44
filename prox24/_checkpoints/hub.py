"""Models of the Hugging Face hub by id."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import NotASafetensorsRepoError

from prox24._checkpoints import safetensors_file
from prox24._checkpoints.hf_folder import WeightFiles
from prox24._checkpoints.tensors import TensorSource
from prox24.errors import CheckpointError, first_line

ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\S+)?")

# What stands beside the weights: configs, tokenizers, licences, the model card. No code.
OTHER_FILES = ("*.json", "*.jinja", "*.md", "*.model", "*.tiktoken", "*.txt", "LICENSE*", "NOTICE*")


def is_id(text: str) -> bool:
    """Whether a text has the form of a model's id, with a revision or without.

    Example:
      >>> is_id("owner/name"), is_id("owner/name@v1.0"), is_id("../name"), is_id("a/b/c")
      (True, True, False, False)
    """
    return ID.fullmatch(text) is not None


def download(text: str, formats: Iterable[WeightFiles]) -> Path:
    """The folder of a model in the local cache of the hub, downloaded where it is not there.

    It has weights in the first of the formats that the model has. The environment variables of
    `huggingface_hub` hold: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and others.
    """
    for files in formats:
        folder = _snapshot(text, [*OTHER_FILES, f"{files.stem}*{files.suffix}"])
        if files.are_in(folder):
            return folder
    names = ", ".join(files.single_file for files in formats)
    raise CheckpointError(f"{text} has no weights on the hub: none of {names}")


def config_folder(text: str) -> Path:
    """The folder of a model in the local cache; config.json is downloaded if it is not there."""
    return _snapshot(text, ["config.json"])


def headers(text: str, revision: str) -> list[dict[str, TensorSource]]:
    """The tensors of a model's safetensors files, of which the headers are downloaded.

    The list is empty if the model has no such files.
    """
    with _errors_of(text):
        try:
            model = text.partition("@")[0]
            found = HfApi().get_safetensors_metadata(model, revision=revision)
        except NotASafetensorsRepoError:
            return []
        return [
            {
                name: safetensors_file.described(Path(text, file), name, vars(entry))
                for name, entry in found.files_metadata[file].tensors.items()
                if found.weight_map.get(name) == file
            }
            for file in sorted(found.files_metadata)
        ]


def _snapshot(text: str, patterns: list[str]) -> Path:
    model, _, revision = text.partition("@")
    with _errors_of(text):
        return Path(snapshot_download(model, revision=revision or None, allow_patterns=patterns))


@contextlib.contextmanager
def _errors_of(text: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub has a different type for each failure
        raise CheckpointError(
            f"{text} is no folder or .gguf file, and cannot be had from the hub: "
            f"{first_line(error)}"
        ) from error
