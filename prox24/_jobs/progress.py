"""Progress: a bar in a terminal, lines of a log, and figures for programs.

The logger `prox24` gets the lines. The logger `prox24.metrics` gets a JSON object for each figure.
Both use the level INFO. The command line attaches handlers; a program may attach its own.
"""

import collections
import contextlib
import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import Any

from prox24._jobs.processes import is_first

LOG = logging.getLogger("prox24")
METRICS = logging.getLogger("prox24.metrics")
METRICS.propagate = False  # JSON must not appear between the lines of a log.

Advance = Callable[[str, float | None], None]
"""Called after each step, with its name and its relative loss."""
_Step = Callable[[str, float | None, float], None]
_WHOLE: ContextVar[_Step | None] = ContextVar("whole", default=None)


@contextlib.contextmanager
def progress_bar(
    title: str,
    steps: int | Collection[str],
    quiet: bool,
    *,
    done: Collection[str] = (),
    log: bool = True,
) -> Iterator[Advance]:
    """A bar on standard error. `steps` has their names, or their number; `done` has finished ones.

    The steps of one layer are one line of the log; the first number in a name is the layer. Inside
    `whole_bar` the steps move that bar.
    """
    total = steps if isinstance(steps, int) else len(steps)
    note = _log_lines(title, steps, done) if log else lambda name, loss: None
    whole = _WHOLE.get()
    shown = _bar(title, total, quiet, len(done)) if whole is None else contextlib.nullcontext()
    with shown as step:

        def advance(name: str, loss: float | None) -> None:
            note(name, loss)
            if step is not None:
                step(name, loss, 1)
            elif whole is not None:
                whole(f"{title} {short(name)}", loss, 1 / (total or 1))

        yield advance


@contextlib.contextmanager
def whole_bar(title: str, parts: int, quiet: bool) -> Iterator[None]:
    """One bar for several jobs: each `progress_bar` inside is one part."""
    with _bar(title, parts, quiet) as step:
        token = _WHOLE.set(step)
        try:
            yield
        finally:
            _WHOLE.reset(token)


def metric(event: str, figures: Mapping[str, Any]) -> None:
    """Logs one object to `prox24.metrics`: the event, the Unix time in seconds, the figures.

    JSON has no NaN and no infinite numbers; such a figure becomes None.
    """
    if METRICS.isEnabledFor(logging.INFO):
        known = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in figures.items()
        }
        METRICS.info(json.dumps({"event": event, "time": time.time(), **known}))


@contextlib.contextmanager
def log_to(
    handler: logging.Handler,
    logger: logging.Logger = LOG,
    line: str = "%(asctime)s %(message)s",
) -> Iterator[None]:
    """Sends the log of the block to a handler alone, in the first process.

    A package may have given the root logger a handler, which would write each line again.
    """
    handler.setFormatter(logging.Formatter(line, "%Y-%m-%d %H:%M:%S"))
    handler.addFilter(lambda record: is_first())
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.setLevel(before[0])
        logger.propagate = before[1]
        logger.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def written_logs(lines: Path | None, figures: Path | None) -> Iterator[None]:
    """Appends the log and the figures of the block to two files."""
    with contextlib.ExitStack() as stack:
        for path, logger, line in (
            (lines, LOG, "%(asctime)s %(message)s"),
            (figures, METRICS, "%(message)s"),
        ):
            if path is not None:
                handler = _LogFile(path, encoding="utf-8", delay=True)
                stack.enter_context(log_to(handler, logger, line))
        yield


class _LogFile(logging.FileHandler):
    """A file of a log. If its disk is full, one line says so, and the job goes on."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Says once that a line is lost."""
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.failed:
            print(f"prox24: cannot write {self.baseFilename}: {error}", file=sys.stderr)
            self.failed = True

    def close(self) -> None:
        """Closes the file; the error of a line would occur again."""
        with contextlib.suppress(OSError):
            super().close()


def layer_of(name: str) -> str:
    """The layer in the name of a step, or the name itself.

    Example:
      >>> layer_of("model.layers.12.mlp.up_proj.weight"), layer_of("step 3 of 9"), layer_of("head")
      ('layers.12', 'step 3 of 9', 'head')
    """
    found = re.match(r"(?:.*?\.)?([a-z]+\.\d+)\.", name)
    return found[1] if found else name


def short(name: str) -> str:
    """The short form of a tensor's name, from the number of its layer.

    Example:
      >>> short("model.layers.12.mlp.up_proj.weight"), short("lm_head.weight")
      ('12.mlp.up_proj', 'lm_head')
    """
    return re.sub(r"^\D*\.(?=\d+\.)", "", name).removesuffix(".weight")


def _log_lines(title: str, steps: int | Collection[str], done: Collection[str]) -> Advance:
    """Logs a line after the last step of each layer, or after each step without names."""
    names = [] if isinstance(steps, int) else [name for name in steps if name not in done]
    left = collections.Counter(map(layer_of, names))
    lines = steps if isinstance(steps, int) else len({layer_of(name) for name in steps})
    remaining = steps if isinstance(steps, int) else len(names)
    losses = collections.defaultdict[str, list[float]](list)
    begun = set(map(layer_of, done))  # The loss of such a layer's earlier steps is not known here.
    began, taken, finished = time.monotonic(), 0, lines - (len(left) or lines)

    def note(name: str, loss: float | None) -> None:
        nonlocal taken, finished
        taken += 1
        layer = layer_of(name)
        left[layer] -= 1
        if loss is not None and layer not in begun:
            losses[layer].append(loss)
        if left[layer] > 0:
            return
        finished += 1
        own, elapsed = losses.pop(layer, []), time.monotonic() - began
        mean = f", loss {sum(own) / len(own):.4f}" if own else ""
        ahead = elapsed / taken * max(0, remaining - taken)
        times = (timedelta(seconds=round(seconds)) for seconds in (elapsed, ahead))
        LOG.info("%s %d/%d %s%s, %s elapsed, %s left", title, finished, lines, layer, mean, *times)

    return note


@contextlib.contextmanager
def _bar(title: str, total: int, quiet: bool, done: int = 0) -> Iterator[_Step | None]:
    from rich import progress as rich
    from rich.console import Console
    from rich.table import Column

    console = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
    last = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(20),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[loss]}"),
        rich.TextColumn("{task.fields[latest]}", table_column=last),
    )
    with rich.Progress(*columns, console=console, transient=True, expand=True) as progress:
        task = progress.add_task(title, total=total, completed=done, latest="", loss="")

        def step(name: str, loss: float | None, share: float) -> None:
            said = "" if loss is None else f"loss {loss:.4f}"
            progress.update(task, advance=share, latest=short(name), loss=said)

        yield step
