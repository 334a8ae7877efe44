"""Measures the implementations against each other, for the table that `matmul` chooses by."""

import functools
import logging
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prox24.errors import first_line
from prox24.packed.codes import (
    BITS,
    BLOCK,
    CODES_PER_WORD,
    ENTRIES_PER_WORD,
    KEPT,
    PAIRS,
    words_of,
)
from prox24.packed.format import Packed24, unpack
from prox24.packed.implementation import Case
from prox24.packed.registry import FALLBACK, IMPLEMENTATIONS
from prox24.packed.table import Measurement

logger = logging.getLogger("prox24.packed")

DENSE: dict[str, Callable[[Array, Array], Array]] = {
    "dense x W^T": lambda x, w: x @ w.T,
    "dense W x^T": lambda x, w: (w @ x.T).T,
}
"""XLA's products with a dense weight, either of which may be the faster one."""


def measure(case: Case, repetitions: int = 9, seed: int = 0) -> Measurement:
    """Median seconds of each implementation that serves a case, and of dense, on random data.

    One that the device cannot run, or whose result is not that of the fallback, is left out, and a
    line is logged that says why. The others are run twice to warm up. Every repetition then runs
    all of them, starting one further than the last, so that a change in the machine's speed meets
    all.

    Args:
      case: its platform has a device here.
      repetitions: timings of each.
      seed: of the data.
    """
    rng = np.random.default_rng(seed)
    w = random_packed(rng, case.outputs, case.inputs, case.dtype)
    x = jnp.asarray(rng.standard_normal((case.batch, case.inputs), np.float32), case.dtype)
    device = jax.devices(case.platform)[0]
    operands = jax.device_put((x, w.values, w.codes), device)
    dense = jax.device_put((x, unpack(w)), device)
    programs = {name: functools.partial(jax.jit(form), *dense) for name, form in DENSE.items()}
    for name, implementation in IMPLEMENTATIONS.items():
        if implementation.serves(case):
            program = functools.partial(jax.jit(implementation.run), *operands)
            problem = None if name == FALLBACK else _problem(program, programs[FALLBACK])
            if problem is None:
                programs[name] = program
            else:
                logger.warning("%s is not used for %s: %s", name, case, problem)
    names = list(programs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(-2, repetitions):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            jax.block_until_ready(programs[name]())
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    fastest_dense = min(medians.pop(name) for name in DENSE)
    return Measurement(case, medians, fastest_dense)


def _problem(program: Callable[[], Array], fallback: Callable[[], Array]) -> str | None:
    """What is wrong where a program does not run, or puts out what the fallback does not.

    Results may differ by the rounding of sums and of the dtype.
    """
    try:
        found = np.asarray(program(), np.float64)
    except jax.errors.JaxRuntimeError as error:
        return first_line(error)
    expected = fallback()
    tolerance = max(4 * float(jnp.finfo(expected.dtype).eps), 1e-5)
    exact = np.asarray(expected, np.float64)
    difference = np.max(np.abs(found - exact)) / np.max(np.abs(exact))
    return None if difference <= tolerance else f"its result differs by {difference:.1e}"


def random_packed(rng: np.random.Generator, outputs: int, inputs: int, dtype: str) -> Packed24:
    """A weight of standard normal values in random places.

    Args:
      rng: what is drawn from.
      outputs: rows.
      inputs: columns, a multiple of four.
      dtype: one of those that `pack` takes.

    Example:
      >>> random_packed(np.random.default_rng(0), 2, 64, "float32").shape
      (2, 64)
    """
    values = rng.standard_normal((outputs, inputs // BLOCK * KEPT), np.float32)
    codes = np.zeros((outputs, words_of(inputs), CODES_PER_WORD), np.uint32)
    every = codes.reshape(outputs, -1)[:, : inputs // BLOCK]
    every[...] = rng.choice(np.array(PAIRS, np.uint32), every.shape)
    words = np.bitwise_or.reduce(
        codes << BITS * np.arange(CODES_PER_WORD, dtype=np.uint32), axis=-1
    )
    return Packed24(
        jnp.asarray(values, dtype), jnp.asarray(words), remainder=inputs % ENTRIES_PER_WORD
    )
