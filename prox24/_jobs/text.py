"""Text to windows of token ids."""

import dataclasses
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prox24._checkpoints.checkpoint import Checkpoint
from prox24.errors import CalibrationError, PromptError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Text:
    """A text, and how many windows of tokens are taken from it.

    Attributes:
      file: UTF-8 text; None for a text of the package: speeches to calibrate or train on, a novel
        to evaluate on.
      samples: windows; None for 64 to calibrate or train on, and for all of a text to evaluate on.
      sequence_length: tokens of a window.

    Raises:
      CalibrationError: there are fewer than one window or two tokens.

    Example:
      >>> Text("a.txt", samples=128).sequence_length
      512
    """

    file: str | Path | None = None
    samples: int | None = None
    sequence_length: int = 512

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise CalibrationError(f"samples is {self.samples}; one window or more is needed")
        if self.sequence_length < 2:
            raise CalibrationError(f"sequence_length is {self.sequence_length}; 2 is the least")

    def read(self, packaged: str) -> str:
        """The text, or the package's text of that name."""
        return packaged_text(packaged) if self.file is None else read_text(Path(self.file))

    def called(self, packaged: str) -> str:
        """Its name for people."""
        return f"{packaged} of prox24" if self.file is None else str(self.file)


Windows = Text | NDArray[np.integer]
"""A text, or its tokens: integers of shape (windows, length)."""


def calibration_windows(checkpoint: Checkpoint, text: Windows) -> NDArray[np.int32]:
    """Windows spread evenly over a text; tokens that are given stay as they are."""
    if not isinstance(text, Text):
        return _checked(checkpoint, text)
    ids, start = _tokens(checkpoint, text.read(SPEECHES))
    _check_length(checkpoint, text.sequence_length)
    return spread_windows(ids, text.samples or SAMPLES, text.sequence_length, start)


def evaluation_windows(checkpoint: Checkpoint, text: Windows) -> NDArray[np.int32]:
    """The first windows of a text; tokens that are given stay as they are."""
    if not isinstance(text, Text):
        return _checked(checkpoint, text)
    ids, start = _tokens(checkpoint, text.read(NOVEL))
    _check_length(checkpoint, text.sequence_length)
    return first_windows(ids, text.samples, text.sequence_length, start)


def described(text: Windows, windows: NDArray[np.int32]) -> dict[str, Any]:
    """The text of a report on windows to calibrate or train on: its name, and their numbers."""
    name = text.called(SPEECHES) if isinstance(text, Text) else "tokens"
    count, length = windows.shape
    return {"text": name, "windows": count, "sequence_length": length, "tokens": windows.size}


def shuffled(windows: NDArray[np.int32]) -> NDArray[np.int32]:
    """Windows in an order that has nothing to do with the text's, the same every time.

    A training ends with the last windows and is measured on them: they should not be one end of
    the text.
    """
    return np.random.default_rng(0).permutation(windows)


def prompt_tokens(checkpoint: Checkpoint, text: str) -> NDArray[np.int32]:
    """A prompt behind the tokens that the tokenizer puts before a text, shape (1, length)."""
    ids, start = _tokens(checkpoint, text)
    if not ids.size:
        raise PromptError("the prompt is empty")
    return np.concatenate([np.asarray(start, np.int32), ids])[None]


def _tokens(checkpoint: Checkpoint, text: str) -> tuple[NDArray[np.int32], list[int]]:
    vocabulary, tokenizer = _vocabulary(checkpoint), checkpoint.load_tokenizer()
    return tokenize(tokenizer, text, vocabulary), start_tokens(tokenizer, vocabulary)


def _check_length(checkpoint: Checkpoint, length: int) -> None:
    positions = checkpoint.config.get("max_position_embeddings")
    if checkpoint.decoder is not None:
        positions = checkpoint.decoder.positions
    if isinstance(positions, int) and length > positions:
        raise CalibrationError(
            f"windows of {length} tokens are longer than the model's {positions} positions; "
            "take a shorter sequence_length"
        )


def _vocabulary(checkpoint: Checkpoint) -> int:
    vocabulary = checkpoint.config.get("vocab_size")
    if type(vocabulary) is not int:
        raise UnsupportedModelError(f"{checkpoint.path}: config.json has no vocab_size, an integer")
    return vocabulary


def _checked(checkpoint: Checkpoint, windows: NDArray[np.integer]) -> NDArray[np.int32]:
    windows = np.asarray(windows)
    if windows.ndim != 2 or not np.issubdtype(windows.dtype, np.integer) or windows.shape[1] < 2:
        raise CalibrationError(
            f"tokens of shape {windows.shape} and dtype {windows.dtype} are not integers of shape "
            "(windows, length)"
        )
    _check_length(checkpoint, windows.shape[1])
    vocabulary = _vocabulary(checkpoint)
    if windows.min(initial=0) < 0 or windows.max(initial=0) >= vocabulary:
        raise CalibrationError(f"tokens are not between 0 and {vocabulary - 1}")
    return windows.astype(np.int32)


SAMPLES = 64
"""Windows to calibrate or train on, by default."""

SPEECHES, NOVEL = "speeches.txt", "austen.txt"
"""Texts of the package's data folder."""


def read_text(path: Path) -> str:
    """Reads a UTF-8 file, and names it in the error where that fails."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {error.start})") from error


def packaged_text(name: str) -> str:
    """A text of the package's data folder: "speeches.txt" or "austen.txt"."""
    return (resources.files("prox24") / "data" / name).read_text(encoding="utf-8")


def tokenize(tokenizer: "PreTrainedTokenizerBase", text: str, vocab_size: int) -> NDArray[np.int32]:
    """Token ids of a text, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    _check_ids(ids, vocab_size)
    return np.asarray(ids, np.int32)


def start_tokens(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> list[int]:
    """The ids that the tokenizer puts before a text, as `<bos>` of Llama and Gemma; often none."""
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
    """
    enough = ids.size >= windows * (length - len(start))
    # Raises for so many windows where the text is too short.
    available = first_windows(ids, None if enough else windows, length, start)
    return available[np.linspace(0, len(available) - 1, windows).round().astype(int)]
