"""The derivative of the proximal operator against H^-1, finite differences and the chain rule."""

import collections
import functools

import hypothesis.extra.numpy as hnp
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_close, eps_of, penalty_gradient, prox_hessian, prox_jacobian
from tiers import rest

from prox24 import prox

PATTERNS = [(2, 4), *rest((2, 5), (1, 4))]

every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids="{0[0]}:{0[1]}".format)
either_kept = pytest.mark.parametrize(
    "pattern", [(2, 4), *rest((1, 4))], ids="{0[0]}:{0[1]}".format
)

# Where no entry of the Jacobian is larger, rounding and third derivatives are small: a derivative
# has two more factors of the Jacobian.
WELL_CONDITIONED = 10
THIRD = WELL_CONDITIONED**5
COUNT = 2000  # One shape, so that few programs are compiled.


def blocks(pattern, count, seed=0):
    """Blocks (n, M) of either sign and penalties (n,) under which every support size occurs."""
    rng = np.random.default_rng(seed)
    y = rng.choice([-1, 1], (count, pattern[1])) * rng.uniform(0.3, 1, (count, pattern[1]))
    return y, rng.uniform(0, 1.1, count)


def solved(y, lam, pattern):
    """The minimisers, with penalties (n,)."""
    return np.asarray(prox(y, lam[:, None], pattern))


def well_conditioned(w, lam, pattern):
    """Mask of the blocks to compare, which must be most of them and have every support size."""
    in_y, in_lam = prox_jacobian(w, lam, pattern[0])
    kept = np.maximum(np.abs(in_y).max(axis=(1, 2)), np.abs(in_lam).max(axis=1)) < WELL_CONDITIONED
    sizes = np.count_nonzero(w, axis=-1)
    assert np.mean(kept) > 0.9
    assert set(sizes[kept]) == set(range(pattern[0], pattern[1] + 1))
    return kept


@functools.cache
def jacobians(transform, pattern):
    """Compiled derivatives of every block in its entries and its penalty."""

    def of_block(y, lam):
        return prox(y, lam, pattern)

    return jax.jit(jax.vmap(transform(of_block, argnums=(0, 1))))


@pytest.mark.parametrize("transform", [*rest(jax.jacfwd), jax.jacrev])
@every_pattern
def test_jacobian_is_the_inverse_hessian_on_the_support(pattern, transform):
    y, lam = blocks(pattern, COUNT)
    w = solved(y, lam, pattern)
    kept = well_conditioned(w, lam, pattern)
    found = jacobians(transform, pattern)(y, lam)
    # M for an entry of w and of the Hessian, which the inverse takes two times.
    roundings = (pattern[1] * WELL_CONDITIONED) ** 2
    for got, expected in zip(found, prox_jacobian(w, lam, pattern[0]), strict=True):
        assert np.all(np.isfinite(got))
        assert_close(np.asarray(got)[kept], expected[kept], roundings)


@every_pattern
def test_jvp_and_gradient_agree_with_central_differences(pattern):
    y, lam = blocks(pattern, COUNT)
    rng = np.random.default_rng(1)
    dy, dlam, weights = (rng.normal(size=x.shape) for x in (y, lam, y))
    step = 3e-7
    ahead, here, behind = (solved(y + t * dy, lam + t * dlam, pattern) for t in (step, 0, -step))
    smooth = np.all((ahead != 0) == (here != 0), axis=-1)
    smooth &= np.all((behind != 0) == (here != 0), axis=-1)
    smooth &= lam > step * np.abs(dlam)
    assert np.mean(smooth) > 0.99
    kept = smooth & well_conditioned(here, lam, pattern)
    expected = (ahead - behind) / (2 * step)
    lengths = np.sqrt(np.sum(dy**2, axis=-1) + dlam**2)
    rounding = pattern[1] * WELL_CONDITIONED * eps_of("float64") / step
    limit = THIRD * step**2 * lengths**3 + rounding

    def f(y, lam):
        return prox(y, lam[:, None], pattern)

    _, dw = jax.jvp(jax.jit(f), (y, lam), (dy, dlam))
    assert np.all(np.linalg.norm(dw - expected, axis=-1)[kept] <= limit[kept])
    gradient = jax.grad(lambda y, lam: jnp.sum(weights * f(y, lam)), argnums=(0, 1))
    gy, glam = jax.jit(gradient)(y, lam)
    along = np.sum(gy * dy, axis=-1) + glam * dlam
    error = np.abs(along - np.sum(weights * expected, axis=-1))
    assert np.all(error[kept] <= (np.linalg.norm(weights, axis=-1) * limit)[kept])


