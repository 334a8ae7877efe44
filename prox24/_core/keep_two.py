"""The proximal operator of e3, which keeps two of a block: one scalar root per support size.

Notation, on one block: v = lam |y| in descending order, u = lam |w| for the minimiser w,
s = sum(u), E = e2(u), D_i = 1 - s + 2 u_i. On a support of the k largest entries, Y is the sum of
v. Everything is planar: each name is an array over all blocks. docs/theory.md derives the
equations.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from prox24._core.blocks import descending, ranks

# For v1 >= (1 + sqrt 2) / 2 two entries are kept, and no equation has to be solved.
LARGEST_SOLVABLE = 1.2072
NEWTON_STEPS = {"float32": 8, "float64": 16}


class Support(NamedTuple):
    """A candidate: the size of its support, its root, and the numbers that its entries share.

    Attributes:
      size: k, a Python int or a float array.
      root: of the equation for k.
      root_is_sum: whether the root is s. If not, it is D_k for k >= 4, and 2 u_3 - v_3 for k = 3.
      smallest: v_k.
      s: the sum of u, for k >= 4.
      e2: E, for k >= 4.
    """

    size: int | Array
    root: Array
    root_is_sum: Array
    smallest: Array
    s: Array
    e2: Array


def shrink(magnitudes: Sequence[Array], lam: Array) -> list[Array]:
    """|w| of the minimiser, planar: argmin over w >= 0 of 1/2 |w - y|^2 + lam e3(w).

    Args:
      magnitudes: M arrays |y| of one shape and dtype, float32 or float64.
      lam: nonnegative, a scalar or an array of that shape, of that dtype.

    Returns:
      M arrays with entries from 0 to |y|. Entries without shrinkage equal those of `magnitudes`. A
      block is NaN if one of its entries or its lam is NaN.
    """
    values = [jnp.minimum(lam * magnitude, 2 * LARGEST_SOLVABLE) for magnitude in magnitudes]
    chosen = _choose(descending(values))
    size = chosen.size
    unit = 1 / jnp.maximum(lam, jnp.finfo(lam.dtype).tiny)

    def restore(magnitude: Array, value: Array, place: Array) -> Array:
        lost = _loss(value, place == size - 1, chosen)
        w = jnp.where(lost < value, magnitude - lost * unit, 0)
        kept = jnp.where(place < size, jnp.where(size == 2, magnitude, w), 0)
        # The size is 0 if nothing moves, or NaN.
        return jnp.where(size > 0, kept, magnitude + size)

    places = [rank.astype(lam.dtype) for rank in ranks(magnitudes)]
    return [restore(*entry) for entry in zip(magnitudes, values, places, strict=True)]


def gradient(w: Sequence[Array]) -> list[Array]:
    """Gradient of e3 at w >= 0: for each entry e2 of the others.

    It adds sums over prefixes and suffixes. The formula e2(w) - w_i (sum(w) - w_i) would lose
    digits by cancellation.

    Args:
      w: M arrays of one shape.

    Returns:
      M arrays of that shape.
    """

    def running(entries: Sequence[Array]) -> list[tuple[Array, Array]]:
        e1 = e2 = jnp.zeros_like(w[0])
        sums = []
        for entry in entries:
            sums.append((e1, e2))
            e1, e2 = e1 + entry, e2 + e1 * entry
        return sums

    before, after = running(w), reversed(running(list(reversed(w))))
    return [a2 + b2 + a1 * b1 for (a1, a2), (b1, b2) in zip(before, after, strict=True)]


def solve(
    w: Sequence[Array], support: Sequence[Array], lam: Array, r: Sequence[Array]
) -> list[Array]:
    """H^-1 r on the support, for the Hessian H of `shrink`'s objective.

    H_ij = lam (s - w_i - w_j) with s = sum(w), and the diagonal is 1. H is a diagonal D plus a
    matrix of rank two, so the solution has a closed form. D_k may be zero at a regular minimum, and
    this form never divides by D_k.

    Args:
      w: M arrays |w|, a minimiser; zero in blocks that keep two entries or fewer.
      support: M bool arrays.
      lam: as in `shrink`.
      r: M arrays, zero off the support.

    Returns:
      M arrays, zero off the support.
    """
    size = _add([kept.astype(lam.dtype) for kept in support])
    last = [rank.astype(lam.dtype) == size - 1 for rank in ranks(w)]

    def total(values: Sequence[Array], where: Sequence[Array]) -> Array:
        return _add([jnp.where(h, value, 0) for h, value in zip(where, values, strict=True)])

    u = [lam * entry for entry in w]
    s = _add(u)
    diagonal = [1 - s + 2 * entry for entry in u]
    others = [kept & ~here for kept, here in zip(support, last, strict=True)]
    inverse = [
        jnp.where(here, 1 / jnp.where(here, d, 1), 0)
        for here, d in zip(others, diagonal, strict=True)
    ]
    half = jnp.where(size > 2, (size - 2) / 2, 1)
    d_k, r_k = total(diagonal, last), total(r, last)
    inverses = _add(inverse)
    weighted = _add([i * x for i, x in zip(inverse, r, strict=True)])
    e = 1 - total(diagonal, support) / 4
    determinant = jnp.square(half) * d_k + e * (1 + d_k * inverses)
    h = jnp.square(half) * r_k + e * (r_k * inverses - weighted) - half * _add(r) / 2
    h = h / jnp.where(size > 2, determinant, 1)
    shift = r_k - d_k * h
    mean = (shift * inverses - weighted - h) / half / 2
    solved = [
        jnp.where(here, mean + h, mean + (x - shift) * i)
        for here, x, i in zip(last, r, inverse, strict=True)
    ]
    return [
        jnp.where(size > 2, jnp.where(kept, x, 0), straight)
        for kept, x, straight in zip(support, solved, r, strict=True)
    ]


def _choose(v: Sequence[Array]) -> Support:
    """The candidate of least objective among the support sizes 2..M of each block.

    Its size is 0 if v1 is so small that the penalty moves no entry by a digit of the largest. Its
    size is NaN if an entry is NaN.
    """
    tiny, epsilon = jnp.finfo(v[0].dtype).tiny, jnp.finfo(v[0].dtype).eps
    # In units of v1, so that no square underflows.
    unit = 1 / jnp.maximum(v[0], tiny)
    least = sum((jnp.square(x * unit) for x in v[2:]), jnp.zeros_like(unit)) / 2
    square = jnp.full_like(unit, 4)
    candidates = {}
    for k in range(3, len(v) + 1):
        root, root_is_sum = _root_of_three(v[:3]) if k == 3 else _root_of_many(v[:k])
        total = _add(v[:k])
        candidates[k] = root, v[k - 1], total
        candidate = _support(k, root, root_is_sum, v[k - 1], total)
        lost = [_loss(x, x is v[k - 1], candidate) for x in v[:k]]
        objective = _objective(v, lost, unit)
        # Every candidate is a feasible point, so a candidate without a stationary point can only
        # lose. NaN loses too, and the sparser candidate wins a tie.
        better = (objective < least) & (v[0] < LARGEST_SOLVABLE)
        least = jnp.where(better, objective, least)
        square = jnp.where(better, jnp.where(root_is_sum, (k + 0.5) ** 2, k**2), square)
    # Products of smaller v could underflow. The difference is 0, or NaN if v1 is NaN.
    square = jnp.where(v[0] > epsilon**2, square, v[0] - v[0])
    # One number, k or k + 1/2, holds the size and the kind of root, and it comes from a square
    # root. XLA repeats cheap operations, here all of the above, in each consumer, but computes and
    # stores an expensive one once. The quarters allow for backends with inexact square roots.
    code = jnp.sqrt(square)
    size = jnp.floor(code + 0.25)
    root_is_sum = code > size + 0.25
    root, smallest, total = [jnp.zeros_like(unit)] * 3
    for k, of_k in candidates.items():
        root, smallest, total = (
            jnp.where(size == k, new, old)
            for new, old in zip(of_k, (root, smallest, total), strict=True)
        )
    return _support(size, root, root_is_sum, smallest, total)


def _support(
    size: int | Array, root: Array, root_is_sum: Array, smallest: Array, total: Array
) -> Support:
    """The support, with `total` the sum of its v."""
    # The size may also be 0 or 2. The numbers are then not used.
    others = jnp.maximum(size - 2, 1).astype(root.dtype)
    offset = 4 * (others - 1) / (others * others) + 4 * smallest - 4 * total / others
    t = jnp.sqrt(jnp.square(root) - offset)
    s = jnp.where(root_is_sum, root, t + 1 - 2 / others)
    return Support(size, root, root_is_sum, smallest, s, (total - s) / others)


def _loss(v: Array, is_smallest: Array | bool, support: Support) -> Array:
    """v_i - u_i of an entry, from its own v_i and the numbers of its support.

    For k = 3, u_i = (v_i + d_i) / 2 with d_i^2 = d^2 + v_i^2 - v_3^2.

    For k >= 4, u_i = (D_i + s - 1) / 2 with

        D_i^2 = (1 - s)^2 + 4 (v_i - E) = D_k^2 + 4 (v_i - v_k).

    This u_i has an error of one rounding of 1. The formula v_i - u_i = E - u_i (s - u_i) removes
    it.
    """
    size, root, root_is_sum, smallest, s, e2 = support
    three = jnp.asarray(size == 3)
    base = jnp.where(root_is_sum, 1 - s, root)
    gap = v - jnp.where(root_is_sum, e2, smallest)
    square = jnp.square(base) + gap * jnp.where(three, v + smallest, 4)
    d = jnp.where(is_smallest & ~root_is_sum, root, jnp.sqrt(square))
    u = (d + s - 1) / 2
    return jnp.clip(jnp.where(three, (v - d) / 2, e2 - u * (s - u)), 0, v)


def _objective(v: Sequence[Array], lost: Sequence[Array], unit: Array) -> Array:
    """1/2 |u - v|^2 + e3(u) in units of v1^2, with u = v - lost on the support, else u = 0."""
    distance = _add([jnp.square(x * unit) for x in (*lost, *v[len(lost) :])])
    e1, e2, e3 = v[0] - lost[0], jnp.zeros_like(unit), jnp.zeros_like(unit)
    for x, loss in zip(v[1:], lost[1:], strict=False):
        scaled = (x - loss) * unit
        e1, e2, e3 = e1 + (x - loss), e2 + e1 * scaled, e3 + e2 * scaled
    return distance / 2 + e3


def _root_of_three(v: Sequence[Array]) -> tuple[Array, Array]:
    """d = 2 u_3 - v_3, the larger root of (v1 + a)(v2 + b) = 2 (v3 - d); Newton descends to it."""
    v1, v2, v3 = v
    tiny, steps = jnp.finfo(v1.dtype).tiny, NEWTON_STEPS[v1.dtype.name]
    a_offset = jnp.maximum(_repeatable(v1 - v3) * _repeatable(v1 + v3), tiny)
    b_offset = jnp.maximum(_repeatable(v2 - v3) * _repeatable(v2 + v3), tiny)
    # u_3 + u_3^2 <= v_3 bounds the root. The bound is exact if the three entries are equal.
    d = 4 * v3 / (1 + jnp.sqrt(1 + 4 * v3)) - v3
    for _ in range(steps):
        a, b = jnp.sqrt(d * d + a_offset), jnp.sqrt(d * d + b_offset)
        value = (v1 + a) * (v2 + b) - 2 * (v3 - d)
        # The derivative times a b, so that the step takes one division.
        slope = d * (b * (v2 + b) + a * (v1 + a)) + 2 * a * b
        d = d - value * (a * b / slope)
    return d, jnp.zeros_like(d, bool)


def _root_of_many(v: Sequence[Array]) -> tuple[Array, Array]:
    """The root for k >= 4, and whether it is s: it is s if c_k >= 0, else D_k.

    With t = s - (k - 4) / (k - 2), D_i^2 = t^2 + c_i and sum(D) + (k - 2) t = 4. The unknown is t
    if c_k >= 0, else D_k, of either sign. In both cases the left side is convex in the unknown.
    Newton's method starts above the larger root and descends.
    """
    k = len(v)
    dtype, total = v[0].dtype, _repeatable(_add(v))
    tiny, steps = jnp.finfo(dtype).tiny, NEWTON_STEPS[dtype.name]
    c_k = 4 * (k - 3) / (k - 2) ** 2 + _repeatable(4 * v[-1]) - _repeatable(4 / (k - 2) * total)
    in_t = c_k >= 0
    offsets = [jnp.maximum(jnp.where(in_t, c_k, 0) + 4 * (x - v[-1]), tiny) for x in v[:-1]]
    last_offset = jnp.maximum(jnp.abs(c_k), tiny)
    weight = jnp.where(in_t, k - 2, 1).astype(dtype)
    last_weight = jnp.where(in_t, 1, k - 2).astype(dtype)
    highest = (2 * k - (k - 2) * jnp.sqrt(4 - (k - 1) * c_k)) / (2 * (k - 1))
    x = jnp.where(in_t, total - (k - 4) / (k - 2), highest)
    for _ in range(steps):
        roots = [jnp.sqrt(x * x + offset) for offset in offsets]
        last = jnp.sqrt(x * x + last_offset)
        value = weight * x - 4 + last_weight * last + _add(roots)
        numerator, denominator = _sum_of_fractions([(1, d) for d in roots] + [(last_weight, last)])
        x = x - value * denominator / (weight * denominator + x * numerator)
    return jnp.where(in_t, _refined(v, total, x + (k - 4) / (k - 2)), x), in_t


def _refined(v: Sequence[Array], total: Array, s: Array) -> Array:
    """One more Newton step on sum(u) - s, in a form whose error is relative to s itself."""
    k = len(v)
    # e2(u) is at most (k - 1) / (2 k) s^2.
    s = _repeatable(jnp.clip(s, total - (k - 1) * (k - 2) / (2 * k) * total * total, total))
    e2 = _repeatable((total - s) / (k - 2))
    gaps = [_repeatable(x - e2) for x in v]
    roots = [jnp.sqrt(jnp.square(1 - s) + 4 * gap) for gap in gaps]
    # sum(u) as one fraction, and the derivative of 2 (sum(u) - s) as another.
    above, below = _sum_of_fractions(
        [(2 * gap, d + (1 - s)) for gap, d in zip(gaps, roots, strict=True)]
    )
    numerator, denominator = _sum_of_fractions([(1, d) for d in roots])
    slope = (k - 2) * denominator + (s - (k - 4) / (k - 2)) * numerator
    return s - 2 * (above - s * below) * denominator / (below * slope)


def _sum_of_fractions(fractions: Sequence[tuple[Array | int, Array]]) -> tuple[Array, Array]:
    """Numerator and denominator of the sum, so that eight terms cost one division."""
    numerator, denominator = jnp.asarray(fractions[0][0]), fractions[0][1]
    for i, (n, d) in enumerate(fractions[1:], start=1):
        if i % 8 == 0:
            # A product of more denominators could underflow.
            numerator, denominator = numerator / denominator, jnp.ones_like(denominator)
        numerator, denominator = numerator * d + n * denominator, denominator * d
    return numerator, denominator


def _repeatable(x: Array) -> Array:
    """x, marked for XLA as cheap to compute again; |x| must be far below a million.

    XLA's CPU backend stores the result of a binary operation if its consumers meet again behind a
    square root. It computes a clipped value again in each consumer.

    Between Newton steps the store helps. Each step is a chain of slow operations, and a processor
    overlaps the chains of many blocks only if they are short. Within a step the store only costs
    memory and its traffic.
    """
    return jnp.clip(x, -1e6, 1e6)


def _add(terms: Sequence[Array]) -> Array:
    return sum(terms[1:], terms[0])
