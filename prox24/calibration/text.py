"""Text to windows of token ids."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedTokenizerBase

from prox24.errors import CalibrationError


def read_text(path: Path) -> str:
    """Reads a UTF-8 file, naming it in the error where that fails.

    Raises:
      CalibrationError: the file is missing or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {error.start})") from error


def packaged_text(name: str) -> str:
    """A text of the package's data folder: "speeches.txt" or "austen.txt"."""
    return (resources.files("prox24") / "data" / name).read_text(encoding="utf-8")


def text_or_packaged(path: Path | None, name: str) -> str:
    """The text of a file, or the package's text of that name where no file is given.

    Raises:
      CalibrationError: the file is missing or is not UTF-8.
    """
    return packaged_text(name) if path is None else read_text(path)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, vocab_size: int) -> NDArray[np.int32]:
    """Token ids of a text, without special tokens.

    Raises:
      CalibrationError: the tokenizer gives ids that the model has no embedding for.
    """
    ids = np.asarray(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32
    )
    _check_ids(ids, vocab_size)
    return ids


def start_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """The ids that the tokenizer puts before a text, as `<bos>` of Llama and Gemma; often none.

    Raises:
      CalibrationError: the tokenizer gives ids that the model has no embedding for, or encodes a
        letter differently behind what it puts before.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for i in range(len(whole)):
        if whole[i : i + len(plain)] == plain:
            _check_ids(whole[:i], vocab_size)
            return whole[:i]
    raise CalibrationError(f"the tokenizer encodes 'a' as {plain}, and as {whole} at the start")


def _check_ids(ids: ArrayLike, vocab_size: int) -> None:
    largest = np.max(ids, initial=0)
    if largest >= vocab_size:
        raise CalibrationError(
            f"the tokenizer gives id {largest} but the model has {vocab_size} embeddings"
        )


def first_windows(
    ids: NDArray[np.int32], windows: int | None, length: int, start: Sequence[int] = ()
) -> NDArray[np.int32]:
    """The first windows that do not overlap, shape (windows, length); all that are whole if None.

    Each begins with the `start` tokens, which count towards its length.

    Raises:
      CalibrationError: there are too few tokens; says how many are needed.
    """
    own = length - len(start)
    needed = own * (windows or 1)
    if own < 1:
        raise CalibrationError(f"windows of {length} have no room beside {len(start)} start tokens")
    if ids.size < needed:
        raise CalibrationError(
            f"the text has {ids.size} tokens, but {windows or 1} windows of {length} need {needed}"
        )
    count = windows or ids.size // own
    starts = np.tile(np.asarray(start, np.int32), (count, 1))
    return np.concatenate([starts, ids[: count * own].reshape(count, own)], axis=1)


def spread_windows(
    ids: NDArray[np.int32], windows: int, length: int, start: Sequence[int] = ()
) -> NDArray[np.int32]:
    """Windows that do not overlap, spread evenly over the text, shape (windows, length).

    No randomness: the same text, number and length give the same windows.

    Raises:
      CalibrationError: there are too few tokens; says how many are needed.
    """
    enough = ids.size >= windows * (length - len(start))
    # Raises for so many windows where the text is too short.
    available = first_windows(ids, None if enough else windows, length, start)
    return available[np.linspace(0, len(available) - 1, windows).round().astype(int)]
