"""Properties of the proximal operator on any input, layouts, dtypes and transforms."""

import functools
import logging

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_close, eps_of, inverse_hessian, largest, prox_objective
from tiers import rest

from prox24 import planes, prox

pytestmark = pytest.mark.optimized


def halves():
    """XLA's CPU compiler converts no float16 where the instruction set is capped at SSE4.2."""
    try:
        jax.jit(lambda x: x.astype(jnp.float32))(np.ones(8, np.float16)).block_until_ready()
    except jax.errors.JaxRuntimeError:
        return ["bfloat16"]
    return ["bfloat16", "float16"]


HALVES = halves()
PATTERNS = [(2, 4), *rest((1, 4), (2, 8))]

every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids="{0[0]}:{0[1]}".format)
either_kept = pytest.mark.parametrize(
    "pattern", [(2, 4), *rest((1, 4))], ids="{0[0]}:{0[1]}".format
)

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
any_floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
any_inputs = hnp.arrays(np.float32, (3, 8), elements=any_floats)
any_penalties = st.floats(0, width=32, allow_nan=False, allow_infinity=False)


def in_blocks(w, pattern=(2, 4)):
    return np.asarray(w).reshape(-1, pattern[1])


def top(y, pattern):
    return np.where(largest(np.abs(y), *pattern), y, 0)


def equal_bits(a, b):
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


@every_pattern
@given(
    y=inputs,
    lam=penalties,
    signs=hnp.arrays(np.float32, (3, 8), elements=st.sampled_from([-1.0, 1.0])),
)
def test_flipping_signs_of_the_input_flips_those_of_the_output(pattern, y, lam, signs):
    w = np.asarray(prox(y, lam, pattern))
    assert np.array_equal(prox(signs * y, lam, pattern), signs * w)


@every_pattern
@given(y=inputs, lam=penalties)
def test_output_shrinks_keeps_order_and_has_no_larger_objective(pattern, y, lam):
    """With a large penalty it is the largest entries, bit for bit."""
    w = np.asarray(prox(y, lam, pattern))
    assert np.all(np.abs(w) <= np.abs(y))
    assert np.all(w * y >= 0)
    assert equal_bits(prox(y, 1e6, pattern), top(y, pattern))
    y, w = in_blocks(y, pattern), in_blocks(w, pattern)
    order = np.argsort(-np.abs(y), axis=-1, kind="stable")
    by_rank = np.take_along_axis(np.abs(w), order, axis=-1)
    eight = 8 * eps_of("float32")  # roundings, as in test_prox.py
    assert np.all(np.diff(by_rank, axis=-1) <= eight * by_rank[:, :1])
    objective = functools.partial(prox_objective, y=y, lam=lam, kept=pattern[0])
    value = objective(w)
    slack = eight * np.maximum(value, 1e-6 * np.sum(np.square(y, dtype=np.float64), axis=-1))
    assert np.all(value <= objective(top(y, pattern)) + slack)
    assert np.all(value <= objective(y) + slack)


@every_pattern
@given(y=inputs, lam=penalties, exponent=st.integers(-12, 12))
def test_units_of_the_input_change_only_the_units_of_the_output(pattern, y, lam, exponent):
    unit = np.float32(2.0**exponent)
    expected = unit * np.asarray(prox(y, lam, pattern))
    scaled = prox(unit * y, lam / float(unit) ** (pattern[0] - 1), pattern)
    assert np.array_equal(scaled, expected)


@either_kept
def test_zero_penalty_is_the_identity_at_the_ends_of_every_dtype(pattern):
    for dtype in ("float32", "float64", *HALVES):
        info = jnp.finfo(dtype)
        ends = [info.max, -info.max, info.tiny, -info.tiny, info.smallest_subnormal, 0.0, -0.0, 1.0]
        y = np.array([ends, ends[::-1], ends], dtype)
        assert equal_bits(prox(y, 0.0, pattern), y), dtype


