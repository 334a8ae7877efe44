"""Models of the Hugging Face hub by id."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import NotASafetensorsRepoError
from huggingface_hub.utils import validate_repo_id

from prox24._checkpoints import safetensors_file
from prox24._checkpoints.hf_folder import WeightFiles
from prox24._checkpoints.tensors import TensorSource
from prox24.errors import CheckpointError, Prox24Error, first_line

ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\S+)?")

# The files next to the weights: configs, tokenizers, licences, the model card. No code.
OTHER_FILES = ("*.json", "*.jinja", "*.md", "*.model", "*.tiktoken", "*.txt", "LICENSE*", "NOTICE*")


def is_id(text: str) -> bool:
    """Whether a text has the form of a model's id, with or without a revision.

    Example:
      >>> is_id("owner/name"), is_id("owner/name@v1.0"), is_id("../name"), is_id("a/b/c")
      (True, True, False, False)
    """
    return ID.fullmatch(text) is not None


def download(text: str, formats: Iterable[WeightFiles]) -> Path:
    """The folder of a model in the local cache of the hub; downloads missing files.

    Its weights are in the first format that the model has. The environment variables of
    `huggingface_hub` apply: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and others.
    """
    for files in formats:
        # Variants such as model.fp16.safetensors are not downloaded.
        shards = f"{files.stem}[-_]*{files.suffix}", f"{files.single_file}-*{files.suffix}"
        folder = snapshot(text, [*OTHER_FILES, files.single_file, *shards])
        if files.are_in(folder):
            return folder
    names = ", ".join(files.single_file for files in formats)
    model, _, revision = text.partition("@")
    with _errors_of(text):  # Without the network, the hub may have weights that the cache lacks.
        HfApi().model_info(model, revision=revision or None)
    raise CheckpointError(f"{text} has no weights on the hub: none of {names}")


def headers(text: str, revision: str) -> list[dict[str, TensorSource]]:
    """The tensors of a model's safetensors files; downloads only the headers of the files.

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


def snapshot(text: str, patterns: list[str]) -> Path:
    """The folder of a model in the local cache; downloads missing files of these patterns."""
    model, _, revision = text.partition("@")
    with _errors_of(text):
        return Path(snapshot_download(model, revision=revision or None, allow_patterns=patterns))


@contextlib.contextmanager
def _errors_of(text: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each failure of the hub has another type
        raise CheckpointError(
            f"{text} is no folder or .gguf file, and cannot be had from the hub: "
            f"{first_line(error)}"
        ) from error


def check_upload(name: str) -> None:
    """Raises Prox24Error if `upload` will fail for a reason known without the network."""
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise Prox24Error(f"{name!r} is no name for a model of the hub: {error}") from error
    if "/" not in name:
        raise Prox24Error(f"{name!r} is no name for a model of the hub: write OWNER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise Prox24Error(f"{name} cannot be uploaded: HF_HUB_OFFLINE is set")
    if get_token() is None:
        raise Prox24Error(
            f"{name} cannot be uploaded without a token: run hf auth login, or set HF_TOKEN"
        )


def upload(folder: Path, name: str) -> str:
    """Uploads a complete folder as a model of the hub, and returns its address.

    A new model is public unless the settings of its owner say otherwise.

    Raises:
      Prox24Error: the upload fails. The message says how to repeat it.
    """
    api = HfApi()
    try:
        address = str(api.create_repo(name, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # each failure of the hub has another type
        raise Prox24Error(
            f"{folder} is complete, but was not uploaded: {first_line(error)}; "
            f"to try again: hf upload {name} {folder} ."
        ) from error
    return address
