"""Inverses of damped Grams against NumPy's; what becomes of matrices that have none."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, damped, definite, eps_of, solve_roundings
from test_solvers import make_problem
from tiers import rest

from prox24._solvers import damping as solver_damping
from prox24._solvers.damping import damped_inverse, inverse_factor


@pytest.fixture(params=["by sweeps", "by Cholesky"])
def inverse(request, monkeypatch):
    """The inverse, its blocks of the diagonal inverted as on CPUs and TPUs, and as on GPUs."""
    if request.param == "by Cholesky":
        monkeypatch.setattr(
            solver_damping, "_inverted_pivot", lambda pivot, _: solver_damping._by_cholesky(pivot)
        )
    # A function of its own, since programs are kept by the function.
    return jax.jit(lambda matrix: solver_damping.inverse(matrix))


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_damping_stays_where_it_suffices_and_where_nothing_helps(damping):
    asked = jnp.float64(damping)
    gram = make_problem("power_law", dtype="float64").gram
    expected, roundings = np.linalg.inv(damped(gram, damping)), solve_roundings(gram)
    factor = inverse_factor(gram, asked)
    inverted = damped_inverse(gram, asked)
    assert float(factor.damping) == float(inverted.damping) == damping
    assert_close(factor.matrix.T @ factor.matrix, expected, roundings)
    assert_close(inverted.matrix, expected, roundings)
    assert np.array_equal(factor.matrix, np.triu(factor.matrix))
    for hopeless in (jnp.full((8, 8), jnp.nan), 2 - jnp.eye(8)):
        factor, inverted = inverse_factor(hopeless, asked), damped_inverse(hopeless, asked)
        assert float(factor.damping) == float(inverted.damping) == damping
        assert np.all(np.isnan(factor.matrix[0]))
        assert np.all(np.isnan(inverted.matrix))


@pytest.mark.parametrize(("dtype", "asked"), [(np.float32, 1e-3), (np.float64, 0.15)])
def test_an_indefinite_gram_gets_the_damping_that_it_needs(dtype, asked):
    gram = definite(40, 10.0, np.random.default_rng(0)) - 0.2 * np.eye(40)
    inverted = damped_inverse(jnp.asarray(gram, dtype), jnp.asarray(asked, dtype))
    assert float(inverted.damping) == 1.0
    # Wide ones are right to the condition in roundings (docs/theory.md, section 14).
    used = damped(gram, 1.0)
    assert_close(inverted.matrix, np.linalg.inv(used), 2 * np.linalg.cond(used))


# Less than a block, one block, several, and several that are filled up.
WIDTHS = [1, 60, 256, 384, 300]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_inverse_times_the_matrix_is_the_identity(width, inverse):
    for condition in (1e2, 1e8):
        matrix = definite(width, condition, np.random.default_rng(0))
        residual = np.asarray(inverse(jnp.asarray(matrix))) @ matrix - np.eye(width)
        assert np.abs(residual).max() <= 10 * width * eps_of("float64") * condition


@pytest.mark.optimized
@pytest.mark.parametrize("width", [60, 700])
def test_in_float32_the_inverse_is_right_to_rounding_times_the_condition(width, inverse):
    for condition in (1e1, 1e3, 1e5):
        matrix = definite(width, condition, np.random.default_rng(0))
        expected = np.linalg.inv(matrix)
        error = np.asarray(inverse(jnp.asarray(matrix, jnp.float32))) - expected
        assert np.linalg.norm(error) <= eps_of("float32") * condition * np.linalg.norm(expected)


def test_features_of_unequal_scale_have_inverses_as_good(inverse):
    width, scale = 300, np.geomspace(1e-3, 1e3, 300)
    matrix = definite(width, 100.0, np.random.default_rng(0))
    inverted = inverse(jnp.asarray(scale[:, None] * matrix * scale, jnp.float32))
    rescaled = np.asarray(inverted) * np.outer(scale, scale)
    assert_close(rescaled, np.linalg.inv(matrix), 2 * 100.0, "float32")


@pytest.mark.parametrize("place", [(0, 0), (3, 299), *rest((7, 7), (299, 299), (0, 1), (255, 256))])
def test_one_bad_entry_gives_nan(place, inverse):
    for value in (np.inf, -np.inf, np.nan, *((0.0, -1.0) if place[0] == place[1] else ())):
        matrix = np.eye(300)
        matrix[place] = matrix[place[::-1]] = value
        assert np.all(np.isnan(inverse(jnp.asarray(matrix)))), value


@pytest.mark.parametrize("width", [60, 300])
def test_only_the_upper_triangle_is_read(width, inverse):
    matrix = definite(width, 100.0, np.random.default_rng(0))
    inverted = inverse(jnp.asarray(matrix))
    matrix[np.tril_indices(width, -1)] = np.nan
    np.testing.assert_array_equal(inverse(jnp.asarray(matrix)), inverted)


@pytest.mark.parametrize("width", [*rest(1, 60), 300])
def test_a_matrix_that_is_not_definite_gives_nan(width, inverse):
    for seed, factor in itertools.product(range(8), (2.0, 1.001)):
        matrix = definite(width, 100.0, np.random.default_rng(seed))
        matrix -= factor * np.linalg.eigvalsh(matrix)[0] * np.eye(width)
        assert np.all(np.isnan(inverse(jnp.asarray(matrix)))), (seed, factor)