@every_pattern
def test_large_penalty_keeps_huge_entries(pattern):
    for top_entry in (3e37, 3e38):
        y = np.tile(np.array([0.5, 1, 0.25, 0.75], np.float32), (3, 2)) * np.float32(top_entry)
        assert equal_bits(prox(y, 1.0, pattern), top(y, pattern))


@every_pattern
@given(y=any_inputs, lam=any_penalties)
def test_output_of_any_finite_input_is_finite_and_of_a_sparse_one_itself(pattern, y, lam):
    assert equal_bits(prox(y, 0.0, pattern), y)
    assert np.all(np.isfinite(prox(y, lam, pattern)))
    y = top(y, pattern)
    assert equal_bits(prox(y, lam, pattern), y)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@either_kept
def test_no_entry_is_denormal_unless_it_came_in_so(pattern, dtype):
    rng = np.random.default_rng(0)
    count, tiny = 2**12, float(np.finfo(dtype).tiny)
    y = rng.uniform(size=(count, 8)) * tiny * 10 ** rng.uniform(-2, 4, (count, 1))
    y = (y * 10 ** rng.uniform(-4, 0, y.shape)).astype(dtype)
    unit = np.abs(y).max(axis=-1, keepdims=True).astype(np.float64) ** (pattern[0] - 1)
    lam = (rng.uniform(0, 1, (count, 1)) / np.maximum(unit, tiny)).astype(dtype)
    w = np.asarray(prox(y, lam, pattern))
    changed = np.abs(w[w != y])
    assert len(changed) > count / 4
    assert np.all((changed == 0) | (changed >= tiny))


