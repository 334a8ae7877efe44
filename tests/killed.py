"""Runs the command line in processes that end before they are done."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator

import jax

import prox24._cli.main

EVENTS = {"open", "os.rename", "os.truncate", "os.remove", "os.mkdir", "os.rmdir"}
PRELOADED = ["prox24._cli.prune", "prox24._jobs.prune"]
PRELOADED += ["transformers.models.auto.tokenization_auto"]


@contextlib.contextmanager
def processes() -> Iterator[Callable[..., multiprocessing.Process]]:
    """Yields what starts `_run` in a process that has imported everything before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    started = []

    def start(*given):
        started.append(context.Process(target=_run, args=given))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def on_change(folder: str, act: Callable[[], None]) -> None:
    """Calls `act` before every change that this process makes in a folder, and every file read."""

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in EVENTS and str(arguments[0]).startswith(folder):
            act()

    sys.addaudithook(hook)


def _run(
    arguments: list[str], cache: str, errors: str, devices: int = 1, place: int | None = None
) -> None:
    """The command line, with programs compiled by an earlier process, and its standard error.

    Args:
      arguments: of the command; the third is the destination.
      cache: of compiled programs.
      errors: file for standard error.
      devices: of the process.
      place: before which of its changes of files the process gets SIGTERM.
    """
    changes = itertools.count(1)

    def end() -> None:
        if next(changes) == place:
            os.kill(os.getpid(), signal.SIGTERM)

    # A shell has what it runs in the background ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    on_change(arguments[2], end)
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    with open(errors, "w") as file, contextlib.redirect_stderr(file):
        code = prox24._cli.main.main(arguments)
    sys.stdout.flush()
    os._exit(code)  # XLA's threads are not waited for
