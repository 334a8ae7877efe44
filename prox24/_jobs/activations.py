"""Hidden states in files: this frees memory for the layers, and a run can resume from them."""

import errno
import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prox24._checkpoints.tensors import writing
from prox24._checkpoints.unfinished import synchronise
from prox24._jobs.processes import latest, meet


class ActivationFiles:
    """Streams of hidden states in memory-mapped files of a folder.

    A stream has two files: the input of a layer is read from one while its output is written to the
    other. A further file has the number of the layer whose input is complete in all streams. Each
    process has its own folder.

    Attributes:
      layer: the layer whose input was complete in every stream when the folder was opened. None at
        the start, or if a file is missing, damaged or of another length.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], streams: Iterable[str], layers: int):
        """Opens or makes a folder; a stream is (micro-batches, windows, length, hidden)."""
        self._folder, self._shape, self._size = folder, shape, 4 * math.prod(shape)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        note = folder / "layer"
        text = note.read_bytes() if note.exists() else b""
        self.layer = latest(int(text) if text.isdigit() else None)
        if self.layer is not None:
            paths = [self._path(stream, self.layer) for stream in streams]
            whole = self.layer <= layers and all(
                path.is_file() and path.stat().st_size == self._size for path in paths
            )
            # If one process lacks a file, all processes start again.
            if latest(None if whole else self.layer) is not None:
                self.layer = None
        if self.layer is None:
            with writing(folder):
                # The first write to a file makes the note wrong.
                note.unlink(missing_ok=True)
                synchronise(folder)
            meet("the activations begin anew")

    def _path(self, stream: str, layer: int) -> Path:
        return self._folder / f"{stream}-{layer % 2}"

    def micro_batches(self, stream: str, layer: int) -> NDArray[np.float32]:
        """The input of a layer, to read or to write; an assignment writes into the file."""
        path = self._path(stream, layer)
        with writing(path):
            path.touch()
            _allocate(path, self._size)
            return np.memmap(path, np.float32, "r+", shape=self._shape)

    def complete(self, layer: int, streams: Iterable[str]) -> None:
        """Notes that the input of a layer is complete; after the call it is on disk."""
        new = self._folder / "layer.new"
        with writing(self._folder):
            new.write_text(str(layer))
            for path in [*(self._path(stream, layer) for stream in streams), new]:
                synchronise(path)
            # Before one process notes the layer, all processes have written it.
            meet(f"layer {layer} is complete")
            new.replace(self._folder / "layer")
            synchronise(self._folder)


def _allocate(path: Path, size: int) -> None:
    """Reserves a file's bytes on the disk: a full disk would later kill the process.

    Some systems and file systems cannot do this.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
