"""Blocks of four entries as two values and a code: the arithmetic of the packed format.

A code has four bits. The two low bits are the place of the first kept entry. The two high bits are
the place of the second kept entry, which comes later. Eight codes make a word, the first in its
lowest bits, so a word describes 32 entries. Unused bits of the last word are zero.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from prox24._core.blocks import join, ranks, split

BLOCK = 4
KEPT = 2
CODES_PER_WORD = 8
ENTRIES_PER_WORD = CODES_PER_WORD * BLOCK
VALUES_PER_WORD = CODES_PER_WORD * KEPT
BITS = 4
PAIRS = tuple(first | second << 2 for second in range(BLOCK) for first in range(second))
"""The six codes that are valid."""


def words_of(entries: int) -> int:
    """The number of words for a number of entries."""
    return -(-entries // ENTRIES_PER_WORD)


def compress(w: Array) -> tuple[Array, Array, Array]:
    """The values and codes of all blocks, and whether each block has more than two nonzeros.

    An entry is zero if all its bits except the sign are zero. So NaN is nonzero, and so is a
    subnormal number, which arithmetic may treat as zero.

    A block with fewer than two nonzeros first keeps entries -0.0, which would lose their sign, and
    then its earliest zeros. In a block with more than two nonzeros, the values are NaN.

    Example:
      >>> values, codes, excess = compress(jnp.array([0.0, 2.0, 0.0, 3.0]))
      >>> values.tolist(), bin(codes[0]), excess.tolist()
      ([2.0, 3.0], '0b1101', [False])
    """
    values, codes, excess = _compressed(lax.stop_gradient(w))
    return _kept(w, values, codes), codes, excess


def _compressed(w: Array) -> tuple[Array, Array, Array]:
    planes = split(_bits(w))
    sign = planes[0].dtype.type(1 << (8 * w.dtype.itemsize - 1))
    nonzero = [(plane & ~sign) != 0 for plane in planes]
    scores = [
        2 * here.astype(jnp.int32) + (plane == sign).astype(jnp.int32)
        for here, plane in zip(nonzero, planes, strict=True)
    ]
    kept = [rank < KEPT for rank in ranks(scores)]
    places = [jnp.full_like(kept[0], i, jnp.uint32) for i in range(BLOCK)]
    first, second = _pick(kept, places)
    excess = sum(here.astype(jnp.int32) for here in nonzero) > KEPT
    nan = _bits(jnp.array(jnp.nan, w.dtype))
    values = join([jnp.where(excess, nan, entry) for entry in _pick(kept, planes)])
    values = lax.bitcast_convert_type(values, w.dtype)
    return values, _to_words(first | second << 2), excess


@jax.custom_jvp
def _kept(w: Array, values: Array, codes: Array) -> Array:
    """The values of w at the codes, as they are given, and with the derivative of `gather`."""
    del w, codes
    return values


@_kept.defjvp
def _kept_jvp(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    _, values, codes = primals
    return values, gather(tangents[0], codes)


@jax.custom_jvp
def expand(values: Array, codes: Array) -> Array:
    """Undoes `compress`: every value in its place, and zeros."""
    return lax.bitcast_convert_type(place(_bits(values), codes), values.dtype)


@expand.defjvp
def _expand_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    return expand(*primals), place(tangents[0], primals[1])


def place(values: Array, codes: Array) -> Array:
    """`expand` as arithmetic, which is linear in the values and which JAX can transpose."""
    *shape, count = values.shape
    words = codes.shape[-1]
    rest = words * VALUES_PER_WORD - count
    if rest:
        values = jnp.pad(values, [(0, 0)] * len(shape) + [(0, rest)])
    # Broadcasting makes one loop. In XLA's CPU backend it is twice as fast as planes.
    pairs = values.reshape(*shape, words, CODES_PER_WORD, KEPT)
    code = _split_words(codes)[..., None]
    lane = np.arange(BLOCK, dtype=np.uint32).reshape(*[1] * codes.ndim, 1, BLOCK)
    first = jnp.where((code & 3) == lane, pairs[..., :1], jnp.zeros((), values.dtype))
    dense = jnp.where((code >> 2) == lane, pairs[..., 1:], first)
    dense = dense.reshape(*shape, words * ENTRIES_PER_WORD)
    return dense[..., : count // KEPT * BLOCK] if rest else dense


def gather(dense: Array, codes: Array) -> Array:
    """The entries that the codes keep: the transpose of `expand`, which is linear in the values."""
    planes = split(dense)
    code = _split_words(codes).reshape(*codes.shape[:-1], codes.shape[-1] * CODES_PER_WORD)
    code = code[..., : planes[0].shape[-1]]
    kept = [((code & 3) == i) | ((code >> 2) == i) for i in range(BLOCK)]
    return join(_pick(kept, planes))


def _split_words(codes: Array) -> Array:
    """The codes of each word, (..., words, 8)."""
    shifts = BITS * np.arange(CODES_PER_WORD, dtype=np.uint32)
    return codes[..., None] >> shifts.reshape(*[1] * codes.ndim, -1) & (2**BITS - 1)


def _to_words(code: Array) -> Array:
    rest = -code.shape[-1] % CODES_PER_WORD
    if rest:
        code = jnp.pad(code, [(0, 0)] * (code.ndim - 1) + [(0, rest)])
    planes = split(code, (1, CODES_PER_WORD))
    return functools.reduce(jnp.bitwise_or, [plane << BITS * i for i, plane in enumerate(planes)])


def _bits(x: Array) -> Array:
    """The bits as unsigned integers, which XLA moves unchanged; it moves bfloat16 as float32."""
    return lax.bitcast_convert_type(x, np.dtype(f"uint{8 * x.dtype.itemsize}"))


def _pick(kept: list[Array], planes: list[Array]) -> list[Array]:
    """The first and the second kept entry of each block, where exactly two are kept."""
    first = jnp.where(kept[0], planes[0], jnp.where(kept[1], planes[1], planes[2]))
    second = jnp.where(kept[3], planes[3], jnp.where(kept[2], planes[2], planes[1]))
    return [first, second]
