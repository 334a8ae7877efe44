"""Runs the command line in processes, which a test can kill."""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

import prox24._cli.main

PRELOADED = ["prox24._cli.prune", "prox24._jobs.prune"]
PRELOADED += [
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.configuration_llama",
]


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


def _run(arguments: list[str], cache: str, errors: str, devices: int) -> None:
    """The command line, with programs compiled by an earlier process.

    The file `errors` gets standard error. Standard output, which native code writes to as well,
    gets a file of the same name with the suffix .out.
    """
    output = os.open(Path(errors).with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    # A shell has what it runs in the background ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    with open(errors, "w") as file, contextlib.redirect_stderr(file):
        code = prox24._cli.main.main(arguments)
    sys.stdout.flush()
    os._exit(code)  # XLA's threads are not waited for
