"""Measures the implementations against each other, for the table that `matmul` chooses by."""

import functools
import logging
import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

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
CALLS = 32
"""Products in a program that is timed, where it takes longer to start one than to multiply."""


def measure(case: Case, repetitions: int = 9, seed: int = 0) -> Measurement:
    """Median seconds of each implementation that serves a case, and of dense, on random data.

    One that the device cannot run, or whose result is not that of the fallback, is left out, and a
    line is logged that says why. Every repetition runs all others, starting one further than the
    last, so that a change in the machine's speed meets all; the first does not count. Each runs for
    a while before it is timed: a processor that had nothing to do is slow at first, which it is not
    within a model. Where it takes longer to start a program than to multiply, which is not on CPUs,
    a program makes `CALLS` products, and a product has its share of the time. All are of one
    weight: if a cache holds it, it is read faster than in a model.

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
    calls = calls_of(case.platform)
    programs = {
        name: functools.partial(repeated(form, calls), *dense) for name, form in DENSE.items()
    }
    expected = jax.jit(IMPLEMENTATIONS[FALLBACK].run)(*operands)
    for name, implementation in IMPLEMENTATIONS.items():
        if implementation.serves(case):
            single, program = (
                functools.partial(repeated(implementation.run, times), *operands)
                for times in (1, calls)
            )
            problem = None if name == FALLBACK else _problem(single, program, expected)
            if problem is None:
                programs[name] = program
            else:
                logger.warning("%s is not used for %s: %s", name, case, problem)
    seconds = {name: taken / calls for name, taken in medians(programs, repetitions).items()}
    fastest_dense = min(seconds.pop(name) for name in DENSE)
    return Measurement(case, seconds, fastest_dense)


WAKING_SECONDS = 0.02


def medians(programs: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median seconds of each program, by name, in turns; see `measure`.

    Args:
      programs: what they return is waited for.
      repetitions: timings of each, after one that does not count.

    Example:
      >>> sorted(medians({"a": lambda: 0, "b": lambda: 0}, repetitions=3))
      ['a', 'b']
    """
    names = list(programs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(-1, repetitions):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            _wake(programs[name])
            start = time.perf_counter()
            jax.block_until_ready(programs[name]())
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _wake(program: Callable[[], object]) -> None:
    """Runs a program until a processor that had nothing to do before is as fast as it gets."""
    end = time.perf_counter() + WAKING_SECONDS
    jax.block_until_ready(program())
    while time.perf_counter() < end:
        jax.block_until_ready(program())


def calls_of(platform: str) -> int:
    """Products in a program that is timed."""
    return 1 if platform == "cpu" else CALLS


def repeated(run: Callable[..., Array], calls: int) -> Callable[..., Array]:
    """A program of so many products, each of which needs the one before.

    Args:
      run: of x (batch, in) and the arrays of a weight.
      calls: how many.

    Returns:
      The last product; the first entry of each vector is that of the product before.

    Example:
      >>> x, w = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])
      >>> repeated(lambda x, w: x @ w.T, 2)(x, w).tolist()  # 3 (3 + 8) + 8
      [[41.0]]
    """

    def program(x: Array, *weight: Array) -> Array:
        def product(x: Array) -> Array:
            # Tied to x, so that nothing is made of the weight once for all; and made as a whole.
            tied = lax.optimization_barrier((x, *weight))
            return lax.optimization_barrier(run(*tied))

        def step(_: Array, x: Array) -> Array:
            return x.at[:, 0].set(product(x)[:, 0])

        return product(lax.fori_loop(0, calls - 1, step, x))

    return jax.jit(run if calls == 1 else program)


def _problem(
    single: Callable[[], Array], program: Callable[[], Array], expected: Array
) -> str | None:
    """What is wrong where a program does not run, or the first puts out what is not expected.

    Results may differ by the rounding of sums and of the dtype.
    """
    try:
        found = np.asarray(single(), np.float64)
        jax.block_until_ready(program())
    except Exception as error:  # a kernel's, or that of its compiler, whatever it raises
        return first_line(error)
    exact = np.asarray(expected, np.float64)
    if found.shape != exact.shape:
        return f"its result is of shape {found.shape}, not {exact.shape}"
    of_sums = 1e-5 * np.max(np.abs(exact))
    of_dtype = 1.5 * float(jnp.finfo(expected.dtype).eps) * np.abs(exact)
    difference = np.abs(found - exact)
    if np.all(difference <= of_sums + of_dtype):
        return None
    return f"its result differs by {np.max(difference) / np.max(np.abs(exact)):.1e}"


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
