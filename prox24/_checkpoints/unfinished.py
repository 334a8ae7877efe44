"""An unfinished folder: its destination is complete or absent, and finished work is kept.

The folder DST.unfinished is next to a destination DST while DST is written:

    lock            held by the writing process
    job.json        all inputs that decide the bytes of the result
    journal.jsonl   a line for each tensor on disk
    activations/    hidden states on disk, if any, by process
    model/          the files of the result, renamed to DST at the end
    replaced/       the previous DST, during the renaming
    old/            the previous DST, until it is deleted
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from prox24._checkpoints import safetensors_file
from prox24._checkpoints.checkpoint import FORMATS
from prox24._checkpoints.hf_folder import hub_hash, weight_files
from prox24._checkpoints.tensors import TensorSource, writing
from prox24.errors import CheckpointError, DiskError, Prox24Error, first_line

OF_A_RUN = {"lock", "job.json", "journal.jsonl", "activations", "model", "replaced", "old"}


class Written(NamedTuple):
    """A written tensor."""

    name: str
    file: Path
    sha256: str


class Unfinished(NamedTuple):
    """A folder with unfinished work.

    `record` notes in the journal that a tensor is finished, with any further facts about it.
    """

    folder: Path  # for the files of the result
    entries: dict[str, dict[str, Any]]  # the journal's entries by tensor, in order
    finished: dict[str, TensorSource]  # the tensors in `entries`, in their written form
    record: Callable[[Written, Mapping[str, Any]], None]


@contextlib.contextmanager
def unfinished_folder(
    destination: Path, job: Mapping[str, Any] | None = None, *, overwrite: bool = False
) -> Iterator[Unfinished]:
    """Makes a folder that becomes the destination when the block ends without an error.

    `job` has all inputs that decide the result, in the form of JSON. The entries of `record`
    survive the end of the process, and the same job continues after them. An error of the input
    would occur again: it ends the job, and nothing is kept.
    """
    work = work_folder(destination)
    if work.exists() and not work.is_dir():
        raise CheckpointError(f"{work}, where {destination} would be made, is a file; move it away")
    with writing(destination):
        work.mkdir(exist_ok=True)
        names = {file.name for file in work.iterdir()}
    others = names - OF_A_RUN
    # Locks and network file systems may leave temporary files next to a lock or a job.
    if others and not names & {"lock", "job.json"}:
        raise CheckpointError(
            f"{work}, where {destination} would be made, holds {min(others)}; move it away"
        )
    lock = FileLock(work / "lock")
    with writing(destination):
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise CheckpointError(f"another process is writing {destination}") from error
    done: dict[str, dict[str, Any]] = {}
    journal_known = False
    try:
        with writing(destination):
            _put_back(work, destination)
            shutil.rmtree(work / "old", ignore_errors=True)
            done |= _entries(work)
            journal_known = True
            if (work / "replaced").exists():
                raise DiskError(f"{work}/replaced stood at {destination} before; move one away")
            check_replaceable(destination, overwrite)
            if done:
                _check_job(work, len(done), job)
            else:
                for part in ("model", "activations"):
                    shutil.rmtree(work / part, ignore_errors=True)
                (work / "model").mkdir()
                # It may be incomplete: a run continues it only if the journal has a line.
                (work / "job.json").write_text(json.dumps(job, indent=2) + "\n", encoding="utf-8")
                synchronise(work / "job.json")
        finished = _tensors(work / "model", done)
        # Each tensor is read once to check its hash.
        for name, entry in done.items():
            if name not in finished or sha256(finished[name].read()) != entry["sha256"]:
                raise CheckpointError(f"{work}/model: tensor {name} is damaged; delete {work}")

        def record(written: Written, also: Mapping[str, Any]) -> None:
            done[written.name] = {"sha256": written.sha256, **also}
            with writing(written.file):
                synchronise(written.file)
                entry = {"tensor": written.name, **done[written.name]}
                with (work / "journal.jsonl").open("a", encoding="utf-8") as journal:
                    journal.write(json.dumps(entry) + "\n")
                    journal.flush()
                    os.fsync(journal.fileno())

        try:
            yield Unfinished(work / "model", dict(done), finished, record)
            with writing(destination):
                _move_into_place(work, destination, overwrite)
                done.clear()
                synchronise(work.parent)
        except BaseException as error:
            if isinstance(error, Prox24Error) and not isinstance(error, DiskError):
                done.clear()  # The same command would end in the same way.
            if done:
                error.add_note(f"what is done is in {work}: the same command goes on with it")
            raise
    finally:
        _put_back(work, destination)
        if journal_known and not done and not (work / "replaced").exists():
            shutil.rmtree(work, ignore_errors=True)
        lock.release()


def opened_by_another(destination: Path) -> Unfinished:
    """The finished tensors in a folder that another process of the same run has open."""
    work = work_folder(destination)
    entries = _entries(work)
    tensors = _tensors(work / "model", entries)
    for name in entries:
        if name not in tensors:
            raise CheckpointError(f"{work}: tensor {name} is not there")
    return Unfinished(work / "model", entries, tensors, lambda written, also: None)


def check_replaceable(destination: Path, overwrite: bool) -> None:
    """Raises CheckpointError if the destination exists and must not be overwritten."""
    if destination.exists() and not overwrite:
        raise CheckpointError(
            f"{destination} exists; pass overwrite=True, or --overwrite, to replace it"
        )
    if destination.is_dir() and not _is_replaceable(destination):
        raise CheckpointError(
            f"{destination} holds files, but no config.json of a model, so it is not replaced; "
            "choose another destination"
        )


def _is_replaceable(destination: Path) -> bool:
    """Whether nothing but a model is lost: the folder is of a model, or is empty."""
    return destination.is_dir() and (
        (destination / "config.json").is_file() or not any(destination.iterdir())
    )


def source_files(path: Path) -> dict[str, list[int | str]]:
    """What identifies a model: `_identity` of each file of its weights and config.

    A change in another file loses no finished work. The result has the changed file. The tokens of
    a text have their own hash.
    """
    if path.is_file():
        return {path.name: _identity(path)}
    names = ["config.json", *weight_files(path, FORMATS)]
    return {name: _identity(path / name) for name in names}


def check_unchanged(path: Path, files: Mapping[str, list[int | str]]) -> None:
    """Raises CheckpointError if a file changed since `source_files`; new files are allowed."""
    for name, before in files.items():
        file = path if path.is_file() else path / name
        if not file.is_file() or _identity(file) != before:
            raise CheckpointError(f"{path}: {name} changed while it was read")


def _identity(file: Path) -> list[int | str]:
    """Size in bytes, and modification time in ns; in the hub's cache the hash in place of the time.

    A cache that was deleted and downloaded again has other times.
    """
    status = file.stat()
    return [status.st_size, hub_hash(file) or status.st_mtime_ns]


def sha256(values: NDArray[Any]) -> str:
    """The hash of the entries in memory order."""
    return hashlib.sha256(values.ravel().view(np.uint8).data).hexdigest()


def work_folder(destination: Path) -> Path:
    """The folder of the unfinished work on a destination."""
    return destination.absolute().with_name(destination.name + ".unfinished")


def _entries(work: Path) -> dict[str, dict[str, Any]]:
    """The complete lines of a journal, by tensor; empty if its files are missing."""
    journal = work / "journal.jsonl"
    if not journal.exists() or not (work / "model").is_dir():
        journal.unlink(missing_ok=True)
        return {}
    text = journal.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(journal, len(whole))
    found: dict[str, dict[str, Any]] = {}
    with intact(f"{journal} is damaged; delete {work} to start anew"):
        for line in whole.splitlines():
            entry = json.loads(line)
            name = entry.pop("tensor")
            found[name] = {"sha256": entry["sha256"], **entry}
    return found


@contextlib.contextmanager
def intact(damage: str) -> Iterator[None]:
    """Turns an error of a damaged file into a CheckpointError: a text, and the error's line."""
    try:
        yield
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{damage} ({first_line(error)})") from error


