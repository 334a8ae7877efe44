"""The documents of a source: a text file, records, a folder, or a dataset of the hub.

Only the function `chat` depends on a tokenizer. It makes a text of a record's messages.
"""

import bz2
import csv
import functools
import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prox24.errors import CalibrationError, first_line, missing_package

Chat = Callable[[list[dict[str, Any]]], str]
"""The text of a conversation, by the chat template of a tokenizer."""

FIELDS = ("text", "messages")
"""The default fields of a record: the first of them in the record is read."""

DATASET = re.compile(
    r"hf:(?P<id>[\w.-]+(?:/[\w.-]+)?)(?:#(?P<config>[^:#]+))?(?::(?P<split>[^:#]+))?"
)

COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

UNREAD = re.compile(
    r"\.(ya?ml|toml|xml|html?|arrow|feather|avro|orc|xlsx|pdf|docx|epub|zst|lz4|zip|tar|tgz|7z)"
)
"""Suffixes of files that are no plain text and have no reader."""

OBJECT = re.compile(r'[\s\[]*\{\s*"[^"\n]*"\s*:')
"""The beginning of a JSON object with a key, also in lists."""

HEADER = re.compile(r'"?[\w.-]+"?(?:[,\t]"?[\w.-]+"?)+')
"""A line of names without spaces, between commas or tabs."""

DAMAGED = (EOFError, lzma.LZMAError, zlib.error)


def is_dataset(source: str) -> bool:
    """Whether a source is a dataset of the hub: hf:OWNER/NAME[#CONFIG][:SPLIT].

    Example:
      >>> is_dataset("hf:allenai/c4#en:train"), is_dataset("c4.jsonl")
      (True, False)
    """
    return source.startswith("hf:")


def documents(source: str, field: str | None, chat: Chat) -> Iterator[str]:
    """Yields the documents of a source, in its order.

    A text file is one document. A file with a suffix of `RECORDS` has records, and so has a dataset
    of the hub. A field of each record has one document: a text, or the messages of a conversation.
    A folder has the documents of its files with these suffixes and of its .txt files, by name.
    Files other than .parquet may be compressed as .gz, .bz2 or .xz.

    Raises:
      CalibrationError: a file cannot be read, or a record has no text. The message names the file
        and the line.
      MissingPackageError: a package that reads the source is not installed.
    """
    if is_dataset(source):
        for number, record in enumerate(_hub_records(source)):
            yield _text_of(record, field, f"{source}, record {number}", chat)
        return
    for path in files_of(Path(source)):
        kind = _kind(path)
        if UNREAD.fullmatch(kind) or (kind == ".parquet" and path.suffix.lower() in COMPRESSED):
            raise CalibrationError(
                f"{path} has a suffix that is not read: decompress it, or convert it to .txt, "
                ".jsonl or .parquet"
            )
        read = RECORDS.get(kind)
        if read is None:
            yield plain_text(path, field)
            continue
        for place, record in read(path, field):
            yield _text_of(record, field, f"{path}, {place}", chat)


def files_of(path: Path) -> list[Path]:
    """The file itself, or the text files of a folder in the order of their names."""
    if not path.is_dir():
        return [path]
    kinds = (".txt", *RECORDS)
    files = (file for folder in folders_within(path) for file in folder.iterdir())
    found = sorted(file for file in files if file.is_file() and _kind(file) in kinds)
    if not found:
        raise CalibrationError(f"the folder {path} has no file that ends in {', '.join(kinds)}")
    return found


def folders_within(folder: Path) -> Iterator[Path]:
    """A folder and the folders in it, also linked ones; each once."""

    def fail(error: OSError) -> None:
        raise CalibrationError(f"cannot read {error.filename}: {error.strerror}") from error

    seen: set[tuple[int, int]] = set()
    for place, folders, _ in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(set(folders) - {"lost+found"})  # the latter is for the system alone
        own = os.stat(place)
        if (own.st_dev, own.st_ino) in seen:
            folders.clear()
            continue
        seen.add((own.st_dev, own.st_ino))
        yield Path(place)


