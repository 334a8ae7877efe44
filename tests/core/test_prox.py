"""The proximal operator against brute force and known values."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    assert_close,
    brute_force_prox,
    eps_of,
    inverse_hessian,
    penalty_gradient,
    prox_hessian,
    prox_objective,
    stationarity_residual,
)

from prox24 import prox
from prox24._core import keep_two

pytestmark = pytest.mark.optimized

DTYPES = ["float32", "float64"]
FEW_PATTERNS = [(1, 4), (2, 5)]
OTHER_PATTERNS = [(1, 2), (1, 3), (1, 8), (2, 2), (2, 3), (2, 8), (2, 9)]
# Blocks of 8 and more take long to compile in float64, and have no code of their own there.
OTHER_CASES = [(pattern, "float32") for pattern in OTHER_PATTERNS]
OTHER_CASES += [(pattern, "float64") for pattern in OTHER_PATTERNS if pattern[1] < 8]

# Roundings of an objective for M = 4. Entries that are off by eps |y| change an objective f by
# eps |y| sqrt(2 f): by up to 10^3 eps of the scale in `check`, where a Hessian is singular. The
# blocks in float32 show none of it. Supports are told apart by objectives: where these differ by
# that, the points differ by its square root.
GAP = {"float32": 8, "float64": 4096}


def one_huge(rng, shape):
    y = rng.normal(size=shape)
    np.put_along_axis(y, rng.integers(shape[1], size=(shape[0], 1)), 1e4, axis=-1)
    return y


def nudged(rng, values):
    """Each value off by a relative 1e-17 to 0.1."""
    return values * (1 + 10 ** rng.uniform(-17, -1, values.shape) * rng.choice([-1, 1]))


SPREADS = {
    "gaussian": lambda rng, shape: rng.normal(size=shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "cauchy": lambda rng, shape: rng.standard_cauchy(shape),
    "ties": lambda rng, shape: rng.choice([-1.0, -0.5, 0.5, 1.0], shape),
    "near_ties": lambda rng, shape: nudged(rng, np.ones(shape)),
    "all_equal": lambda rng, shape: np.tile(rng.normal(size=(shape[0], 1)), shape[1]),
    "zeros": lambda rng, shape: rng.normal(size=shape) * rng.choice([0, 1], shape),
    "one_huge": one_huge,
    "log_uniform": lambda rng, shape: 10 ** rng.uniform(-6, 0, shape) * rng.choice([-1, 1], shape),
}


def spread_with_any_penalty(spread):
    """Blocks of one spread whose penalty is hard in most, and anything or zero in the others."""

    def draw(rng, count, pattern, dtype):
        y = spread(rng, (count, pattern[1])) * 10 ** rng.uniform(-20, 20, (count, 1))
        if pattern[0] == 1:
            choices = [rng.uniform(0, 3, count), nudged(rng, np.ones(count)), np.zeros(count)]
        else:
            top = np.abs(y).max(axis=-1)
            hard = rng.uniform(0, 2.2, count) / np.where(top > 0, top, 1)
            small = 10 ** rng.uniform(-8, 0, count) / np.where(top > 0, top, 1)
            anything = 10 ** rng.uniform(-8, 8, count) * rng.choice([0, 1], count, p=[0.2, 0.8])
            choices = [np.where(rng.uniform(size=count) < 0.7, hard, small), hard, anything]
        return y, np.choose(rng.choice(3, count, p=[0.5, 0.2, 0.3]), choices)

    return draw


def either_side_of_a_switch(rng, count, pattern, dtype):
    """Penalties just below and above that at which the support shrinks."""
    choices = [spread(rng, (count, pattern[1])) for spread in SPREADS.values()]
    y = np.choose(rng.choice(len(SPREADS), (count, 1)), choices)
    top = np.abs(y).max(axis=-1, keepdims=True)
    y = (y / np.where(top > 0, top, 1)).astype(dtype)
    below, above = switch(rng, y, pattern)
    lam = np.choose(rng.choice(3, count), [below, above, nudged(rng, below.astype(np.float64))])
    return scaled(rng, y, lam, pattern)


def switch(rng, y, pattern):
    """Bisects lam, 0 to 2.2, for where the support becomes smaller than a size drawn per block."""
    kept, group = pattern
    size = rng.integers(min(kept + 1, group), group + 1, len(y))
    below, above = np.zeros(len(y), y.dtype), np.full(len(y), 2.2, y.dtype)
    for _ in range(np.finfo(y.dtype).nmant + 16):
        middle = (below + above) / 2
        shrunk = support(y, middle, pattern) < size
        below, above = np.where(shrunk, below, middle), np.where(shrunk, middle, above)
    return below, above


def support(y, lam, pattern):
    return np.count_nonzero(prox(y, lam[:, None], pattern), axis=-1)


def singular_hessian(rng, count, pattern, dtype):
    """Stationary points with a singular Hessian on the support, or on it and the next entry."""
    kept, group = pattern
    u = -np.sort(-np.abs(rng.normal(size=(count, group))), axis=-1)
    size = rng.integers(min(kept + 1, group), group + 1, (count, 1))
    u = np.where(np.arange(group) < size - rng.integers(2, size=(count, 1)), u, 0)
    inside = np.arange(group) < size
    curvature = prox_hessian(u, 1.0, kept) - np.eye(group)
    lowest = np.linalg.eigvalsh(curvature * (inside[:, :, None] & inside[:, None, :]))[:, 0]
    lam = -1 / np.where(lowest < 0, lowest, -1)
    slope = lam[:, None] * penalty_gradient(u, kept)
    y = u + np.where(inside, slope, slope * rng.uniform(size=u.shape))
    y = np.where(rng.integers(2, size=(count, 1)), nudged(rng, y), y)
    return scaled(rng, rng.permuted(y, axis=-1), nudged(rng, lam), pattern)


def scaled(rng, y, lam, pattern):
    """The same problems in other units; powers of two, so that nothing is rounded."""
    unit = 2.0 ** rng.integers(-66, 66, len(y))
    return y * unit[:, None], lam / unit ** (pattern[0] - 1)


FAMILIES = {name: spread_with_any_penalty(spread) for name, spread in SPREADS.items()}
FAMILIES |= {family.__name__: family for family in (either_side_of_a_switch, singular_hessian)}
BLOCKS_OF_FOUR = 10**6 // len(FAMILIES) + 1
BLOCKS = 500
FEW_BLOCKS = 250
"""Of the tests that are not slow. With one shape they need few programs."""


def solved(family, dtype, pattern, count):
    """Blocks of a family, their minimisers and their penalties, the latter in float64."""
    rng = np.random.default_rng(zlib.crc32(f"{family} {pattern}".encode()))
    y, lam = (part.astype(dtype) for part in FAMILIES[family](rng, count, pattern, dtype))
    w = np.asarray(prox(y, lam[:, None], pattern))
    assert w.dtype == dtype
    return w, y, lam.astype(np.float64)


def check(family, dtype, pattern, count):
    """The minimum of a brute force is met, and the output is stationary in every entry."""
    w, y, lam = solved(family, dtype, pattern, count)
    best = brute_force_prox(y, lam, pattern[0])
    scale = np.maximum(best, 1e-6 * np.sum(np.square(y, dtype=np.float64), axis=-1))
    gap = (prox_objective(w, y, lam, pattern[0]) - best) / np.where(scale > 0, scale, 1)
    assert np.all(np.isfinite(gap))
    worst = int(np.argmax(gap))
    # Sums of M entries are off by M roundings, and the objective by the square of that. In the
    # reference an objective takes less than 2 M of float64, and two are compared.
    own = 4 * pattern[1] * eps_of("float64")
    bound = GAP[dtype] * eps_of(dtype) * max(1, pattern[1] / 4) ** 2 + own
    where = f"{family}: y={y[worst]}, lam={lam[worst]}, w={w[worst]}"
    assert gap[worst] <= bound, f"{gap[worst]}: {where}"
    assert gap.min() >= -own, "brute force missed a minimum that the prox found"
    residual = stationarity_residual(w, y, lam, pattern[0])
    worst = int(np.argmax(residual))
    where = f"{family}: y={y[worst]}, lam={lam[worst]}, w={w[worst]}"
    assert residual[worst] <= (GAP[dtype] * eps_of(dtype)) ** 0.5, where


every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_family = pytest.mark.parametrize("family", FAMILIES)


def test_a_negative_lam_is_nan_and_no_other_block_is():
    y = jnp.ones((FEW_BLOCKS, 4), jnp.float32)
    lam = jnp.where(jnp.arange(FEW_BLOCKS) == 3, -1, 0.1).astype(jnp.float32)[:, None]
    for pattern in ((2, 4), (1, 4)):
        w = np.asarray(prox(y, lam, pattern))
        assert np.array_equal(np.isnan(w), np.broadcast_to(lam < 0, w.shape))
        assert np.isnan(prox(y, jnp.float32(-1.0), pattern)).all()


@every_dtype
@pytest.mark.parametrize("pattern", [(2, 4), *FEW_PATTERNS], ids="{0[0]}:{0[1]}".format)
def test_objective_equals_the_minimum_on_some_blocks(pattern, dtype):
    for family in FAMILIES:
        check(family, dtype, pattern, FEW_BLOCKS)


@pytest.mark.slow
@every_dtype
@every_family
def test_objective_equals_the_minimum_found_by_brute_force(family, dtype):
    check(family, dtype, (2, 4), BLOCKS_OF_FOUR)


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "dtype"), OTHER_CASES, ids=str)
def test_objective_of_other_patterns_equals_the_minimum_too(pattern, dtype):
    for family in FAMILIES:
        check(family, dtype, pattern, BLOCKS)


@every_dtype
def test_every_switch_of_support_is_met_to_the_last_digits(dtype):
    rng = np.random.default_rng(0)
    y = rng.normal(size=(FEW_BLOCKS, 4)).astype(dtype)
    y /= np.abs(y).max(axis=-1, keepdims=True)
    below, above = switch(rng, y, (2, 4))
    assert np.all(above - below <= 4 * eps_of(dtype) * above)
    sizes = zip(support(y, below, (2, 4)), support(y, above, (2, 4)), strict=True)
    assert set(sizes) == {(4, 3), (3, 2)}


KNOWN = {
    0.1: (0.934, 0.718, 0.491, 0.252),
    0.3: (0.911, 0.681, 0.404, 0.021),
    0.4: (0.904, 0.671, 0.357, 0),
    0.7: (0.932, 0.712, 0.136, 0),
    0.8: (1, 0.8, 0, 0),
    50.0: (1, 0.8, 0, 0),
}


def test_known_minimisers():
    y = np.tile(np.array([1, 0.8, 0.6, 0.4], np.float32), (FEW_BLOCKS, 1))
    lam = np.resize(np.array([*KNOWN], np.float32), (FEW_BLOCKS, 1))
    expected = np.resize(list(KNOWN.values()), (FEW_BLOCKS, 4))
    # Three digits are given.
    assert np.allclose(prox(y, lam), expected, rtol=0, atol=0.6e-3)


def test_a_tiny_penalty_leaves_small_entries_of_one_of_four():
    y = np.tile(np.array([2.0**24, 1, 1, 1], np.float32), (FEW_BLOCKS, 1))
    lam = np.full((FEW_BLOCKS, 1), 1e-30, np.float32)
    assert np.array_equal(prox(y, lam, (1, 4)), y)


def test_known_minimisers_of_one_of_four():
    # Two entries a > b at lam = 1/2: (a - b/2, b - a/2) / (3/4) while both are positive.
    y = np.array([0.0, 1.0, 0.0, -0.8], np.float32)
    assert_close(prox(y, 0.5, (1, 4)), (0, 0.8, 0, -0.4), 4 * 2)  # M, by the inverse Hessian
    assert np.array_equal(prox(y, 1.0, (1, 4)), (0, 1, 0, 0))


def test_square_roots_need_not_be_exact(monkeypatch):
    # Accelerators need not round them correctly, and the size of a support comes out of one.
    rng = np.random.default_rng(0)
    magnitudes = list(jnp.asarray(np.abs(rng.normal(size=(4, 1000))), jnp.float32))
    sqrt = jnp.sqrt

    @jax.jit
    def shrunk(error):
        monkeypatch.setattr(keep_two.jnp, "sqrt", lambda x: sqrt(x) * (1 + error))
        return jnp.stack(keep_two.shrink(magnitudes, jnp.float32(0.3)))

    exact, *inexact = (np.asarray(shrunk(np.float32(error))) for error in (0, 1e-6, -1e-6))
    limit = 1e-6 * inverse_hessian(exact.T, 0.3) * exact.max()
    for found in inexact:
        assert 0 < np.abs(found - exact).max() <= limit
