"""The model card of an output, README.md: the card of the source, and a section on the job."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from prox24._checkpoints import hub
from prox24._checkpoints.checkpoint import Checkpoint
from prox24._checkpoints.tensors import writing
from prox24.errors import CheckpointError, DiskError, first_line

CARD = "README.md"
NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")  # of a model on the hub; old ones have no owner

# Without it, huggingface_hub logs a warning.
NO_METADATA = "---\n\n---\n"


def source_card(source: str | Path, checkpoint: Checkpoint) -> ModelCard:
    """The card of a source, or a card of the metadata in a GGUF, with the metadata of an output.

    The base model is the source if it is an id of the hub. Otherwise it is the base model in the
    source's card or config. Evaluation results are left out, since they hold for the source only.
    `base_model_relation` is left out too: the hub has no relation for a pruned model.

    Raises:
      CheckpointError: the metadata cannot be read. The message names the file.
      DiskError: the file cannot be read.
    """
    file = next((path for path in checkpoint.carried if path.name == CARD), None)
    try:
        content = b"" if file is None else file.read_bytes()
    except OSError as error:
        raise DiskError(f"cannot read {file}: {error.strerror}") from error
    text = content.decode("utf-8-sig", "surrogateescape")  # keeps all bytes, also invalid UTF-8
    if not text.lstrip().startswith("---"):
        text = NO_METADATA + text
    try:
        card = ModelCard(text, ignore_metadata_errors=True)  # errors of results do not matter here
    except Exception as error:  # by PyYAML, or for keys that are not names
        raise CheckpointError(
            f"the metadata of {file} cannot be read ({first_line(error)}); mend or remove the file"
        ) from error
    data: Any = card.data
    # Only a GGUF stores metadata, and it has no other card.
    for name, value in checkpoint.card_metadata.items():
        data[name] = value
    if data.eval_results is not None:
        data.eval_results = data.model_name = None
    data.pop("base_model_relation")
    tags = data.get("tags")
    # YAML reads "- arxiv: 2501.18015" as a mapping, which is no tag.
    data["tags"] = [
        tag for tag in (tags if isinstance(tags, list) else [tags]) if isinstance(tag, str)
    ]
    data.base_model = _base_model(source, checkpoint.config, data.base_model)
    data.language = _with_norwegian(data.language)
    data.library_name = "transformers"
    return card


def write_card(folder: Path, card: ModelCard, tags: Iterable[str], section: str) -> None:
    """Writes a card with more tags, and with a section of Markdown at its end."""
    card.data["tags"] = list(dict.fromkeys([*card.data["tags"], "prox24", *tags]))
    card.text = f"{card.text}\n{section}" if card.text else section
    with writing(folder / CARD):
        (folder / CARD).write_bytes(str(card).encode("utf-8", "surrogateescape"))


def _base_model(source: str | Path, config: dict[str, Any], of_card: Any) -> Any:
    given = Path(source)
    if not given.exists() and hub.is_id(given.as_posix()):
        return given.as_posix().partition("@")[0]
    names = of_card if isinstance(of_card, list) else [of_card]
    # Training scripts may write local paths there.
    if names and all(isinstance(name, str) and NAME.fullmatch(name) for name in names):
        return of_card
    own = config.get("_name_or_path")
    return own if isinstance(own, str) and hub.is_id(own) else None


def _with_norwegian(language: Any) -> Any:
    """The languages with "no" for False: YAML 1.1 reads no, the code of Norwegian, as false."""
    if isinstance(language, list):
        return [_with_norwegian(each) for each in language]
    return "no" if language is False else language