def _check_job(work: Path, count: int, job: Mapping[str, Any] | None) -> None:
    with intact(f"{work}/job.json is damaged; delete {work} to start anew"):
        began = json.loads((work / "job.json").read_text(encoding="utf-8"))
        version = began["versions"]["prox24"]
    if job is not None and version != job["versions"]["prox24"]:
        raise CheckpointError(
            f"{work} was begun by prox24 {version}; finish it with that version, "
            "or delete it to start anew"
        )
    found = "of another command" if job is None else difference(began, json.loads(json.dumps(job)))
    if found is not None:
        raise CheckpointError(
            f"{work} holds {count} tensors of another run: {found}; "
            "run as before to go on with it, or delete it to start anew"
        )


def difference(before: Any, now: Any, name: str = "") -> str | None:
    """The first value that differs between two jobs, with its name, or None."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = (
            difference(before.get(key), now.get(key), f"{name}.{key}" if name else key)
            for key in before.keys() | now.keys()
        )
        return min(filter(None, found), default=None)
    return None if before == now else f"{name} was {json.dumps(before)}, is {json.dumps(now)}"


def _tensors(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, TensorSource]:
    """The tensors of the journal, if a file holds them."""
    tensors: dict[str, TensorSource] = {}
    for path in sorted(folder.glob("*.safetensors")) if entries else []:
        tensors |= safetensors_file.open_file(path)
    return {name: tensors[name] for name in entries if name in tensors}


def _move_into_place(work: Path, destination: Path, overwrite: bool) -> None:
    folder = work / "model"
    for file in folder.iterdir():
        synchronise(file)
    synchronise(folder)
    replaced = work / "replaced"
    if destination.exists() and not (overwrite and _is_replaceable(destination)):
        names = (f"{destination.name}.new{number or ''}" for number in itertools.count())
        free = next(filter(lambda path: not path.exists(), map(destination.with_name, names)))
        folder.rename(free)
        raise CheckpointError(f"{destination} came to exist meanwhile; the result is {free}")
    if destination.exists():
        destination.rename(replaced)
    folder.rename(destination)
    if replaced.exists():
        replaced.rename(work / "old")


def _put_back(work: Path, destination: Path) -> None:
    """Repairs an interrupted replacement: undoes half of one, or completes a whole one.

    If another program has made the destination between the two renames, both folders stay.
    """
    replaced = work / "replaced"
    if replaced.exists() and not destination.exists():
        replaced.rename(destination)
    elif replaced.exists() and not (work / "model").exists():
        replaced.rename(work / "old")


def synchronise(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk.

    Some file systems cannot wait for names, and Windows does not open folders.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)
