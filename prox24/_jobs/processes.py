"""Several processes that do one job: they wait for each other, compare values, and end together.

It is built on `jax.distributed`. With a single process these functions do nothing.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from prox24.errors import Prox24Error, first_line

PATIENCE = 60
"""Seconds without a heartbeat until a process counts as dead; also the wait at the end."""


@contextlib.contextmanager
def connected(coordinator: str | None, count: int | None, index: int | None) -> Iterator[None]:
    """Joins the processes of a run, before JAX has touched a device.

    The coordinator, HOST:PORT, is the address of process 0. JAX finds missing arguments in the
    environment of Slurm, Open MPI 4, TPU VMs, or GKE with TPUs.
    """
    # This service would replace the command line's handler of SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            heartbeat_timeout_seconds=PATIENCE,
            shutdown_timeout_seconds=PATIENCE,
        )
    except (ValueError, RuntimeError) as error:
        raise Prox24Error(
            f"the processes do not find each other: {first_line(error)}; "
            "--coordinator, --num-processes and --process-id say where they are"
        ) from error
    try:
        with _own_output():
            yield
    except Exception as error:
        if isinstance(error, Prox24Error | OSError | MemoryError) or is_missing_device(error):
            raise
        if not is_broken_off(error):
            traceback.print_exc()
            leave(1)
        ended = Prox24Error(f"another process has ended, or a device fails: {first_line(error)}")
        for note in getattr(error, "__notes__", ()):
            ended.add_note(note)
        raise ended from error
    else:  # The first process may still have work, and no other process waits for it.
        jax.distributed.shutdown()


@contextlib.contextmanager
def _own_output() -> Iterator[None]:
    """Sends the lines of Gloo to standard error, so that standard output has only our lines."""
    given = sys.stdout
    with os.fdopen(os.dup(1), "w", encoding=given.encoding, buffering=1) as own:
        os.dup2(2, 1)
        sys.stdout = own
        try:
            yield
        finally:
            sys.stdout = given
            own.flush()
            os.dup2(own.fileno(), 1)


def is_broken_off(error: Exception) -> bool:
    """Whether a program was interrupted by a device, or by the end of another process.

    XLA's messages begin with a status. At the start of a program they come as a ValueError.

    Example:
      >>> is_broken_off(ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"))
      True
      >>> is_broken_off(ValueError("UNKNOWN is not a pattern"))
      False
    """
    if isinstance(error, ValueError):
        return re.match(r"[A-Z_]+: ", str(error)) is not None
    return isinstance(error, jax.errors.JaxRuntimeError)


def is_missing_device(error: BaseException) -> bool:
    """Whether JAX could not start on its devices."""
    return isinstance(error, RuntimeError) and str(error).startswith("Unable to initialize backend")


def is_first() -> bool:
    """Whether this is the first process: only this process writes and prints."""
    return jax.process_index() == 0


def meet(place: str) -> None:
    """Waits until every process is at this place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def latest(number: int | None) -> int | None:
    """The largest number of all processes; None is smaller than any number."""
    if jax.process_count() == 1:
        return number
    largest = int(multihost_utils.process_allgather(-1 if number is None else number).max())
    return None if largest < 0 else largest


def agree(value: Any, error: Prox24Error) -> None:
    """Raises an error in every process if their values differ as JSON."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    others = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    if (others != others[0]).any():
        raise error


def leave(code: int) -> None:
    """Ends the process at once if other processes may wait for it; otherwise returns."""
    if jax.distributed.is_initialized():
        if is_first():
            time.sleep(1)  # The others end with it, and may first print their own error.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
