"""Makes windows of token ids from text."""

import dataclasses
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prox24._checkpoints.checkpoint import Checkpoint
from prox24._checkpoints.unfinished import sha256
from prox24._jobs.documents import documents, folders_within, is_dataset, is_unicode
from prox24._jobs.generated import generated_windows
from prox24._jobs.tokens import (
    available_windows,
    begin_token,
    check_ids,
    check_length,
    end_token,
    start_tokens,
    tokenize,
    vocabulary_of,
)
from prox24.errors import CalibrationError, PromptError, first_line

SAMPLES = 64
"""The default number of windows to calibrate or train on."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A text, and how windows of tokens are taken from it.

    Attributes:
      source: a file, a folder, or "hf:OWNER/NAME[#CONFIG][:SPLIT]" for a dataset of the hub; or a
        sequence of such sources. Files are UTF-8 text, records (.jsonl, .json, .csv, .tsv,
        .parquet), or token ids (.npy) of shape (windows, length). With "generate:N" the dense
        model writes N more windows. None is a text of the package: speeches to calibrate or train
        on, a novel to evaluate on.
      samples: number of windows; "generate:N" adds N to it. None takes 64 windows to calibrate
        or train on, all windows of a text to evaluate on, and all windows of a file of token ids.
      sequence_length: tokens of a window.
      field: the field of a record with a text or with the messages of a conversation. None reads
        "text", or else "messages". The tokenizer's chat template makes a text of messages.
      sampling: how windows to calibrate or train on are taken. "even" and "random" join the
        documents and cut them into windows: "even" takes windows at equal distances, "random"
        draws them. "documents" takes the beginning of each document with enough tokens. From a
        dataset of the hub, only as many documents are read as the windows need.
      seed: of the random draws, and of "generate:N".

    Raises:
      CalibrationError: a field is out of range, or sources cannot be joined.

    Example:
      >>> Text(("a.txt", "b.jsonl"), samples=128).sequence_length
      512
    """

    source: str | Path | Sequence[str | Path] | None = None
    samples: int | None = None
    sequence_length: int = 512
    field: str | None = None
    sampling: str = "even"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise CalibrationError(f"samples is {self.samples}; one window or more is needed")
        if self.sequence_length < 2:
            raise CalibrationError(f"sequence_length is {self.sequence_length}; 2 is the least")
        if self.sampling not in SAMPLINGS:
            raise CalibrationError(f"sampling {self.sampling!r} is none of {', '.join(SAMPLINGS)}")
        if self.source is not None and not (self.sources and all(self.sources)):
            raise CalibrationError(
                "the source of the text is empty: name a file, or leave it out for packaged text"
            )
        for source in self.sources:
            if len(self.sources) > 1 and is_tokens(source):
                raise CalibrationError(f"{source} cannot be joined with other texts")
            if is_generated(source) and not re.fullmatch(r"generate:[1-9]\d*", source):
                raise CalibrationError(f"{source} is not of the form generate:WINDOWS")
        written = [source for source in self.sources if is_generated(source)]
        if len(written) > 1:
            raise CalibrationError(f"{' and '.join(written)}: give generate:WINDOWS once")
        if written and written == self.sources and self.samples is not None:
            raise CalibrationError(
                f"samples counts windows of other texts than {written[0]}: leave it out, or name a "
                "text"
            )

    @property
    def sources(self) -> list[str]:
        """The sources as a list; empty for a text of the package."""
        if isinstance(self.source, str | Path):
            return [str(self.source)]
        return [str(source) for source in self.source or ()]

    @property
    def written(self) -> int:
        """The number of windows that the model writes."""
        return sum(int(x.partition(":")[2]) for x in self.sources if is_generated(x))

    @property
    def given(self) -> "Text | None":
        """The text without the windows that the model writes; None if it writes all."""
        sources = [source for source in self.sources if not is_generated(source)]
        if self.sources and not sources:
            return None
        return dataclasses.replace(self, source=sources or None)

    @property
    def files(self) -> list[Path]:
        """The files and folders among the sources."""
        return [Path(x) for x in self.sources if not is_dataset(x) and not is_generated(x)]

    def called(self, packaged: str, *, published: bool = False) -> str:
        """The name of the text; if `published`, without folders of this machine."""

        def name(source: str) -> str:
            local = not is_dataset(source) and not is_generated(source)
            return Path(source).absolute().name if published and local else source

        return ", ".join(map(name, self.sources)) if self.sources else f"{packaged} of prox24"


SAMPLINGS = ("even", "random", "documents")

Windows = Text | NDArray[np.integer]
"""A text, or its tokens: integers of shape (windows, length)."""


