"""The proximal operator on blocks in planar form, for callers that keep their data planar.

Plane i holds entry i of every block. `split` makes planes of an array, and `join` undoes it. `prox`
is then arithmetic on whole contiguous arrays.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from prox24._core import keep_one, keep_two
from prox24._core.blocks import join, split, unit_norms
from prox24._core.precision import working_dtype

__all__ = ["join", "prox", "split"]

OPERATORS = {1: keep_one, 2: keep_two}


def prox(
    planes: Sequence[Array], lam: ArrayLike, kept: int = 2, unit: int = 1
) -> tuple[Array, ...]:
    """prox_{lam R}(y) on planes; `prox24.prox` defines the operator.

    Args:
      planes: arrays of one shape and dtype, one for each entry of a block: M times `unit` arrays.
      lam: nonnegative, a scalar or an array that broadcasts to the shape of a plane. The result is
        NaN where lam is negative.
      kept: N of the pattern N:M, 1 or 2.
      unit: number of entries that are kept or pruned together.

    Returns:
      As many arrays as `planes`, of the same shape and dtype.

    Raises:
      ValueError: `kept` is not 1 or 2, the dtype is not floating-point, `lam` does not broadcast,
        or the planes are not whole units.

    Example:
      >>> planes = [jnp.full((1,), y) for y in (1.0, 0.8, 0.6, 0.4)]
      >>> [round(float(w[0]), 3) for w in prox(planes, 0.3)]
      [0.911, 0.681, 0.404, 0.021]
    """
    if not len(planes) or len(planes) % unit:
        raise ValueError(f"{len(planes)} planes are not whole units of {unit} entries")
    check_kept(kept, len(planes) // unit)
    given = planes[0].dtype
    if not jnp.issubdtype(given, jnp.floating):
        raise ValueError(f"prox needs floating-point entries, not {given}")
    dtype = working_dtype(given)
    lam = jnp.asarray(lam).astype(dtype)
    if lam.ndim:
        lam = _broadcast(lam, planes[0].astype(dtype))
    lam = jnp.where(lam < 0, jnp.nan, lam)  # A negative lam must not pass as the identity.
    y = [plane.astype(dtype) for plane in planes]
    w = _prox(tuple(y), lam, kept) if unit == 1 else _prox_of_units(y, lam, kept, unit)
    return tuple(plane.astype(given) for plane in w)


def _prox_of_units(y: Sequence[Array], lam: Array, kept: int, unit: int) -> list[Array]:
    """Each unit keeps its direction; the operator on the norms gives its norm (docs/theory.md)."""
    # The norm of finite entries may be too large for a number.
    norms = [jnp.minimum(norm, jnp.finfo(lam.dtype).max) for norm in unit_norms(y, unit)]
    shrunk = _prox(tuple(norms), lam, kept)

    free = (lam == 0) | _is_blank(norms, kept)
    tiny, largest = jnp.finfo(lam.dtype).tiny, jnp.finfo(lam.dtype).max

    def scaled(entry: Array, norm: Array, short: Array) -> Array:
        safe = jnp.where(norm == 0, 1, norm)
        # The derivative of a ratio has the square of its denominator. The square of a very short or
        # very long norm is 0 or infinite, so the denominator is scaled to 1.
        size = lax.stop_gradient(jnp.clip(1 / safe, tiny, largest))
        whole, part = safe * size, short * size
        # Exactly 1 where nothing shrinks, with the derivative of the ratio.
        ratio = jnp.where(short == norm, 1 + (part - whole) / whole, part / whole)
        # A unit of zeros has no direction. It has the derivative of a zero entry.
        zero = jnp.where(free & (short == norm), entry, short)
        return jnp.where(norm == 0, zero, jnp.where(short == 0, 0, entry * ratio))

    return [scaled(y[i], norms[i // unit], shrunk[i // unit]) for i in range(len(y))]


def check_kept(kept: int, group: int) -> None:
    """Raises ValueError, and names alternatives, unless the pattern has a proximal operator."""
    if kept not in OPERATORS:
        raise ValueError(
            f"the proximal operator supports 1:M and 2:M, not {kept}:{group}; "
            "magnitude, wanda, sparsegpt and ADMM(penalty=None) support any N:M"
        )


def _broadcast(lam: Array, plane: Array) -> Array:
    try:
        fits = jnp.broadcast_shapes(lam.shape, plane.shape) == plane.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"lam of shape {lam.shape} does not broadcast to the blocks, of shape {plane.shape}"
        )
    # A sum shards lam like the plane. broadcast_to would not.
    return jnp.zeros_like(plane) + lam.reshape((1,) * (plane.ndim - lam.ndim) + lam.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
@functools.partial(jax.jit, static_argnums=2)
def _prox(y: tuple[Array, ...], lam: Array, kept: int) -> tuple[Array, ...]:
    magnitudes = [jnp.abs(entry) for entry in y]
    tiny, largest = jnp.finfo(lam.dtype).tiny, jnp.finfo(lam.dtype).max
    # An infinite lam times a zero would be NaN.
    shrunk = OPERATORS[kept].shrink(magnitudes, jnp.minimum(lam, largest))

    def signed(entry: Array, magnitude: Array, w: Array) -> Array:
        moved = jnp.where(w < tiny, 0, jnp.where(entry < 0, -w, w))
        return jnp.where(w == magnitude, entry, moved)

    return tuple(signed(*entry) for entry in zip(y, magnitudes, shrunk, strict=True))


def _is_blank(entries: Sequence[Array], kept: int) -> Array:
    """Whether a block is zero and its derivative is the identity (docs/theory.md, section 9).

    There the penalty of 2:M has third order, and the operator of 1:M has no derivative.
    """
    if kept == 1:
        return jnp.zeros(entries[0].shape, bool)
    return functools.reduce(jnp.logical_and, (entry == 0 for entry in entries))


@_prox.defjvp
def _prox_jvp(
    kept: int,
    primals: tuple[tuple[Array, ...], Array],
    tangents: tuple[tuple[Array, ...], Array],
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    # The implicit function theorem on the support of w: H dw = dy - dlam grad R(w).
    (y, lam), (dy, dlam) = primals, tangents
    w = _prox(y, lam, kept)
    signs = [jnp.where(entry < 0, -1, 1).astype(lam.dtype) for entry in y]
    blank = _is_blank(w, kept)
    # Without a penalty the operator is the identity, also on zeros.
    support = [(entry != 0) | (lam == 0) | blank for entry in w]
    # In a block of at most N nonzeros the penalty acts on none. With lam and w set to zero there,
    # no product overflows and becomes NaN in a gradient.
    acting = sum((entry != 0).astype(lam.dtype) for entry in w) > kept
    lam = jnp.where(acting, lam, 0)
    magnitudes = [jnp.where(acting, jnp.abs(entry), 0) for entry in w]
    # An infinite slope times a tangent of zero would be NaN. Zero entries stay zero for every lam.
    largest = jnp.finfo(lam.dtype).max
    slopes = [
        jnp.where(entry != 0, jnp.minimum(slope, largest), 0)
        for entry, slope in zip(w, OPERATORS[kept].gradient(magnitudes), strict=True)
    ]
    r = [
        jnp.where(here, sign * d - dlam * slope, 0)
        for here, sign, d, slope in zip(support, signs, dy, slopes, strict=True)
    ]
    dw = OPERATORS[kept].solve(magnitudes, support, lam, r)
    dw = [jnp.where(blank, own, d) for own, d in zip(r, dw, strict=True)]
    return w, tuple(sign * d for sign, d in zip(signs, dw, strict=True))