@pytest.mark.parametrize("shape", [*rest(()), (6, 1)])
@either_kept
def test_gradient_in_a_shared_penalty_is_the_sum_over_its_blocks(pattern, shape):
    rng = np.random.default_rng(2)
    y, weights = rng.normal(size=(6, 40)), rng.normal(size=(6, 40))
    lam = np.asarray(rng.uniform(0.2, 0.9, shape))
    gradient = jax.jit(jax.grad(lambda lam: jnp.sum(weights * prox(y, lam, pattern))))(lam)
    each = np.broadcast_to(lam, (6, 10)).ravel()
    w = np.asarray(prox(y, lam, pattern)).reshape(-1, 4)
    in_y, in_lam = prox_jacobian(w, each, pattern[0])
    expected = np.sum(weights.reshape(-1, 4) * in_lam, axis=-1).reshape(6, 10)
    shared = {(): (0, 1), (6, 1): (1,)}[shape]
    summed = np.sum(expected, axis=shared).reshape(shape)
    # As above, in each of 60 blocks.
    assert_close(gradient, summed, 60 * (4 * np.abs(in_y).max()) ** 2)


@pytest.mark.slow  # beside the Jacobian
@either_kept
def test_second_derivative_agrees_with_differences_of_the_gradient(pattern):
    y, lam = blocks(pattern, 500)
    kept = well_conditioned(solved(y, lam, pattern), lam, pattern)
    point = np.concatenate([y, lam[:, None]], axis=1)
    weights = np.random.default_rng(3).normal(size=pattern[1])

    def scalar(point):
        w = prox(point[:-1], point[-1], pattern)
        return jnp.sum(weights * w) + jnp.sum(w * w) / 2

    hessian = np.asarray(jax.jit(jax.vmap(jax.hessian(scalar)))(point))
    gradient = jax.jit(jax.vmap(jax.grad(scalar)))
    step = 1e-5
    for i in range(point.shape[1]):
        shift = step * np.eye(point.shape[1])[i]
        ahead, behind = (gradient(point + sign * shift) for sign in (1, -1))
        smooth = kept & (lam > step)
        for side in (shift, -shift):
            moved = point + side
            w = solved(moved[:, :-1], moved[:, -1], pattern)
            smooth &= np.all((w != 0) == (solved(y, lam, pattern) != 0), axis=-1)
        assert np.mean(smooth) > 0.9
        expected = (ahead - behind) / (2 * step)
        scale = 1 + np.abs(hessian).max(axis=(1, 2))[:, None]
        error = np.abs(hessian[:, i] - expected) / scale
        assert error[smooth].max() < THIRD * step**2
    assert np.all(np.isfinite(hessian))


LEAST_EIGENVALUE = 0.02


