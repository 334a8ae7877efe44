"""N:M patterns, and the penalty whose zeros they are."""

import itertools
import logging
import math
import re

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_close, eps_of, largest
from tiers import rest

from prox24._core.blocks import join, split
from prox24._core.masks import count_violations, is_sparse, mean_sparsity, top_mask
from prox24._core.pattern import Unstructured, as_pattern
from prox24._core.penalty import penalty
from prox24._core.prox import prox

AXES = [-1, 0, 1]
FUNCTIONS = [top_mask, count_violations, is_sparse, penalty, split]
PATTERNS = [(2, 4), (4, 8), *rest((1, 4), (3, 4), (2, 8))]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids="{0[0]}:{0[1]}".format)

# Few distinct values, so that ties and zeros are common.
levels = st.sampled_from([0.0, 0.25, -0.5, 0.5, 1.0, -1.0, 2.0, -3.0])
# The CPU backend of JAX reads subnormal numbers as zero.
finite = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


def arrays(pattern, axis, elements):
    shape = [2, 3, 2]
    shape[axis] = 2 * pattern[1]
    return hnp.arrays(np.float32, tuple(shape), elements=elements)


def blocks_last(w, group, axis):
    moved = np.moveaxis(np.asarray(w), axis, -1)
    return moved.reshape(*moved.shape[:-1], -1, group)


@every_pattern
@given(axis=st.sampled_from(AXES), data=st.data())
def test_planes_hold_strided_entries_and_round_trip_bit_for_bit(pattern, axis, data):
    w = data.draw(arrays(pattern, axis, finite))
    planes = split(w, pattern, axis)
    expected = blocks_last(w, pattern[1], axis)
    assert len(planes) == pattern[1]
    for i, plane in enumerate(planes):
        assert np.array_equal(np.moveaxis(np.asarray(plane), axis, -1), expected[..., i])
    restored = np.asarray(join(planes, axis))
    assert restored.dtype == w.dtype
    assert restored.shape == w.shape
    assert restored.tobytes() == w.tobytes()


@every_pattern
@given(axis=st.sampled_from(AXES), data=st.data())
def test_top_mask_keeps_the_largest_and_of_equal_ones_the_earlier(pattern, axis, data):
    for elements in (levels, finite):
        scores = data.draw(arrays(pattern, axis, elements))
        mask = np.asarray(top_mask(scores, pattern, axis))
        assert mask.dtype == bool
        expected = largest(np.moveaxis(scores, axis, -1), *pattern)
        assert np.array_equal(np.moveaxis(mask, axis, -1), expected)


@every_pattern
@given(axis=st.sampled_from(AXES), data=st.data())
def test_violations_are_the_blocks_with_more_than_n_nonzeros(pattern, axis, data):
    kept, group = pattern
    w = data.draw(arrays(pattern, axis, levels))
    expected = np.sum(np.count_nonzero(blocks_last(w, group, axis), axis=-1) > kept)
    assert int(count_violations(w, pattern, axis)) == expected
    assert bool(is_sparse(w, pattern, axis)) == (expected == 0)
    assert (float(penalty(w, pattern, axis)) == 0) == (expected == 0)


def test_nan_counts_as_nonzero():
    assert int(count_violations(jnp.array([np.nan, np.nan, np.nan, 0.0]))) == 1
    assert bool(is_sparse(jnp.array([np.nan, np.nan, 0.0, 0.0])))


def test_mean_sparsity_counts_exact_zeros():
    assert float(mean_sparsity(jnp.array([0.0, -0.0, 1e-30, np.nan]))) == 0.5


