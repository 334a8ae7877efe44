"""Several processes that do one job: how they meet, agree, and end together.

`jax.distributed` is the engine. A single process meets nobody, and everything here does nothing.
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
"""Seconds without a sign of life after which a process counts as dead, and at the end as late."""


@contextlib.contextmanager
def connected(coordinator: str | None, count: int | None, index: int | None) -> Iterator[None]:
    """Joins the processes of a run, before JAX has touched a device.

    The coordinator, HOST:PORT, is where process 0 listens. What is not given, JAX finds in its
    environment: that of Slurm, Open MPI, TPU VMs, or GKE with TPUs.
    """
    # Its handler would take SIGTERM from the command line's.
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
    except (Prox24Error, OSError, MemoryError):
        raise
    except Exception as error:
        if is_missing_device(error):
            raise
        if not is_broken_off(error):
            traceback.print_exc()
            leave(1)
        ended = Prox24Error(f"another process has ended, or a device fails: {first_line(error)}")
        for note in getattr(error, "__notes__", ()):
            ended.add_note(note)
        raise ended from error
    else:  # Nobody waits for what the first process does afterwards.
        jax.distributed.shutdown()


@contextlib.contextmanager
def _own_output() -> Iterator[None]:
    """Has the lines that Gloo prints go to standard error: ours alone are on standard output."""
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
    """Whether a program was broken off: by a device, or by the end of another process.

    What XLA says begins with a status, and comes as a ValueError where a program starts.

    Example:
      >>> is_broken_off(ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"))
      True
      >>> is_broken_off(ValueError("UNKNOWN is not a pattern"))
      False
    """
    if isinstance(error, ValueError):
        return re.match(r"[A-Z_]+: ", str(error)) is not None
    return isinstance(error, jax.errors.JaxRuntimeError)


def is_missing_device(error: Exception) -> bool:
    """Whether JAX could not start on the devices that it was told of, or found."""
    return isinstance(error, RuntimeError) and str(error).startswith("Unable to initialize backend")


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def meet(place: str) -> None:
    """Waits until every process is at this place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def latest(number: int | None) -> int | None:
    """The largest of the processes' numbers, None being less than all."""
    if jax.process_count() == 1:
        return number
    largest = int(multihost_utils.process_allgather(-1 if number is None else number).max())
    return None if largest < 0 else largest


def agree(value: Any, error: Prox24Error) -> None:
    """Raises an error, in every process, where their values are not the same, as JSON has them."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    others = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    if (others != others[0]).any():
        raise error


def leave(code: int) -> None:
    """Ends a process at once where others may wait for it, so that they notice; else returns."""
    if jax.distributed.is_initialized():
        if is_first():
            time.sleep(1)  # The others end with it, and may have an error of their own to print.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
