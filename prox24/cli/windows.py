"""Tokens for the commands: windows of a file's or the package's text, and prompts."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prox24.calibration.text import (
    first_windows,
    spread_windows,
    start_tokens,
    text_or_packaged,
    tokenize,
)
from prox24.checkpoints.checkpoint import Checkpoint
from prox24.errors import PromptError, UnsupportedModelError


def calibration_windows(
    checkpoint: Checkpoint, file: Path | None, samples: int, length: int
) -> NDArray[np.int32]:
    """Windows spread over a text file, or over the speeches that the package carries.

    Raises:
      CalibrationError: the file cannot be read or is too short.
      UnsupportedModelError: config.json does not say how many tokens the model knows.
    """
    ids, start = _tokens(checkpoint, text_or_packaged(file, "speeches.txt"))
    return spread_windows(ids, samples, length, start)


def shuffled(windows: NDArray[np.int32]) -> NDArray[np.int32]:
    """Windows in an order that has nothing to do with the text's, the same every time.

    What a training sees last, and is measured on, is then not one end of the text.
    """
    return np.random.default_rng(0).permutation(windows)


def evaluation_windows(
    checkpoint: Checkpoint, file: Path | None, samples: int | None, length: int
) -> NDArray[np.int32]:
    """The first windows of a text file, or of the novel that the package carries; all if None.

    Raises:
      CalibrationError: the file cannot be read or is too short.
      UnsupportedModelError: config.json does not say how many tokens the model knows.
    """
    ids, start = _tokens(checkpoint, text_or_packaged(file, "austen.txt"))
    return first_windows(ids, samples, length, start)


def prompt_tokens(checkpoint: Checkpoint, text: str) -> NDArray[np.int32]:
    """A prompt behind the tokens that the tokenizer puts before a text, shape (1, length).

    Raises:
      CalibrationError: the tokenizer gives ids that the model has no embedding for.
      PromptError: the text has no tokens.
      UnsupportedModelError: config.json does not say how many tokens the model knows.
    """
    ids, start = _tokens(checkpoint, text)
    if not ids.size:
        raise PromptError("the prompt is empty")
    return np.concatenate([np.asarray(start, np.int32), ids])[None]


def _tokens(checkpoint: Checkpoint, text: str) -> tuple[NDArray[np.int32], list[int]]:
    vocabulary = checkpoint.config.get("vocab_size")
    if type(vocabulary) is not int:
        raise UnsupportedModelError(f"{checkpoint.path}: config.json has no vocab_size, an integer")
    tokenizer = checkpoint.load_tokenizer()
    return tokenize(tokenizer, text, vocabulary), start_tokens(tokenizer, vocabulary)
