"""Units of several entries: the operator against a search over all entries, masks, derivatives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from reference import assert_close, elementary, eps_of, largest
from tiers import rest

from prox24 import Pattern, is_sparse, penalty, planes, prox, top_mask
from prox24._core.masks import count_violations
from prox24._core.pattern import as_any_pattern, as_pattern

PAIRS = Pattern(2, 4, unit=2)
TRIPLES = Pattern(1, 3, unit=3)


COUNT = 400
"""Of blocks in most tests. With one shape they need few programs."""


def drawn(rng, pattern=PAIRS):
    """Blocks of float64, penalties under which most shrink, and the norms of the units."""
    y = rng.normal(size=(COUNT, pattern.width))
    lam = rng.uniform(0.05, 1.0, COUNT)
    return y, lam, norms_of(y, pattern)


def norms_of(y, pattern):
    return np.linalg.norm(y.reshape(len(y), pattern.group, pattern.unit), axis=2)


def objective(w, y, lam, pattern):
    norms = norms_of(w[None], pattern)[0]
    return 0.5 * np.sum((w - y) ** 2) + lam * float(elementary(norms, pattern.kept + 1))


def searched(rng, y, lam, pattern):
    """The least objective of descents over all entries, from each set of units and random ones."""
    sets = itertools.product([0.0, 1.0], repeat=pattern.group)
    starts = [y * np.repeat(units, pattern.unit) for units in sets]
    starts += list(rng.normal(size=(8, pattern.width)))
    found = [
        scipy.optimize.minimize(objective, start, (y, lam, pattern), method="L-BFGS-B")
        for start in starts
    ]
    ends = [end.x for end in found]
    # A unit that a descent left near zero may be better without its rest.
    ends += [np.where(np.abs(end) < 1e-3, 0, end) for end in ends]
    return min(objective(end, y, lam, pattern) for end in (*starts, *ends))


@pytest.mark.parametrize("pattern", [PAIRS, *rest(TRIPLES)], ids=str)
def test_no_search_over_all_entries_finds_less(pattern):
    rng = np.random.default_rng(0)
    y, lam, _ = drawn(rng, pattern)
    w = np.asarray(prox(jnp.asarray(y), jnp.asarray(lam)[:, None], pattern))
    for block in zip(w[:4], y[:4], lam[:4], strict=True):
        best = searched(rng, *block[1:], pattern)
        own = objective(*block, pattern)
        # The search stops where a step gains 1e-9 of the objective.
        assert own <= best * (1 + 100 * eps_of("float64"))
        assert own >= best * (1 - 1e-6)


@pytest.mark.parametrize("dtype", ["float64", *rest("float32"), "bfloat16"])
def test_units_keep_their_direction_and_norms_are_the_operator_of_the_norms(dtype):
    rng = np.random.default_rng(1)
    y, lam, _ = drawn(rng)
    y = jnp.asarray(y, dtype)
    own = np.asarray(y, "float64")
    norms = norms_of(own, PAIRS)
    shrunk = np.asarray(prox(jnp.asarray(norms), jnp.asarray(lam)[:, None]))
    ratio = np.repeat(shrunk / norms, 2, axis=1)
    w = prox(y, jnp.asarray(lam)[:, None], PAIRS)
    assert w.dtype == y.dtype
    kept = np.repeat(shrunk == norms, 2, axis=1)
    assert np.array_equal(np.asarray(w, "float64")[kept], own[kept])
    assert_close(np.asarray(w, "float64"), own * ratio, 100, dtype)


def test_zero_penalty_is_the_identity_and_a_large_one_the_projection():
    rng = np.random.default_rng(3)
    y = jnp.asarray(
        rng.normal(size=(COUNT, 8)) * 10.0 ** rng.integers(-30, 30, (COUNT, 1)), jnp.float32
    )
    y = y.at[::2, 4:6].set(0)
    assert np.array_equal(prox(y, 0.0, PAIRS), y)
    projected = prox(y, jnp.asarray(1e38, jnp.float32), PAIRS)
    assert np.array_equal(projected, jnp.where(top_mask(jnp.abs(y), PAIRS), y, 0))
    assert is_sparse(projected, PAIRS)
    assert not np.any(np.signbit(projected) & (np.asarray(projected) == 0) & (np.asarray(y) != 0))


def test_the_largest_numbers_and_infinity_have_norms():
    y = jnp.full((COUNT, 8), 3e38, jnp.float32)
    assert np.array_equal(prox(y, 0.0, PAIRS), y)
    scores = jnp.asarray([1, 2, 0, 0, jnp.inf, 1, 3, 0], jnp.float32)
    assert top_mask(scores, PAIRS).tolist() == [False] * 4 + [True] * 4
    assert (
        top_mask(jnp.asarray([1, 2, 0, 0, 5, 1, 3, 0]), PAIRS).tolist() == [False] * 4 + [True] * 4
    )


def test_nan_stays_in_its_block():
    y = jnp.ones((COUNT, 8), jnp.float32).at[0, 3].set(jnp.nan)
    w = prox(y, 0.1, PAIRS)
    assert np.isnan(w[0]).all()
    assert np.isfinite(w[1:]).all()
    assert np.isnan(prox(y, jnp.float32(-1.0), PAIRS)).all()


def test_masks_keep_the_units_of_largest_norm():
    scores = np.abs(np.random.default_rng(4).normal(size=(16, 24)))
    expected = np.repeat(largest(norms_of(scores.reshape(-1, 8), PAIRS), 2, 4), 2, axis=1)
    assert np.array_equal(top_mask(jnp.asarray(scores), PAIRS), expected.reshape(16, 24))
    assert np.array_equal(
        top_mask(jnp.asarray(scores.T), PAIRS, axis=0).T, expected.reshape(16, 24)
    )
    pairs = jnp.array([1.0, 2.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0])
    assert is_sparse(pairs, PAIRS)
    assert int(count_violations(pairs.at[7].set(1.0), PAIRS)) == 1
    # Half of all entries are zero, and no plain 2:4 is broken.
    assert int(count_violations(jnp.tile(jnp.array([1.0, 0.0]), 4), PAIRS)) == 1


def test_the_penalty_is_that_of_the_norms_and_has_a_derivative_at_zero():
    rng = np.random.default_rng(5)
    w, _, norms = drawn(rng)
    expected = sum(float(elementary(each, 3)) for each in norms)
    assert_close(penalty(jnp.asarray(w), PAIRS), expected, 8 * COUNT)  # entries
    slope = jax.grad(lambda w: penalty(w, PAIRS))(jnp.asarray(w).at[:, :2].set(0))
    assert np.isfinite(slope).all()


def test_the_derivative_by_the_penalty_is_there_at_none():
    y = jnp.asarray(np.random.default_rng(7).normal(size=(32, 8)))
    norms = jnp.asarray(norms_of(np.asarray(y), PAIRS))
    for lam in (0.0, 1e-9):
        _, slope = jax.jvp(lambda lam: prox(y, lam, PAIRS), (lam,), (1.0,))
        _, of_norms = jax.jvp(lambda lam: prox(norms, lam), (lam,), (1.0,))
        direction = y / jnp.repeat(norms, 2, axis=1)
        assert_close(slope, direction * jnp.repeat(of_norms, 2, axis=1), 100)


@pytest.mark.parametrize("factor", [2.0**-66, 2.0**66])  # which change no rounding
def test_derivatives_are_the_same_for_short_and_long_norms(factor):
    rng = np.random.default_rng(7)
    y, lam, _ = drawn(rng, Pattern(1, 2, 2))  # its penalty is a ratio

    def slopes(y, pattern, lam):
        y, lam = jnp.asarray(y, jnp.float32), jnp.asarray(lam, jnp.float32)[:, None]
        return np.asarray(jax.grad(lambda y: jnp.sum(prox(y, lam, pattern)[:, 0]))(y))

    for pattern, strength in ((Pattern(1, 2, 2), lam), (PAIRS, 0 * lam)):
        own = np.resize(y, (COUNT, pattern.width))
        own[:, 0] = 1.5
        expected = slopes(own, pattern, strength)
        assert np.array_equal(slopes(own * factor, pattern, strength), expected)
        assert np.all(np.isfinite(expected))


def test_derivatives_are_those_of_finite_differences_and_the_identity_about_zero():
    rng = np.random.default_rng(6)
    y, lam, _ = drawn(rng)
    y[:40, :2] = 0
    y[40:60] = 0

    def function(y, lam):
        return prox(y, lam[:, None], PAIRS)

    direction, other = rng.normal(size=y.shape), rng.normal(size=lam.shape)
    direction[:40, :2] = 0
    arguments, tangents = (
        (jnp.asarray(a), jnp.asarray(b)) for a, b in ((y, lam), (direction, other))
    )
    _, slope = jax.jvp(function, arguments, tangents)
    assert np.all(np.asarray(slope)[:40, :2] == 0)
    assert np.array_equal(slope[40:60], direction[40:60])
    step = 1e-6
    ends = [
        np.asarray(
            function(arguments[0] + sign * step * direction, arguments[1] + sign * step * other)
        )
        for sign in (1, -1)
    ]
    difference = (ends[0] - ends[1]) / (2 * step)
    same = np.all((ends[0] != 0) == (ends[1] != 0), axis=1)
    # Third derivatives grow with the inverse of the Hessian's least eigenvalue.
    mild = same & (np.abs(slope).max(axis=1) < 10)
    assert np.mean(mild) > 0.9
    # About zero the error of a difference is of the order of the step, not of its square.
    assert_close(difference[40:60], direction[40:60], 100 * step / eps_of("float64"))
    mild[40:60] = False
    assert_close(difference[mild], np.asarray(slope)[mild], step / eps_of("float64"))
    _, pull = jax.vjp(function, *arguments)
    back = pull(jnp.asarray(direction))
    both = [np.vdot(direction, slope), sum(map(np.vdot, tangents, back))]
    assert_close(both[0], both[1], 1e4)


@pytest.mark.parametrize(
    ("text", "pattern"), [("2:4x2", PAIRS), ("8:16", Pattern(8, 16)), ("1:3x3", TRIPLES)]
)
def test_text_names_the_unit(text, pattern):
    assert as_any_pattern(text) == as_pattern(text) == pattern
    assert str(pattern) == text
    assert as_any_pattern(pattern) == pattern


@pytest.mark.parametrize("wrong", ["2:4x0", "2:4x", "x2", "2:4x2x2"])
def test_a_text_with_a_wrong_unit_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{wrong!r} is neither N:M"):
        as_any_pattern(wrong)


def test_a_unit_of_no_entries_is_refused():
    with pytest.raises(ValueError, match="the unit of a pattern is 0"):
        as_any_pattern(Pattern(2, 4, 0))


@pytest.mark.parametrize(("count", "unit"), [(0, 1), (0, 2), (7, 2)])
def test_planes_that_are_no_whole_units_are_refused(count, unit):
    with pytest.raises(ValueError, match=f"{count} planes are not whole units of {unit} entries"):
        planes.prox([jnp.ones(3)] * count, 1.0, unit=unit)
