"""The `prox24` command: finds the command's module, and ends errors as one line with exit code 2.

`prox24 --help` imports no JAX: a command's module is imported when its name is given.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.util
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from prox24 import __version__
from prox24._cli.compiled import keep_programs
from prox24._cli.malloc import start_with_settings
from prox24.errors import Prox24Error, first_line, missing_package

COMMANDS = {
    "prune": "prune a checkpoint, and write one that transformers loads",
    "distill": "train what is kept of a pruned model on the dense model's predictions",
    "plan": "estimate the memory of pruning, before it starts",
    "verify": "check a pruned model, its manifest and its source",
    "eval": "measure the perplexity of a model on a text",
    "generate": "continue a prompt",
    "inspect": "list what would be pruned",
    "convert": "write a checkpoint in another format",
    "demo": "prune SmolLM2-135M by three methods and compare them",
}
"""The commands. Each is a module of this package with `add_arguments` and `run`."""


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and runs one command.

    Returns:
      The exit code: 0 on success, and 1 if `verify` finds a problem. With one line on standard
      error it is 2 after an error. After SIGINT or SIGTERM it is 128 plus the signal's number, also
      with one line. After a closed pipe it is 128 plus the number of SIGPIPE, without a line.
    """
    given = sys.argv[1:] if arguments is None else arguments
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell's >&-
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if arguments is None and set(given) & set(COMMANDS) and not set(given) & {"-h", "--help"}:
        start_with_settings()
        _hide_torch()
    # Imports and traces make objects that stay: looking for garbage among them takes a tenth of a
    # short command's time.
    gc.set_threshold(10_000, 50, 50)
    if hasattr(sys.stdout, "reconfigure"):  # A table may have characters that an encoding lacks.
        sys.stdout.reconfigure(errors="replace")
    try:
        parsed = parser(given).parse_args(given)
        with _ended_by(signal.SIGTERM), _lines_without_a_terminal(parsed):
            keep_programs()
            code = int(parsed.run(parsed))
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # the reader of standard output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # SIGPIPE; some systems lack its name
    except (Exception, KeyboardInterrupt) as error:
        cause = _interrupt(error)
        if isinstance(cause, Terminated):
            return _end("ended by SIGTERM", error, 128 + signal.SIGTERM)
        if cause is not None:
            return _end("interrupted", error, 128 + signal.SIGINT)
        said = _said(error)
        if said is None:
            raise
        return _end(f"error: {said}", error, 2)


def _hide_torch() -> None:
    """Makes transformers do without torch, whose import takes seconds. Only torchax needs it."""
    if importlib.util.find_spec("torchax") is None:
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


class _Parser(argparse.ArgumentParser):
    """Says an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"prox24: error: {message}; see {self.prog} --help\n")


def parser(arguments: list[str]) -> argparse.ArgumentParser:
    """The parser of all commands; only the given command gets its options."""
    top = _Parser(prog="prox24", description="Prunes language models to N:M sparsity, in JAX.")
    top.add_argument("--version", action="version", version=f"prox24 {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, said in COMMANDS.items():
        command = commands.add_parser(name, help=said, description=f"{said[0].upper()}{said[1:]}.")
        if name == named:
            module = importlib.import_module(f"prox24._cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return top


def _interrupt(error: BaseException | None) -> KeyboardInterrupt | None:
    """The interrupt that an error is or comes from, if any.

    A signal can arrive in Python code that C code calls. CPython may then raise SystemError from
    the interrupt.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__
    return error


def _said(error: BaseException) -> str | None:
    """The message of an error that a user can correct; None for an error of the program."""
    if isinstance(error, Prox24Error | OSError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        missing = missing_package("this command", error)
        return None if missing is None else str(missing)
    if isinstance(error, MemoryError):
        return f"out of memory: {error}"
    if isinstance(error, UnicodeError):  # from a name or an argument without valid UTF-8
        return f"text that is no Unicode: {error}"
    import jax

    from prox24._jobs.processes import is_missing_device

    if isinstance(error, jax.errors.JaxRuntimeError):
        return f"a device fails: {first_line(error)}"
    return first_line(error) if is_missing_device(error) else None


@contextlib.contextmanager
def _lines_without_a_terminal(parsed: argparse.Namespace) -> Iterator[None]:
    """Logs a line for each layer if standard error is no terminal: a bar would fill a file."""
    quiet = vars(parsed).get("quiet", True)
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if quiet or sys.stderr.isatty():
        yield
        return
    import logging

    from prox24._jobs.progress import log_to

    with log_to(logging.StreamHandler()):
        yield


class Terminated(KeyboardInterrupt):
    """The process received SIGTERM."""


@contextlib.contextmanager
def _ended_by(number: signal.Signals) -> Iterator[None]:
    """Lets a signal end the block as Ctrl-C does, so that files and progress stay in order."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return
    before = signal.signal(number, end)
    try:
        yield
    finally:
        signal.signal(number, before)


def _end(message: str, error: BaseException, code: int) -> int:
    text = "; ".join([message, *getattr(error, "__notes__", ())])
    print("prox24:", re.sub(r"\s*\n\s*", " ", text.strip()), file=sys.stderr)
    if "jax" in sys.modules:
        from prox24._jobs.processes import leave

        leave(code)
    return code