def near_zero_diagonal(size):
    """Minimisers u at lam = 1 where 1 - s + 2 u_k, of the last of `size` entries, is 0 or below."""
    rng = np.random.default_rng(5)
    u = -np.sort(-rng.uniform(0, 1, (200_000, 4)), axis=-1)
    u[:, size:] = 0
    negative = rng.uniform(-0.1, 0, len(u)) * rng.integers(2, size=len(u))
    u[:, size - 1] = np.sum(u[:, : size - 1], axis=-1) - 1 + negative
    ordered = (u[:, size - 1] > 0) & (u[:, size - 1] <= u[:, size - 2])
    u = u[ordered]
    hessian = prox_hessian(u, 1.0)[:, :size, :size]
    u = u[np.linalg.eigvalsh(hessian)[:, 0] > LEAST_EIGENVALUE]
    y = u + penalty_gradient(u)
    y[:, size:] *= 0.5
    # Those that are the minimisers, and not other stationary points.
    found = np.all(np.abs(prox(y, 1.0) - u) < eps_of("float64") ** 0.5, axis=-1)
    assert np.count_nonzero(found) > COUNT
    return u[found][:COUNT], y[found][:COUNT]


@pytest.mark.parametrize("size", [3, 4])
def test_jacobian_is_right_where_the_diagonal_of_the_closed_form_vanishes(size):
    u, y = near_zero_diagonal(size)
    last = 1 - np.sum(u, axis=-1) + 2 * u[:, size - 1]
    assert np.sum(np.abs(last) < 16 * eps_of("float64")) > COUNT / 4  # of numbers up to 2
    assert np.sum(last < -1e-3) > COUNT / 4
    w = np.asarray(prox(y, 1.0))
    lam = np.ones(len(w))
    for transform in (jax.jacfwd, jax.jacrev):
        found = jacobians(transform, (2, 4))(y, lam)
        for got, expected in zip(found, prox_jacobian(w, lam), strict=True):
            assert_close(got, expected, (4 / LEAST_EIGENVALUE) ** 2)  # as above


@every_pattern
def test_jacobian_without_a_penalty_is_the_identity(pattern):
    y, _ = blocks(pattern, COUNT)
    # What is zero stays zero for every lam.
    y[np.random.default_rng(7).random(y.shape) < 0.2] = 0
    in_y, in_lam = jacobians(jax.jacrev, pattern)(y, np.zeros(COUNT))
    assert_close(in_y, np.tile(np.eye(pattern[1]), (COUNT, 1, 1)), pattern[1])
    # A sum of products of pairs.
    assert_close(in_lam, -np.sign(y) * penalty_gradient(y, pattern[0]), pattern[1] ** 2)
    # At any size.
    y = jnp.full(pattern[1], 1e30, jnp.float32)
    tangent = jnp.arange(pattern[1], dtype=jnp.float32)
    _, found = jax.jvp(lambda y: prox(y, 0.0, pattern), (y,), (tangent,))
    assert np.array_equal(found, tangent)


@every_pattern
def test_jacobian_of_sparse_input_is_its_mask_and_of_zeros_the_identity(pattern):
    kept, group = pattern
    rng = np.random.default_rng(6)
    y = rng.normal(size=(COUNT, group))
    y[:, kept:] = 0
    y[: COUNT // 4] = 0
    y = rng.permuted(y, axis=-1)
    lam = rng.uniform(0.1, 3, COUNT)
    for transform in (jax.jacfwd, jax.jacrev):
        in_y, in_lam = jacobians(transform, pattern)(y, lam)
        blank = np.all(y == 0, axis=1, keepdims=True) & (kept == 2)
        assert np.array_equal(in_y, ((y != 0) | blank)[:, :, None] * np.eye(group))
        assert np.array_equal(in_lam, np.zeros_like(y))


gradients = jax.jit(
    jax.grad(lambda y, lam, pattern: jnp.sum(prox(y, lam, pattern)), argnums=(0, 1)),
    static_argnums=2,
)
tie_or_number = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0]), st.floats(-4, 4, width=32))
any_number = st.floats(width=32, allow_nan=False, allow_infinity=False)
# The derivative in lam is the sum of up to 48 * 21 products of two of these, and finite.
large_number = st.floats(-(2.0**58), 2.0**58, width=32)
some_penalty = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 4, width=32))
any_penalty = st.floats(0, width=32, allow_nan=False, allow_infinity=False)