def shape_of(text: Text) -> tuple[int, int]:
    """Windows to calibrate or train on, and their length. Only a file of token ids is read."""
    source = next(iter(text.sources), "")
    if is_tokens(source):
        count, length = (*_array(source).shape, 1, 1)[:2]  # Other errors come with the windows.
        return text.samples or count, length
    given = 0 if text.given is None else text.samples or SAMPLES
    return text.written + given, text.sequence_length


def is_generated(source: str) -> bool:
    """Whether the dense model writes the text."""
    return source.startswith("generate:")


def is_tokens(source: str) -> bool:
    """Whether a file has token ids."""
    return source.endswith(".npy")


def files_of_text(text: Windows) -> list[Path]:
    """The files and folders of a text."""
    return text.files if isinstance(text, Text) else []


def check_unread(path: Path, text: Windows) -> None:
    """Raises CalibrationError if a path is in a folder of the text: a later run would read it."""
    own = path.resolve()
    for folder in filter(Path.is_dir, files_of_text(text)):
        # A linked folder may be anywhere.
        if any(own.is_relative_to(place.resolve()) for place in folders_within(folder)):
            raise CalibrationError(
                f"{path} is in {folder}, which is read as text: choose another place"
            )


def calibration_windows(
    checkpoint: Checkpoint, text: Windows, *, held_out: bool = False, quiet: bool = True
) -> NDArray[np.int32]:
    """Windows to calibrate or train on; given token ids are checked and returned.

    With `held_out`, windows of a text come in a fixed random order: the last ones, which measure a
    training, should come from the whole text. A text that the model writes takes time. It shows a
    progress bar unless it is `quiet`.
    """
    if not isinstance(text, Text):
        return _checked(checkpoint, text)
    parts = [] if text.given is None else [_given_windows(checkpoint, text.given)]
    if text.written:  # Errors in the other sources come first.
        parts.append(_written_windows(checkpoint, text, quiet))
    windows = np.concatenate(parts)
    return np.random.default_rng(0).permutation(windows) if held_out else windows


def _written_windows(checkpoint: Checkpoint, text: Text, quiet: bool) -> NDArray[np.int32]:
    """Windows that the dense model writes."""
    count, length = text.written, text.sequence_length
    check_length(checkpoint, length)
    first = begin_token(checkpoint)
    if first is None:
        raise CalibrationError(
            f"generate:{count}: the model has no token to begin or end a text with"
        )
    check_ids(first, vocabulary_of(checkpoint))
    return generated_windows(checkpoint, first, count, length, text.seed, quiet=quiet)


def _given_windows(checkpoint: Checkpoint, text: Text) -> NDArray[np.int32]:
    """Windows of the sources of a text."""
    samples, length, source = text.samples, text.sequence_length, next(iter(text.sources), "")
    if is_tokens(source):
        available = _of_file(checkpoint, source, samples)
        return available if samples is None else _sampled(available, samples, text)
    check_length(checkpoint, length)
    samples = samples or SAMPLES
    start = _start(checkpoint)
    own = length - len(start)
    if text.sampling != "documents":
        ids = _joined(checkpoint, _tokens(checkpoint, text, SPEECHES, start, samples * own))
        return _sampled(available_windows(ids, samples, length, start), samples, text)
    every = _tokens(checkpoint, text, SPEECHES, start, samples, own)
    long = [ids[:own] for ids in every if ids.size >= own]
    if len(long) < samples:
        raise CalibrationError(
            f"{len(long)} of {len(every)} documents have {own} tokens or more, and {samples} "
            "windows are asked for: take fewer, shorter ones, or another sampling"
        )
    return _sampled(available_windows(np.concatenate(long), samples, length, start), samples, text)


def evaluation_windows(checkpoint: Checkpoint, text: Windows) -> NDArray[np.int32]:
    """The first windows of a text; given token ids are checked and returned."""
    if not isinstance(text, Text):
        return _checked(checkpoint, text)
    samples, length, source = text.samples, text.sequence_length, next(iter(text.sources), "")
    if is_tokens(source):
        return _of_file(checkpoint, source, samples)[:samples]
    if text.written:
        raise CalibrationError(
            f"generate:{text.written} is to calibrate on; evaluate on a text of others"
        )
    check_length(checkpoint, length)
    start = _start(checkpoint)
    needed = None if samples is None else samples * (length - len(start))
    ids = _joined(checkpoint, _tokens(checkpoint, text, NOVEL, start, needed))
    return available_windows(ids, samples or 1, length, start)[:samples]


def described(
    text: Windows, windows: NDArray[np.int32], *, published: bool = False
) -> dict[str, Any]:
    """A description of a calibration or training text: its name, numbers and hash.

    A report has the name on this machine. With `published`, for the manifest and the card, the name
    has no folders.
    """
    name = text.called(SPEECHES, published=published) if isinstance(text, Text) else "tokens"
    count, length = windows.shape
    return {
        "text": name,
        "windows": count,
        "sequence_length": length,
        "tokens": windows.size,
        "sha256": sha256(windows),
    }


