"""Token ids of a text, and windows of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prox24._checkpoints.checkpoint import Checkpoint, stop_tokens
from prox24.errors import CalibrationError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize(tokenizer: "PreTrainedTokenizerBase", text: str, vocab_size: int) -> NDArray[np.int32]:
    """Token ids of a text, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    check_ids(ids, vocab_size)
    return np.asarray(ids, np.int32)


def start_tokens(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> list[int]:
    """The tokenizer's ids before a text, such as `<bos>` of Llama and Gemma; often empty."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for i in range(len(whole)):
        if whole[i : i + len(plain)] == plain:
            check_ids(whole[:i], vocab_size)
            return whole[:i]
    raise CalibrationError(f"the tokenizer encodes 'a' as {plain}, and as {whole} at the start")


def check_ids(ids: ArrayLike, vocab_size: int) -> None:
    """Raises CalibrationError for an id of `vocab_size` or more."""
    largest = np.max(ids, initial=0)
    if largest >= vocab_size:
        raise CalibrationError(
            f"the tokenizer gives id {largest} but the model has {vocab_size} embeddings"
        )


def available_windows(
    ids: NDArray[np.int32], least: int, length: int, start: Sequence[int] = ()
) -> NDArray[np.int32]:
    """All windows without overlap, shape (windows, length); an error for fewer than `least`.

    Each window begins with the `start` tokens. They count towards its length.
    """
    own = length - len(start)
    if own < 1:
        raise CalibrationError(f"windows of {length} have no room beside {len(start)} start tokens")
    count = ids.size // own
    if count < least:
        raise CalibrationError(
            f"the text has {ids.size} tokens, but {least} windows of {length} need {least * own}: "
            "give more text, fewer windows (samples), or shorter ones"
        )
    starts = np.tile(np.asarray(start, np.int32), (count, 1))
    return np.concatenate([starts, ids[: count * own].reshape(count, own)], axis=1)


def begin_token(checkpoint: Checkpoint) -> int | None:
    """The token that begins a text, or else the end token."""
    own: int | None = checkpoint.load_tokenizer().bos_token_id
    return end_token(checkpoint) if own is None else own


def end_token(checkpoint: Checkpoint) -> int | None:
    """The token that ends a text, from the tokenizer, or else from the configs."""
    own: int | None = checkpoint.load_tokenizer().eos_token_id
    return next(iter(stop_tokens(checkpoint)), None) if own is None else own


def check_length(checkpoint: Checkpoint, length: int) -> None:
    """Raises CalibrationError if windows are longer than the model's positions."""
    config = checkpoint.config
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if checkpoint.decoder is not None:
        positions = checkpoint.decoder.positions
    if isinstance(positions, int) and length > positions:
        raise CalibrationError(
            f"windows of {length} tokens are longer than the model's {positions} positions; "
            f"take a sequence length of {positions} or less"
        )


def vocabulary_of(checkpoint: Checkpoint) -> int:
    """The number of the model's embeddings, from its config."""
    vocabulary = checkpoint.config.get("vocab_size")
    if type(vocabulary) is not int:
        raise UnsupportedModelError(f"{checkpoint.path}: config.json has no vocab_size, an integer")
    return vocabulary
