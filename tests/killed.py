"""What the processes of tests/test_faults.py do, which end before they are done."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable

import jax

import prox24._cli.main

EVENTS = {"open", "os.rename", "os.truncate", "os.remove", "os.mkdir", "os.rmdir"}


PRELOADED = [
    "prox24._cli.prune",
    "prox24._jobs.prune",
    "transformers.models.auto.tokenization_auto",
]


def imported() -> multiprocessing.context.ForkServerContext:
    """Starts processes that have imported everything before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def on_change(folder: str, act: Callable[[], None]) -> None:
    """Calls `act` before every change that this process makes in a folder, and every file read."""

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in EVENTS and str(arguments[0]).startswith(folder):
            act()

    sys.addaudithook(hook)


def run(
    arguments: list[str],
    cache: str,
    errors: str,
    place: int | None,
    devices: int = 1,
    number: int = signal.SIGKILL,
) -> None:
    """The command line, with programs compiled by an earlier process, and its standard error.

    Args:
      arguments: of the command; the third is the destination.
      cache: of compiled programs.
      errors: file for standard error.
      place: before which of its changes of files the process gets a signal.
      devices: of the process.
      number: of the signal.
    """
    changes = itertools.count(1)

    def kill() -> None:
        if next(changes) == place:
            os.kill(os.getpid(), number)

    # A shell has what it runs in the background ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    on_change(arguments[2], kill)
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    with open(errors, "w") as file, contextlib.redirect_stderr(file):
        code = prox24._cli.main.main(arguments)
    sys.stdout.flush()
    os._exit(code)  # XLA's threads are not waited for
