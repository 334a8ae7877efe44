"""Which implementation runs a case: what was measured on this machine, kept in the cache folder."""

import functools
import json
import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib.version

from prox24.packed.cache import available_processors, cache_folder, digest, processor
from prox24.packed.implementation import Case
from prox24.packed.registry import FALLBACK, IMPLEMENTATIONS

logger = logging.getLogger("prox24.packed")


class Measurement(NamedTuple):
    """What was measured of a case.

    Attributes:
      case: the product.
      seconds: of each implementation, by name.
      dense: seconds of the faster one of XLA's products with the dense weight.
    """

    case: Case
    seconds: dict[str, float]
    dense: float

    @property
    def fastest(self) -> str:
        """The implementation that is to run the case: the fallback unless another is faster."""
        return min(self.seconds, key=lambda name: (self.seconds[name], name != FALLBACK))


def table_path(platform: str) -> Path:
    """The file of a platform's table."""
    return cache_folder() / f"matmul-{platform}.json"


def choose(case: Case) -> str:
    """The name of the implementation that runs a case.

    It is that which was fastest for this dtype and shape at this batch, or at the measured batches
    next below and above it, if that is one and the same. It is the fallback everywhere else.
    """
    fastest = {
        measured.case.batch: measured.fastest
        for measured in read(case.platform)
        if measured.case._replace(batch=case.batch) == case
    }
    below = max((batch for batch in fastest if batch <= case.batch), default=None)
    above = min((batch for batch in fastest if batch >= case.batch), default=None)
    if below is None or above is None or fastest[below] != fastest[above]:
        return FALLBACK
    name = fastest[below]
    return name if IMPLEMENTATIONS[name].serves(case) else FALLBACK


SLOWER = 1.02
"""How long a product may take with a packed weight, in units of the dense one, to be as fast."""


def keeps_up(case: Case) -> bool:
    """Whether what runs a case was measured to be as fast as the dense product."""
    return any(
        measured.case == case
        and measured.seconds.get(choose(case), math.inf) <= SLOWER * measured.dense
        for measured in read(case.platform)
    )


def read(platform: str) -> tuple[Measurement, ...]:
    """The table of a platform as it was when this process first asked; empty if there is none.

    One that was made for another device, number of processors that the process may use, jaxlib or
    source of the implementations is not used, nor one that cannot be read, and a line is logged
    that says so.
    """
    try:
        path = table_path(platform)
    except OSError:
        return ()  # Without a folder there is no table.
    return _read(path, platform)


def write(measurements: Iterable[Measurement]) -> None:
    """Adds measurements to the tables of their platforms, in place of earlier ones of these cases.

    Programs that are compiled already stay what they are.
    """
    measurements = list(measurements)
    _read.cache_clear()  # Another process may have written since.
    for platform in sorted({new.case.platform for new in measurements}):
        entries = {old.case: old for old in read(platform)}
        entries |= {new.case: new for new in measurements if new.case.platform == platform}
        text = json.dumps(
            {
                "made_for": made_for(platform),
                "measurements": [
                    {**entry.case._asdict(), "seconds": entry.seconds, "dense": entry.dense}
                    for entry in sorted(entries.values(), key=lambda entry: entry.case)
                ],
            },
            indent=1,
        )
        path = table_path(platform)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
    _read.cache_clear()


def made_for(platform: str) -> dict[str, str]:
    """What the times of a table depend on."""
    device = processor() if platform == "cpu" else jax.devices(platform)[0].device_kind
    sources = sorted(Path(__file__).parent.glob("*.[pch]*"))
    return {
        "device": digest([device]),
        "number of processors": str(available_processors()),
        "jaxlib": jaxlib.version.__version__,
        "sources": digest(path.read_bytes() for path in sources if path.is_file()),
    }


_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,  # of an integer that is no float
    RuntimeError,  # JAX's, where there is no device of the platform
)


@functools.cache
def _read(path: Path, platform: str) -> tuple[Measurement, ...]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        now = made_for(platform)
        stale = [name for name in now if table["made_for"].get(name) != now[name]]
        found = tuple(map(_measurement, table["measurements"]))
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except _UNREADABLE as error:
        logger.warning("%s is no table of measurements and is not used: %r", path, error)
        return ()
    if stale:
        logger.warning(
            "%s was made for another %s and is not used; run `prox24 tune` again",
            path,
            " and ".join(stale),
        )
        return ()
    return found


def _measurement(entry: dict[str, Any]) -> Measurement:
    case = Case(*(entry[field] for field in Case._fields))
    seconds = {name: float(value) for name, value in entry["seconds"].items()}
    dense, numbers = float(entry["dense"]), (case.outputs, case.inputs, case.batch)
    if not (
        all(isinstance(number, int) for number in numbers)
        and all(isinstance(name, str) for name in (case.platform, case.dtype))
        and FALLBACK in seconds
        and seconds.keys() <= IMPLEMENTATIONS.keys()
        and all(0 < value < math.inf for value in (dense, *seconds.values()))
    ):
        raise ValueError(f"{entry} is no measurement")
    return Measurement(case, seconds, dense)
