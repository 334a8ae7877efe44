"""Pruning where the system lacks what Linux has: hidden here, as on Windows and macOS."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import write_tiny

import prox24
from prox24._cli.main import main

WINDOWS = np.arange(4 * 32).reshape(4, 32) % 260


class NoBlocks:
    """A file's status without the count of blocks."""

    def __init__(self, status):
        self._status = status

    def __getattr__(self, name):
        if name == "st_blocks":
            raise AttributeError(name)
        return getattr(self._status, name)


@pytest.mark.slow  # two whole runs
def test_a_model_is_pruned_as_on_a_system_with_less(tmp_path, monkeypatch):
    write_tiny(tmp_path / "model")
    expected = prox24.prune(tmp_path / "model", tmp_path / "here", calibration=WINDOWS)
    opened, status = os.open, Path.stat

    def open_no_folder(path, flags, *more, **named):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return opened(path, flags, *more, **named)

    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, "resource", None)
        hidden.delattr(os, "posix_fallocate")
        hidden.delattr(signal, "SIGPIPE")
        hidden.setattr(os, "open", open_no_folder)
        hidden.setattr(Path, "stat", lambda path, **named: NoBlocks(status(path, **named)))
        report = prox24.prune(
            tmp_path / "model", tmp_path / "there", calibration=WINDOWS, activations="disk"
        )
        assert main(["inspect", str(tmp_path / "there"), "--quiet"]) == 0
    assert report.peak_memory_bytes is None
    assert [linear.statistics for linear in report.linears] == [
        linear.statistics for linear in expected.linears
    ]
    written = (tmp_path / place / "model.safetensors" for place in ("here", "there"))
    assert len({path.read_bytes() for path in written}) == 1
