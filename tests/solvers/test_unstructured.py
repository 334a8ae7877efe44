"""Sparsity without a pattern: masks, and the methods that support it, against NumPy."""

import hypothesis.extra.numpy as hnp
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_close, sparsegpt
from test_solvers import DAMPING, ROWS, WIDTH, make_problem, roundings

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


@given(hnp.arrays(np.float32, 24, elements=st.floats(-2, 2, width=16)), st.integers(0, 24))
def test_largest_mask_is_that_of_a_stable_sort(scores, kept):
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


def test_sparsegpt_compares_scores_within_blocks_of_columns_in_float64():
    problem = make_problem("low_rank", dtype="float64")

    def choose(scores):
        return largest_of_all(scores, scores.size - int(0.3 * scores.size))

    weight, mask = sparsegpt(*problem, choose, 16, DAMPING)
    solution = solve(*problem, SparseGPT(16), None, pattern=Unstructured(0.3), damping=DAMPING)
    assert solution.status is Status.SPARSE
    assert np.array_equal(solution.mask, mask)
    assert_close(solution.weight, weight, roundings(problem))


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