@every_pattern
@given(y=inputs, lam=penalties, row=st.integers(0, 2), column=st.integers(0, 7))
def test_nan_fills_its_own_block_and_no_other(pattern, y, lam, row, column):
    expected = in_blocks(prox(y, lam, pattern), pattern).copy()
    expected[(row * 8 + column) // pattern[1]] = np.nan
    y = y.copy()
    y[row, column] = np.nan
    assert np.array_equal(in_blocks(prox(y, lam, pattern), pattern), expected, equal_nan=True)


@every_pattern
@given(y=inputs, lam=penalties, row=st.integers(0, 2))
def test_nan_penalty_fills_the_blocks_it_belongs_to_and_no_other(pattern, y, lam, row):
    lams = np.full((3, 8 // pattern[1]), lam, np.float32)
    expected = in_blocks(prox(y, lams, pattern), pattern).copy()
    last = lams.shape[1] - 1
    lams[row, last] = np.nan
    expected[row * lams.shape[1] + last] = np.nan
    assert np.array_equal(in_blocks(prox(y, lams, pattern), pattern), expected, equal_nan=True)
    assert np.all(np.isnan(prox(y, np.nan, pattern)))


def test_what_has_no_operator_is_refused():
    y = jnp.ones((2, 8), jnp.float32)
    for pattern in ((3, 4), (4, 4)):
        said = rf"1:M and 2:M, not {pattern[0]}:{pattern[1]}.*sparsegpt"
        with pytest.raises(ValueError, match=said):
            prox(y, 1.0, pattern)
    with pytest.raises(ValueError, match=r"\(3, 6\).*4"):
        prox(jnp.ones((3, 6), jnp.float32), 1.0)
    for dtype in ("int32", "bool", "complex64"):
        with pytest.raises(ValueError, match=rf"floating-point.*{dtype}"):
            prox(jnp.ones(8, dtype), 1.0)
    for shape in ((3,), (2, 3), (2, 8), (1, 2, 2)):
        with pytest.raises(ValueError, match=r"lam.*\(2, 2\)"):
            prox(y, jnp.ones(shape, jnp.float32))


# Layouts


def kernel(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        pytest.param((8, 6), -2, id="flax_in_out", marks=pytest.mark.slow),
        pytest.param((3, 3, 8, 6), -2, id="flax_convolution"),
        pytest.param((6, 8, 3, 3), 1, id="torch_convolution", marks=pytest.mark.slow),
        pytest.param((8,), 0, id="vector"),
        pytest.param((0, 8), 1, id="empty"),
    ],
)
@either_kept
def test_layouts_equal_the_last_axis_moved(pattern, shape, axis):
    y = kernel(*shape)
    last = np.moveaxis(y, axis, -1)
    lam = np.abs(kernel(*last.shape[:-1], last.shape[-1] // pattern[1]))
    expected = np.moveaxis(np.asarray(prox(last, lam, pattern)), -1, axis)
    w = prox(y, np.moveaxis(lam, -1, axis), pattern, axis)
    assert w.shape == y.shape
    assert np.array_equal(w, expected)


def roundings(w, lam, pattern=(2, 4)):
    """Of a program that is compiled otherwise: M for an entry, grown by the inverse Hessian."""
    w = np.asarray(w).reshape(-1, pattern[1])
    return pattern[1] * inverse_hessian(w, lam, pattern[0])


@pytest.mark.parametrize("shape", [(), (6, 1), (1, 2), (2,), (6, 2)])
def test_penalty_per_row_or_block_equals_separate_calls(shape):
    y, lam = kernel(6, 8), np.abs(kernel(*shape)).astype(np.float32)
    w = np.asarray(prox(y, lam)).reshape(6, 2, 4)
    each = np.broadcast_to(lam, (6, 2))
    for index in np.ndindex(6, 2):
        block = y.reshape(6, 2, 4)[index]
        assert_close(w[index], prox(block, each[index]), roundings(w[index], each[index]))


def test_penalty_may_be_any_number_and_one_program_serves_all(caplog):
    y = kernel(6, 8)
    expected = {lam: np.asarray(prox(y, lam)) for lam in (0.5, 1.0)}
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        for lam in (1, np.float64(0.5), np.float32(0.5), np.int32(1), True):
            w = prox(y, lam)
            assert w.dtype == np.float32
            assert np.array_equal(w, expected[float(lam)])
        assert not caplog.messages


@pytest.mark.parametrize("dtype", HALVES)
@either_kept
@given(y=inputs, lam=penalties)
def test_half_precision_is_the_float32_result_rounded_once(pattern, dtype, y, lam):
    y = jnp.asarray(y).astype(dtype)
    w = prox(y, lam, pattern)
    assert w.dtype == dtype
    assert equal_bits(w, prox(y.astype(jnp.float32), lam, pattern).astype(dtype))


@pytest.mark.parametrize(("pattern", "axis"), [((2, 4), 0), ((1, 4), 1)])
def test_planes_joined_equal_the_array_bit_for_bit(pattern, axis):
    y, lam = kernel(16, 24), np.abs(kernel(16, 24))
    lam = np.delete(lam, np.s_[y.shape[axis] // pattern[1] :], axis)

    @jax.jit
    def joined(y, lam):
        w = planes.prox(planes.split(y, pattern, axis), lam, pattern[0])
        assert isinstance(w, tuple)
        return planes.join(w, axis)

    assert equal_bits(joined(y, lam), prox(y, lam, pattern, axis))


# Transforms


@pytest.mark.parametrize("in_axes", [(2, None), (0, 0)])
def test_vmap_over_inputs_equals_separate_calls(in_axes):
    y = np.stack([kernel(16, 8) * (1 + i) for i in range(4)], axis=in_axes[0])
    lams = np.array([0.0, 0.2, 0.9, 5.0], np.float32)
    lam = lams if in_axes[1] == 0 else np.float32(0.3)
    together = jax.vmap(prox, in_axes)(y, lam)
    for found, *pair in zip(
        together, np.moveaxis(y, in_axes[0], 0), np.broadcast_to(lam, 4), strict=True
    ):
        w = prox(*pair)
        assert_close(found, w, roundings(w, pair[1]))
