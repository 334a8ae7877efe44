"""Sparsity without a pattern: masks, and the methods that support it, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import damped
from test_solvers import ROWS, WIDTH, make_problem

from prox24._core.masks import count_violations, largest_mask
from prox24._core.pattern import Unstructured
from prox24._solvers.problem import Status
from prox24._solvers.refit import ConjugateGradients
from prox24._solvers.scores import Magnitude, Wanda
from prox24._solvers.solve import solve
from prox24._solvers.sparsegpt import SparseGPT

HALF = Unstructured(0.5)


def largest_of_all(scores, kept):
    order = np.argsort(-scores, axis=None, kind="stable")
    mask = np.zeros(scores.size, bool)
    mask[order[:kept]] = True
    return mask.reshape(scores.shape)


def sparsegpt(weight, gram, sparsity, block, damping):
    """arXiv 2301.00774, algorithm 1: scores are compared within blocks of columns."""
    w = np.array(weight, np.float64)
    upper = np.linalg.cholesky(np.linalg.inv(damped(gram, damping))).T
    mask = np.zeros(w.shape, bool)
    for j in range(w.shape[1]):
        if j % block == 0:
            columns = slice(j, j + block)
            scores = w[:, columns] ** 2 / np.diagonal(upper)[columns] ** 2
            mask[:, columns] = largest_of_all(scores, scores.size - int(sparsity * scores.size))
        error = np.where(mask[:, j], 0, w[:, j] / upper[j, j])
        w[:, j:] -= np.outer(error, upper[j, j:])
    return np.where(mask, w, 0), mask


@given(
    st.lists(st.floats(-2, 2, width=16), min_size=1, max_size=24),
    st.integers(0, 24),
)
def test_largest_mask_is_that_of_a_stable_sort(scores, kept):
    scores, kept = np.array(scores), min(kept, len(scores))
    mask = np.asarray(largest_mask(jnp.asarray(scores), kept))
    assert np.array_equal(mask, largest_of_all(scores, kept))
    table = np.tile(scores, (2, 1))
    rows = np.asarray(largest_mask(jnp.asarray(table), kept, axis=1))
    assert np.array_equal(rows, np.stack([mask, mask]))


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_magnitude_compares_all_entries_and_wanda_those_of_a_row(sparsity):
    problem, pattern = make_problem("low_rank"), Unstructured(sparsity)
    weight = np.abs(np.asarray(problem.weight))
    scores = weight * np.sqrt(np.diagonal(np.asarray(problem.gram)))
    magnitude = solve(*problem, Magnitude(), None, pattern=pattern)
    assert np.array_equal(magnitude.mask, largest_of_all(weight, pattern.kept(weight.size)))
    wanda = solve(*problem, Wanda(), None, pattern=pattern)
    kept = pattern.kept(weight.shape[1])
    assert np.array_equal(wanda.mask, [largest_of_all(row, kept) for row in scores])


@pytest.mark.parametrize(("sparsity", "block_size"), [(0.3, 16), (0.5, 64)])
def test_sparsegpt_equals_the_reference_in_float64(sparsity, block_size):
    problem = make_problem("low_rank", dtype="float64")
    weight, mask = sparsegpt(problem.weight, problem.gram, sparsity, block_size, 0.01)
    solution = solve(*problem, SparseGPT(block_size), None, pattern=Unstructured(sparsity))
    assert solution.status is Status.SPARSE
    assert np.array_equal(solution.mask, mask)
    np.testing.assert_allclose(solution.weight, weight, rtol=0, atol=1e-9)


def test_a_refit_lowers_the_loss_and_keeps_the_zeros():
    problem = make_problem("power_law")
    solution = solve(*problem, Wanda(), ConjugateGradients(), pattern=HALF)
    figures = solution.statistics
    assert figures.relative_loss < figures.relative_loss_before_refit
    assert int(count_violations(solution.weight, HALF)) == 0
    assert int(count_violations(problem.weight, HALF)) == problem.weight.size // 2 - ROWS - WIDTH


def test_a_fraction_out_of_range_is_refused():
    for sparsity in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="fraction"):
            Unstructured(sparsity)