def prompt_tokens(checkpoint: Checkpoint, text: str) -> NDArray[np.int32]:
    """The ids of a prompt, after the tokenizer's start tokens, shape (1, length)."""
    if not is_unicode(text):
        raise PromptError("the prompt is not UTF-8 text")
    ids = tokenize(checkpoint.load_tokenizer(), text, vocabulary_of(checkpoint))
    if not ids.size:
        raise PromptError("the prompt is empty")
    return np.concatenate([np.asarray(_start(checkpoint), np.int32), ids])[None]


def _start(checkpoint: Checkpoint) -> list[int]:
    return start_tokens(checkpoint.load_tokenizer(), vocabulary_of(checkpoint))


def _tokens(
    checkpoint: Checkpoint,
    text: Text,
    packaged: str,
    start: Sequence[int],
    needed: int | None,
    least: int | None = None,
) -> list[NDArray[np.int32]]:
    """The ids of each document, without start tokens.

    A dataset of the hub is read only until its documents have `needed` tokens. With `least`, it is
    read until `needed` documents have `least` tokens or more.
    """
    tokenizer, vocabulary = checkpoint.load_tokenizer(), vocabulary_of(checkpoint)

    def chat(messages: list[dict[str, Any]]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    if not text.sources:
        return [tokenize(tokenizer, packaged_text(packaged), vocabulary)]
    every = []
    for source in text.sources:
        found = 0
        for document in documents(source, text.field, chat):
            ids = tokenize(tokenizer, document, vocabulary)
            if start and ids[: len(start)].tolist() == list(start):  # from a chat template
                ids = ids[len(start) :]
            if not ids.size:  # The end token would follow an end token.
                continue
            every.append(ids)
            found += ids.size if least is None else ids.size >= least
            if needed is not None and found >= needed and is_dataset(source):
                break
    return every


def _joined(checkpoint: Checkpoint, every: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    """The documents in one array, with the end token between them."""
    end = end_token(checkpoint)
    between = np.asarray([] if end is None else [end], np.int32)
    if len(every) > 1:
        check_ids(between, vocabulary_of(checkpoint))
    parts = [part for ids in every for part in (between, ids)]
    return np.concatenate([np.zeros(0, np.int32), *parts[1:]])


def _sampled(available: NDArray[np.int32], samples: int, text: Text) -> NDArray[np.int32]:
    if text.sampling == "random":
        rng = np.random.default_rng(text.seed)
        return available[np.sort(rng.choice(len(available), samples, replace=False))]
    return available[np.linspace(0, len(available) - 1, samples).round().astype(int)]


def _of_file(checkpoint: Checkpoint, source: str, samples: int | None) -> NDArray[np.int32]:
    """All windows of a file of token ids; raises CalibrationError for fewer than `samples`."""
    found = _checked(checkpoint, _array(source), source)
    if len(found) < (samples or 1):
        raise CalibrationError(f"{source} has {len(found)} windows, fewer than {samples or 1}")
    return found


def _array(path: str) -> NDArray[Any]:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise CalibrationError(f"cannot read {path}: {reason}") from error
    if not isinstance(found, np.ndarray):
        raise CalibrationError(f"{path} is no array of numpy")
    return found


def _checked(checkpoint: Checkpoint, windows: Any, name: str = "tokens") -> NDArray[np.int32]:
    if isinstance(windows, str | Path):
        raise CalibrationError(f"the text is a path: give prox24.Text({str(windows)!r})")
    windows = np.asarray(windows)
    integers = np.issubdtype(windows.dtype, np.integer)
    if not integers or windows.ndim != 2 or windows.shape[1] < 2 or not len(windows):
        raise CalibrationError(
            f"{name}: shape {windows.shape} and dtype {windows.dtype}; integers of shape (windows, "
            "length) are needed, one window or more of length 2 or more"
        )
    check_length(checkpoint, windows.shape[1])
    vocabulary = vocabulary_of(checkpoint)
    if windows.min(initial=0) < 0 or windows.max(initial=0) >= vocabulary:
        raise CalibrationError(f"{name}: ids are not between 0 and {vocabulary - 1}")
    return windows.astype(np.int32)


SPEECHES, NOVEL = "speeches.txt", "austen.txt"
"""Texts of the package's data folder."""


def packaged_text(name: str) -> str:
    """A text of the package's data folder: "speeches.txt" or "austen.txt"."""
    return (resources.files("prox24") / "data" / name).read_text(encoding="utf-8")