def _kind(path: Path) -> str:
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file with their ends; errors name the file."""
    opened = COMPRESSED.get(path.suffix.lower(), open)
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text") from error
    except (OSError, *DAMAGED) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise CalibrationError(f"cannot read {path}: {reason}") from error


def plain_text(path: Path, field: str | None = None) -> str:
    """The text of a file, with its line ends; raises CalibrationError if it has records."""
    text = "".join(_lines(path))
    if _is_json(text):
        raise CalibrationError(f"{path} holds JSON: give it a name that ends in .jsonl or .json")
    header = text.partition("\n")[0].strip()
    names = {field} if field else set(FIELDS)
    if HEADER.fullmatch(header) and names.intersection(re.split(r'[,\t"]+', header)):
        raise CalibrationError(f"{path} holds a table: give it a name that ends in .csv or .tsv")
    return text


def is_unicode(text: str) -> bool:
    """Whether a text has a UTF-8 encoding. A lone surrogate, half of a character, has none."""
    return re.search(r"[\ud800-\udfff]", text) is None


def _is_json(text: str) -> bool:
    """Whether a text begins with a JSON object, or is a JSON object or list as a whole."""
    if OBJECT.match(text):
        return True
    if not text.lstrip().startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json_lines(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(
                f"{path}, line {number}, is not JSON: {error.msg} (column {error.colno})"
            ) from error
        except (ValueError, RecursionError) as error:  # a number too long, lists too deep
            raise CalibrationError(
                f"{path}, line {number}, cannot be read as JSON: {first_line(error)}"
            ) from error


def _json_list(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    text = "".join(_lines(path))
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{"):  # as the files of C4 are
            yield from _json_lines(path, field)
            return
        raise CalibrationError(f"{path} is not JSON: {first_line(error)}") from error
    if not isinstance(found, list):
        raise CalibrationError(f"{path} holds no list of records")
    yield from ((f"record {number}", record) for number, record in enumerate(found))


def _table_rows(path: Path, field: str | None, delimiter: str = ",") -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the largest that every system takes
    rows = csv.DictReader(_lines(path), delimiter=delimiter)
    try:
        for row in rows:
            yield f"line {rows.line_num}", row
    except csv.Error as error:
        raise CalibrationError(
            f"{path}, line {rows.line_num}, is no row of a table: {error}"
        ) from error


def _parquet_rows(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ModuleNotFoundError as error:
        raise missing_package(str(path), error, "data") or error from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if name in ((field,) if field else FIELDS)]
            # Other columns may have values that Python cannot hold.
            if not columns:
                if file.metadata.num_rows:
                    yield "record 0", dict.fromkeys(names)
                return
            for batch in file.iter_batches(1024, columns=columns):
                for record in batch.to_pylist():
                    # All fields, so that an error can name them.
                    yield f"record {number}", dict.fromkeys(names) | record
                    number += 1
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {first_line(error)}") from error
    except ArrowException as error:
        raise CalibrationError(f"{path} is no parquet file: {first_line(error)}") from error
    except (ValueError, OverflowError) as error:
        raise CalibrationError(f"{path}, record {number} or later: {first_line(error)}") from error


RECORDS: dict[str, Callable[[Path, str | None], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _table_rows,
    ".tsv": functools.partial(_table_rows, delimiter="\t"),
    ".parquet": _parquet_rows,
}
"""Functions that yield the records of a file, each with its place for an error message."""


def _hub_records(source: str) -> Iterator[Any]:
    """The records of a dataset of the hub, downloaded on demand."""
    found = DATASET.fullmatch(source)
    if found is None:
        raise CalibrationError(f"{source} is not of the form hf:OWNER/NAME[#CONFIG][:SPLIT]")
    try:
        import datasets  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ModuleNotFoundError as error:
        raise missing_package(source, error, "data") or error from error
    try:
        yield from datasets.load_dataset(
            found["id"], found["config"], split=found["split"] or "train", streaming=True
        )
    except Exception as error:  # each failure has another type
        raise CalibrationError(
            f"{source} cannot be had from the hub: {first_line(error)}; check its name and the "
            "network, or give a file"
        ) from error


def _text_of(record: Any, field: str | None, place: str, chat: Chat) -> str:
    if not isinstance(record, dict):
        raise CalibrationError(f"{place}, is no record of fields")
    name = field or next((name for name in FIELDS if name in record), None)
    if name not in record:
        missing = repr(field) if field else "'text' or 'messages'"
        raise CalibrationError(
            f"{place}, has no field {missing}; it has {', '.join(map(str, record))}: name one by "
            "--text-field"
        )
    value = record[name]
    if isinstance(value, str):
        text = value
    elif isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        try:
            text = chat(value)
        except Exception as error:  # by the template, or for a missing template
            raise CalibrationError(
                f"{place}: the chat template fails: {first_line(error)}; give records with "
                "text, or a model with a template"
            ) from error
    else:
        kind = "empty" if value is None else type(value).__name__
        raise CalibrationError(f"{place}: {name!r} is {kind}, neither text nor messages")
    if not is_unicode(text):
        raise CalibrationError(
            f"{place}: {name!r} has half of a character (a lone surrogate): mend the record"
        )
    return text
