"""Models of the Hugging Face hub by id."""

import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download

from prox24._checkpoints.hf_folder import WeightFiles
from prox24.errors import CheckpointError, first_line

ID = re.compile(r"(?P<model>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\S+))?")

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
    parts = ID.fullmatch(text)
    assert parts is not None
    for files in formats:
        try:
            folder = snapshot_download(
                parts["model"],
                revision=parts["revision"],
                allow_patterns=[*OTHER_FILES, f"{files.stem}*{files.suffix}"],
            )
        except Exception as error:  # the hub has a different type for each failure
            raise CheckpointError(
                f"{text} is no folder or .gguf file, and cannot be had from the hub: "
                f"{first_line(error)}"
            ) from error
        if files.are_in(Path(folder)):
            return Path(folder)
    names = ", ".join(files.single_file for files in formats)
    raise CheckpointError(f"{text} has no weights on the hub: none of {names}")
