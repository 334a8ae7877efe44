"""The header of a GGUF file: metadata, and the place of each tensor.

The reader of the gguf package is not used. It trusts a count that exceeds the file, so a file of 50
bytes can fill the memory. It also makes two arrays for each entry of a list, which takes seconds
for the tokens of a model.
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

MAX_DIMENSIONS = 4  # ggml's
NUMBERS = {
    kind: np.dtype(kind.name.lower()).newbyteorder("<")
    for kind in GGUFValueType
    if kind not in (GGUFValueType.STRING, GGUFValueType.ARRAY)
}


class StoredTensor(NamedTuple):
    """The encoding, shape (contiguous axis last), first byte and number of bytes of a tensor."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    size: int


def _take(file: mmap.mmap, size: int) -> bytes:
    content = file.read(min(size, len(file)))
    if len(content) < size:
        raise ValueError(f"it ends within its header, or says {size} of a size")
    return content


def _unpack(file: mmap.mmap, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, _take(file, struct.calcsize(form)))


def _text(file: mmap.mmap) -> str:
    return _texts(file, 1)[0]


def _texts(file: mmap.mmap, count: int) -> list[str]:
    # A vocabulary has 100,000 texts. A call of a Python function for each would double the time.
    texts, start, end = [], file.tell(), len(file)
    for _ in range(count):
        first = start + 8
        start = first + int.from_bytes(file[start:first], "little")
        if start > end:
            raise ValueError(f"it ends within its header, or says {start - first} of a size")
        texts.append(file[first:start].decode())
    file.seek(start)
    return texts


def _value(file: mmap.mmap) -> Any:
    """A value, stored after its type."""
    kind = GGUFValueType(*_unpack(file, "<I"))
    if kind != GGUFValueType.ARRAY:
        return _list(file, kind, 1)[0]
    code, count = _unpack(file, "<IQ")
    return _list(file, GGUFValueType(code), count)


def _list(file: mmap.mmap, kind: GGUFValueType, count: int) -> list[Any]:
    if kind == GGUFValueType.STRING:
        return _texts(file, count)
    if kind not in NUMBERS:
        raise ValueError("it has a list of lists")
    return np.frombuffer(_take(file, count * NUMBERS[kind].itemsize), NUMBERS[kind]).tolist()


def _tensor(file: mmap.mmap) -> tuple[str, StoredTensor]:
    """The name of a tensor, and its place; `start` counts from the end of the header."""
    name = _text(file)
    [dimensions] = _unpack(file, "<I")
    if dimensions > MAX_DIMENSIONS:
        raise ValueError(f"tensor {name} has {dimensions} dimensions")
    *reverse_shape, code, start = _unpack(file, f"<{dimensions}QIQ")
    shape, kind = tuple(reversed(reverse_shape)), GGMLQuantizationType(code)
    length, size = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % length:
        raise ValueError(f"tensor {name} has shape {shape} in blocks of {length}")
    return name, StoredTensor(kind, shape, start, math.prod(shape) // length * size)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The metadata and the tensors of a file, by name; raises OSError or ValueError."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        magic, version, tensor_count, field_count = _unpack(content, "<4sIQQ")
        if magic != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if version not in (2, 3):
            raise ValueError(f"it is of version {version} or big-endian; versions 2 and 3 are read")
        metadata = dict((_text(content), _value(content)) for _ in range(field_count))
        found = [_tensor(content) for _ in range(tensor_count)]
        if len(metadata) < field_count or len(dict(found)) < tensor_count:
            raise ValueError("it says something twice")
        alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError("general.alignment is not a power of two")
        behind = -(-content.tell() // alignment) * alignment
        tensors = {name: entry._replace(start=behind + entry.start) for name, entry in found}
        for name, entry in tensors.items():
            if entry.start + entry.size > len(content) or 0 in entry.shape:
                raise ValueError(f"tensor {name} of shape {entry.shape} is not within the file")
        if sum(entry.size for entry in tensors.values()) > len(content):
            raise ValueError("its tensors overlap")
    return metadata, tensors