@every_pattern
@given(data=st.data(), lam=some_penalty, any_lam=any_penalty)
def test_gradient_of_any_finite_input_is_finite(pattern, data, lam, any_lam):
    """Also of zeros and ties."""

    def drawn(elements, lam):
        y = data.draw(hnp.arrays(np.float32, (6, pattern[1]), elements=elements))
        return gradients(y, np.float32(lam), pattern)

    for part in drawn(tie_or_number, lam):
        assert part.dtype == np.float32
        assert np.all(np.isfinite(part))
    assert np.all(np.isfinite(drawn(any_number, any_lam)[0]))
    assert np.all(np.isfinite(drawn(large_number, any_lam)[1]))


@pytest.mark.slow  # beside small ones
def test_derivatives_of_a_whole_weight_are_those_of_its_blocks():
    # A TPU has a kernel for arrays of this size with one penalty.
    y = np.random.default_rng(8).normal(size=(128, 256)).astype(np.float32)

    def energy(y, lam):
        return jnp.sum(jnp.square(prox(y, lam)))

    def products(y, lam):
        slope = jax.grad(energy, argnums=(0, 1))
        return slope(y, lam), jax.jvp(slope, (y, lam), (jnp.ones_like(y), jnp.float32(1)))[1]

    whole = jax.jit(products)(y, jnp.float32(0.3))
    parts = jax.jit(jax.vmap(products, (0, None)))(y.reshape(-1, 4), jnp.float32(0.3))
    lam = np.full(y.size // 4, 0.3)
    w = np.asarray(prox(y, 0.3), np.float64).reshape(-1, 4)
    mild = np.abs(prox_jacobian(w, lam)[0]).max(axis=(1, 2)) < WELL_CONDITIONED
    assert np.mean(mild) > 0.9
    for (found, _), (expected, _) in zip(whole, parts, strict=True):
        assert_close(np.reshape(found, (-1, 4))[mild], np.asarray(expected)[mild], THIRD)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, *rest(jnp.float16)])
def test_gradient_in_half_precision_is_that_of_float32_rounded(dtype):
    y = jnp.asarray(blocks((2, 4), 6)[0]).astype(dtype)
    gy, glam = gradients(y, np.float32(0.3), (2, 4))
    expected, _ = gradients(y.astype(jnp.float32), np.float32(0.3), (2, 4))
    assert gy.dtype == dtype
    assert glam.dtype == np.float32
    assert np.array_equal(gy, expected.astype(dtype))


def primitives(jaxpr):
    """How often each primitive occurs in a program and in those that it calls."""
    counts = collections.Counter()
    for equation in jaxpr.eqns:
        counts[equation.primitive.name] += 1
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            counts += primitives(inner)
    return counts


@every_pattern
def test_derivative_does_not_pass_through_the_iteration(pattern):
    y, lam = blocks(pattern, 8)

    def f(y, lam):
        return prox(y, lam[:, None], pattern)

    def gradient(y, lam):
        return jax.grad(lambda y, lam: jnp.sum(f(y, lam)), argnums=(0, 1))(y, lam)

    def tangent(y, lam):
        return jax.jvp(f, (y, lam), (y, lam))

    once = primitives(jax.make_jaxpr(f)(y, lam).jaxpr)
    assert once["sqrt"] > 0 or pattern[0] == 1
    for derivative in (gradient, tangent):
        counts = primitives(jax.make_jaxpr(derivative)(y, lam).jaxpr)
        # The iteration takes square roots, its derivative would take them again or divide by them.
        assert counts["sqrt"] == once["sqrt"]
        assert counts["max"] <= once["max"]
        solvers = {"while", "scan", "custom_linear_solve", "triangular_solve", "lu", "cholesky"}
        assert not solvers & set(counts)
