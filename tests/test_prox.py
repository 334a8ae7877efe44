"""The proximal operator against brute force, known values, and the properties it must have."""

import functools
import zlib

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import brute_force_prox, largest, prox_objective, stationarity_residual

from prox24 import planes
from prox24.core.masks import is_sparse
from prox24.core.prox import prox

jitted = jax.jit(prox, static_argnames=("pattern", "axis"))

BLOCKS = 256
PENALTIES = [0.0, 1e-4, 0.03, 0.3, 0.5, 0.75, 1.0, 4.0, 1e6]
GAP = {"float32": 1e-6, "float64": 1e-12}
RESIDUAL = {"float32": 1e-4, "float64": 2e-9}


def near_ties(rng, shape):
    return 1 + 10.0 ** rng.uniform(-7, -1, shape) * rng.choice([-1, 1], shape)


def one_huge(rng, shape):
    y = rng.normal(size=shape)
    np.put_along_axis(y, rng.integers(4, size=(*shape[:-1], 1)), 1e4, axis=-1)
    return y


FAMILIES = {
    "gaussian": lambda rng, shape: rng.normal(size=shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "cauchy": lambda rng, shape: rng.standard_cauchy(shape),
    "ties": lambda rng, shape: rng.choice([-1.0, -0.5, 0.5, 1.0], shape),
    "all_equal": lambda rng, shape: np.broadcast_to(rng.normal(size=(*shape[:-1], 1)), shape),
    "near_ties": near_ties,
    "zeros": lambda rng, shape: rng.normal(size=shape) * rng.choice([0, 1], shape),
    "one_huge": one_huge,
    "log_uniform": lambda rng, shape: 10.0 ** rng.uniform(-6, 0, shape),
}


def adversarial_blocks(family, lam):
    """Half of the blocks as drawn, half scaled so that lam times the largest entry is 0 to 2.2."""
    rng = np.random.default_rng(zlib.crc32(f"{family} {lam}".encode()))
    y = np.array(FAMILIES[family](rng, (BLOCKS, 4)))
    if lam:
        top = np.abs(y[::2]).max(axis=-1, keepdims=True)
        y[::2] *= rng.uniform(0, 2.2, (BLOCKS // 2, 1)) / (lam * np.where(top > 0, top, 1))
    return y


def solved(family, dtype):
    lams = [float(np.asarray(lam, dtype)) for lam in PENALTIES]
    y = np.stack([adversarial_blocks(family, lam) for lam in PENALTIES]).astype(dtype)
    w = np.stack([np.asarray(jitted(row, lam)) for row, lam in zip(y, lams, strict=True)])
    assert w.dtype == dtype
    return y.reshape(-1, 4), w.reshape(-1, 4), np.repeat(lams, BLOCKS)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_objective_equals_the_minimum_found_by_brute_force(family, dtype):
    y, w, lam = solved(family, dtype)
    best = brute_force_prox(y, lam)
    scale = np.maximum(best, 1e-6 * np.sum(np.square(y, dtype=np.float64), axis=-1))
    gap = (prox_objective(w, y, lam) - best) / np.where(scale > 0, scale, 1)
    worst = int(np.argmax(gap))
    assert gap[worst] <= GAP[dtype], f"y={y[worst]}, lam={lam[worst]}, w={w[worst]}"
    assert gap.min() >= -1e-9, "brute force missed a minimum that the prox found"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_output_is_stationary_in_every_entry(family, dtype):
    y, w, lam = solved(family, dtype)
    residual = stationarity_residual(w, y, lam)
    worst = int(np.argmax(residual))
    assert residual[worst] <= RESIDUAL[dtype], f"y={y[worst]}, lam={lam[worst]}, w={w[worst]}"


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        (0.1, (0.934, 0.718, 0.491, 0.252)),
        (0.3, (0.911, 0.681, 0.404, 0.021)),
        (0.4, (0.904, 0.671, 0.357, 0)),
        (0.7, (0.932, 0.712, 0.136, 0)),
        (0.8, (1, 0.8, 0, 0)),
        (1.0, (1, 0.8, 0, 0)),
        (50.0, (1, 0.8, 0, 0)),
    ],
)
def test_known_minimisers(lam, expected):
    z = np.array([1, 0.8, 0.6, 0.4], np.float32)
    assert np.allclose(jitted(z, lam), expected, rtol=0, atol=1e-3)
    w = planes.prox([jnp.asarray(z[i : i + 1]) for i in range(4)], lam)
    assert np.allclose(np.concatenate(w), expected, rtol=0, atol=1e-3)


def test_known_minimiser_of_three_near_ties():
    w = jitted(np.array([1.049, 1.035, 1.034, 0.423], np.float32), 1.0)
    assert np.allclose(w, (0.661, 0.624, 0.621, 0), rtol=0, atol=2e-3)


magnitude = st.one_of(
    st.floats(2.0**-10, 2.0**10, width=32),
    st.floats(0.125, 2.0, width=32),
    st.sampled_from([0.0, 0.5, 1.0, 1.5]),
)
entry = st.builds(lambda m, negative: -m if negative and m else m, magnitude, st.booleans())
inputs = hnp.arrays(np.float32, (3, 8), elements=entry)
penalties = st.one_of(
    st.floats(0, 2, width=32), st.floats(0, 2.0**20, width=32), st.sampled_from([0.0, 0.5, 1.0])
).map(lambda lam: lam if lam >= 1e-30 else 0.0)


def in_blocks(w):
    return np.asarray(w).reshape(-1, 4)


def same_objective(got, expected, y, rel=1e-6):
    """Equal within `rel` of the larger, or of 1e-6 |y|^2 where that is larger still."""
    floor = 1e-6 * np.sum(np.square(y, dtype=np.float64), axis=-1)
    return np.all(np.abs(got - expected) <= rel * np.maximum(np.maximum(got, expected), floor))


@given(inputs, penalties, hnp.arrays(np.float32, (3, 8), elements=st.sampled_from([-1.0, 1.0])))
def test_flipping_signs_of_the_input_flips_those_of_the_output(y, lam, signs):
    assert np.array_equal(jitted(signs * y, lam), signs * np.asarray(jitted(y, lam)))


@given(inputs, penalties, st.permutations(range(4)))
def test_permuting_a_block_leaves_its_objective(y, lam, order):
    y = in_blocks(y)
    expected = prox_objective(jitted(y, lam), y, lam)
    permuted = y[:, list(order)]
    assert same_objective(prox_objective(jitted(permuted, lam), permuted, lam), expected, y)


@given(inputs, penalties)
def test_output_has_the_signs_of_the_input_and_no_larger_magnitudes(y, lam):
    w = np.asarray(jitted(y, lam))
    assert np.all(np.abs(w) <= np.abs(y))
    assert np.all(w * y >= 0)


@given(inputs, penalties)
def test_output_keeps_the_order_of_magnitudes(y, lam):
    order = np.argsort(-np.abs(in_blocks(y)), axis=-1, kind="stable")
    by_rank = np.take_along_axis(np.abs(in_blocks(jitted(y, lam))), order, axis=-1)
    slack = 1e-6 * by_rank[:, :1]
    assert np.all(np.diff(by_rank, axis=-1) <= slack)


@given(inputs, penalties)
def test_objective_is_not_above_that_of_the_input_or_of_its_top_two(y, lam):
    y = in_blocks(y)
    value = prox_objective(jitted(y, lam), y, lam)
    top_two = np.where(largest(np.abs(y), 2, 4), y, 0)
    slack = 1e-6 * np.maximum(value, 1e-6 * np.sum(np.square(y, dtype=np.float64), axis=-1))
    assert np.all(value <= prox_objective(top_two, y, lam) + slack)
    assert np.all(value <= prox_objective(y, y, lam) + slack)


@given(inputs)
def test_zero_penalty_is_the_identity_bit_for_bit(y):
    assert np.asarray(jitted(y, 0.0)).tobytes() == y.tobytes()


@pytest.mark.parametrize(
    "block",
    [
        pytest.param([3e38, 1e38, 2e38, -3e38], id="near_overflow"),
        pytest.param([3e37, 2e37, 1e37, -3e37], id="below_reciprocal_underflow"),
        pytest.param([1e10, 1.0, 1e-30, 1.0], id="range_beyond_one_exponent"),
        pytest.param([2e-38, 4e-38, 1e-37, 2e-38], id="near_underflow"),
        pytest.param([1.0, -0.0, 2.0, 3.0], id="negative_zero"),
    ],
)
def test_zero_penalty_is_the_identity_on_extreme_normal_numbers(block):
    y = np.array(block, np.float32)
    assert np.asarray(jitted(y, 0.0)).tobytes() == y.tobytes()


@given(inputs)
def test_large_penalty_keeps_the_two_largest_bit_for_bit(y):
    expected = np.where(largest(np.abs(y), 2, 4), y, 0)
    assert np.asarray(jitted(y, 1e6)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("top", [3e37, 3e38])
def test_large_penalty_keeps_two_huge_entries(top):
    y = np.array([0.5, 1, 0.25, 0.75], np.float32) * np.float32(top)
    assert np.array_equal(jitted(y, 1.0), np.where([False, True, False, True], y, 0))


@given(inputs, penalties)
def test_sparse_input_comes_back_bit_for_bit(y, lam):
    y = np.where(largest(np.abs(y), 2, 4), y, 0)
    assert np.asarray(jitted(y, lam)).tobytes() == y.tobytes()


@given(inputs, st.floats(2, 64, width=32))
def test_scaled_input_of_two_or_more_is_thresholded_to_two_nonzeros(y, lam):
    top = np.repeat(np.abs(in_blocks(y)).max(axis=-1), 4).reshape(y.shape)
    y = np.where(top > 0, y / np.where(top > 0, top, 1), 0).astype(np.float32)
    assert bool(is_sparse(jitted(y, lam)))


@given(inputs, penalties, st.integers(0, 2), st.integers(0, 7))
def test_nan_fills_its_own_block_and_no_other(y, lam, row, column):
    expected = in_blocks(jitted(y, lam)).copy()
    expected[row * 2 + column // 4] = np.nan
    y = y.copy()
    y[row, column] = np.nan
    assert np.array_equal(in_blocks(jitted(y, lam)), expected, equal_nan=True)


@given(
    hnp.arrays(
        np.float32, (3, 8), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    ),
    st.floats(0, width=32, allow_nan=False, allow_infinity=False),
)
def test_finite_input_gives_finite_output(y, lam):
    assert np.all(np.isfinite(jitted(y, lam)))


@given(inputs, penalties)
def test_any_axis_equals_the_transposed_last_axis(y, lam):
    expected = np.asarray(jitted(y, lam))
    assert np.array_equal(np.asarray(jitted(y.T, lam, axis=0)), expected.T)
    middle = jitted(y[:, :, None], lam, axis=1)
    assert np.array_equal(np.asarray(middle)[:, :, 0], expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@given(y=inputs, lam=penalties)
def test_half_precision_is_the_float32_result_rounded_once(dtype, y, lam):
    y = jnp.asarray(y).astype(dtype)
    w = jitted(y, lam)
    assert w.dtype == dtype
    expected = jitted(y.astype(jnp.float32), lam).astype(dtype)
    assert np.asarray(w).tobytes() == np.asarray(expected).tobytes()


@given(inputs, penalties, st.integers(-6, 6))
def test_scaling_the_input_and_inversely_the_penalty_scales_the_output(y, lam, exponent):
    y, factor = in_blocks(y), 3.0**exponent
    expected = prox_objective(jitted(y, lam), y, lam)
    scaled = (y * factor).astype(np.float32)
    value = prox_objective(jitted(scaled, lam / factor), scaled, lam / factor) / factor**2
    assert same_objective(value, expected, y, rel=1e-5)


@pytest.mark.parametrize("pattern", [(3, 4), (4, 8), (4, 4)])
def test_other_patterns_are_refused_with_what_serves_instead(pattern):
    with pytest.raises(ValueError, match=rf"1:M and 2:M, not {pattern[0]}:{pattern[1]}.*SparseGPT"):
        prox(jnp.ones(16), 1.0, pattern)


def test_indivisible_length_is_named_in_the_error():
    with pytest.raises(ValueError, match=r"\(3, 6\).*4"):
        prox(jnp.ones((3, 6), jnp.float32), 1.0)


def test_traced_penalty_compiles_once_and_agrees_with_eager_calls():
    traces = []

    @jax.jit
    def traced(y, lam):
        traces.append(lam)
        return prox(y, lam)

    y = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    for lam in (0.0, 0.1, 0.7, 1e6):
        assert np.allclose(traced(y, lam), prox(y, lam), rtol=1e-5, atol=1e-5)
    assert len(traces) == 1


def test_vmap_over_penalties_equals_separate_calls():
    y = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)
    lams = jnp.array([0.0, 0.2, 0.9, 5.0], jnp.float32)
    together = jax.vmap(functools.partial(prox, y))(lams)
    separate = np.stack([np.asarray(jitted(y, lam)) for lam in lams])
    assert np.allclose(together, separate, rtol=1e-5, atol=1e-5)
