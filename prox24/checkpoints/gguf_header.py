"""What a GGUF file says before its tensors: metadata, and where each tensor lies.

Not by the reader of the gguf package, which follows any count beyond the end of the file, and makes
two arrays of each entry of a list. Here nothing is read, or allocated, that the file has no bytes
for.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4  # ggml's
NUMBERS: dict[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}


class StoredTensor(NamedTuple):
    """Where a tensor lies.

    Attributes:
      kind: how its entries are encoded.
      shape: as numpy has it, the contiguous axis last.
      start: its first byte in the file.
      size: in bytes.
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    size: int


class _Cursor:
    """Reads a file from its start on."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.position = 0

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.content):
            raise ValueError(f"it ends within its header, or says {size} of a size")
        taken = self.content[self.position : end]
        self.position = end
        return taken

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def text(self) -> str:
        [size] = self.numbers("<Q")
        return self.take(size).decode()

    def value(self) -> Any:
        """A type and a value of it."""
        [code] = self.numbers("<I")
        kind = GGUFValueType(code)
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return self.array(kind, 1)[0]
        code, count = self.numbers("<IQ")
        return self.array(GGUFValueType(code), count)

    def array(self, kind: GGUFValueType, count: int) -> list[Any]:
        if kind == GGUFValueType.STRING:
            return [self.text() for _ in range(count)]
        if kind == GGUFValueType.ARRAY:
            raise ValueError("it has a list of lists")
        dtype = NUMBERS[kind]
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()

    def tensor(self) -> tuple[str, StoredTensor]:
        """The name of a tensor, and where it lies behind the header."""
        name = self.text()
        [dimensions] = self.numbers("<I")
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        shape = self.numbers(f"<{dimensions}Q")[::-1]
        code, start = self.numbers("<IQ")
        kind = GGMLQuantizationType(code)
        length, size = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % length:
            raise ValueError(f"tensor {name} has shape {shape} in blocks of {length}")
        return name, StoredTensor(kind, shape, start, math.prod(shape) // length * size)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The metadata and the tensors of a file, by name.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no GGUF file, is damaged, or lacks bytes of a tensor.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        cursor = _Cursor(content)
        magic, version, tensor_count, field_count = cursor.numbers("<4sIQQ")
        if magic != MAGIC:
            raise ValueError("it does not begin with GGUF")
        if version not in VERSIONS:
            raise ValueError(f"it is of version {version} or big-endian; versions 2 and 3 are read")
        metadata = dict((cursor.text(), cursor.value()) for _ in range(field_count))
        found = [cursor.tensor() for _ in range(tensor_count)]
        if len(metadata) < field_count or len(dict(found)) < tensor_count:
            raise ValueError("it says something twice")
        alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError("general.alignment is not a power of two")
        behind = -(-cursor.position // alignment) * alignment
        tensors = {name: entry._replace(start=behind + entry.start) for name, entry in found}
        for name, entry in tensors.items():
            if entry.start + entry.size > len(content) or 0 in entry.shape:
                raise ValueError(f"tensor {name} of shape {entry.shape} is not within the file")
        if sum(entry.size for entry in tensors.values()) > len(content):
            raise ValueError("its tensors overlap")
    return metadata, tensors