@every_pattern
@given(axis=st.sampled_from(AXES), data=st.data())
def test_penalty_is_the_sum_over_subsets_of_n_plus_one_entries(pattern, axis, data):
    kept, group = pattern
    w = data.draw(arrays(pattern, axis, st.floats(-4, 4, width=32, allow_subnormal=False)))
    magnitudes = np.abs(blocks_last(w, group, axis).astype(np.float64)).reshape(-1, group)
    products = [
        math.prod(subset)
        for block in magnitudes
        for subset in itertools.combinations(block, kept + 1)
    ]
    value = penalty(w, pattern, axis)
    assert value.dtype == jnp.float32
    assert value.shape == ()
    # A block takes 2 M roundings of positive numbers, and the sum one for each block. A product
    # that underflows is lost, and with it up to N factors of at most 4.
    rel = (2 * group + len(magnitudes)) * eps_of("float32")
    lost = len(products) * 4.0**kept * float(np.finfo(np.float32).tiny)
    assert float(value) == pytest.approx(sum(products), rel=rel, abs=lost)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_penalty_of_16_bit_entries_is_computed_in_float32(dtype):
    value = penalty(jnp.full((64, 64), 48, dtype))
    assert (value.dtype, float(value)) == (jnp.float32, 64 * 16 * 4 * 48.0**3)
    assert float(penalty(jnp.ones(8, dtype), (4, 4))) == 0


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_no_pattern_or_does_not_fit_is_refused(function):
    w = jnp.ones((8, 20), jnp.float32)
    for kept in (5, 0, -1):
        with pytest.raises(ValueError, match=f"pattern {kept}:4 is not N:M with 1 <= N <= M"):
            function(w, (kept, 4))
    with pytest.raises(ValueError, match=re.escape("(1.5, 4) is not N:M")):
        function(w, (1.5, 4))
    with pytest.raises(ValueError, match=r"shape \(8, 20\) has no axis 2"):
        function(w, axis=2)
    with pytest.raises(ValueError, match=r"axis 0\.5 is not a whole number"):
        function(w, axis=0.5)
    for shape, axis in (((8, 6), 1), ((6, 8), 0), ((8, 10), -1)):
        with pytest.raises(ValueError, match=rf"{re.escape(str(shape))}.* divisible by 4"):
            function(jnp.ones(shape), (2, 4), axis)


def test_an_axis_of_a_joined_array_is_counted_in_its_own_axes():
    with pytest.raises(ValueError, match=r"shape \(8, 2\) has no axis -3"):
        join(split(jnp.ones((8, 8), jnp.float32)), -3)


@pytest.mark.parametrize("pattern", [(2.0, 4.0), (2,), (2, 4, 8), 0.5, "50%", Unstructured(0.5)])
def test_what_is_no_pair_of_integers_is_refused(pattern):
    for function in (as_pattern, lambda pattern: prox(jnp.ones(20, jnp.float32), 1.0, pattern)):
        with pytest.raises(ValueError, match=re.escape(f"{pattern} is not N:M")):
            function(pattern)


def test_what_is_computed_from_joined_planes_is_the_same_compiled_or_not():
    # jaxlib 0.12 once fused all of this wrongly.
    rng = np.random.default_rng(0)
    weight, step = (jnp.asarray(rng.normal(size=(16, 64)), jnp.float32) for _ in range(2))

    def landing(weight, step):
        w = prox(weight + step, 1e6)
        return jnp.where(w == weight + step, step, w - weight)

    # Entries are kept or pruned as they are: a step has two additions.
    assert_close(jax.jit(landing)(weight, step), landing(weight, step), 2)


def test_planes_that_vary_over_fewer_axes_are_joined_in_shard_map():
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("rows")
    same, varying = jnp.ones((4,)), jnp.arange(4.0)
    joined = jax.shard_map(
        lambda varying: join([same, varying]), mesh=mesh, in_specs=spec, out_specs=spec
    )
    assert joined(varying).tolist() == join([same, varying]).tolist()


@pytest.mark.parametrize(
    "function",
    [prox, top_mask, lambda y: jax.grad(lambda y: prox(y, 0.3).sum())(y)],
    ids=["prox", "top_mask", "gradient"],
)
def test_a_second_call_outside_of_jit_compiles_nothing(function, caplog):
    arguments = (jnp.ones((3, 8)), 0.3) if function is prox else (jnp.ones((3, 8)),)
    function(*arguments)
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        function(*arguments)
        assert not caplog.messages
        jax.jit(lambda y: y + 1)(arguments[0])
        assert caplog.messages
