"""Swaps against trying every mask of every block, least squares, and corrected inputs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, damped, eps_of, masked_least_squares
from test_solvers import DAMPING, WIDTH, make_problem, roundings

from prox24._core.pattern import Pattern
from prox24._solvers.admm import ADMM
from prox24._solvers.problem import Status, correct_inputs
from prox24._solvers.proximal import ProximalGradient
from prox24._solvers.refit import ConjugateGradients, LeastSquares
from prox24._solvers.schedules import Exponential
from prox24._solvers.scores import Magnitude, Wanda
from prox24._solvers.solve import solve
from prox24._solvers.sparsegpt import SparseGPT
from prox24._solvers.swaps import Swaps


def swept(weight, mask, original, gram, kept, group, unit=1):
    """One sweep of the best mask of each block, with the other blocks as they are."""
    weight, mask = np.array(weight), np.array(mask)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], group * unit):
            block = slice(start, start + group * unit)
            inner = gram[block, block]
            slope = (weight[row] - original[row]) @ gram[:, block]
            goal = inner @ weight[row, block] - slope
            best = None
            for support in itertools.combinations(range(group), kept):
                chosen = [unit * number + entry for number in support for entry in range(unit)]
                values = np.zeros(group * unit)
                values[chosen] = np.linalg.solve(inner[np.ix_(chosen, chosen)], goal[chosen])
                loss = values @ inner @ values - 2 * values @ goal
                if best is None or loss < best[0]:
                    best = (loss, values, chosen)
            weight[row, block] = best[1]
            mask[row, block] = np.isin(np.arange(group * unit), best[2])
    return weight, mask


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("low_rank", (2, 4)),
        pytest.param("power_law", (2, 8), marks=pytest.mark.slow),
        pytest.param("few_tokens", (3, 4), marks=pytest.mark.slow),
        pytest.param("low_rank", Pattern(2, 4, unit=2), marks=pytest.mark.slow),
    ],
)
def test_a_sweep_takes_the_best_mask_of_every_block(kind, pattern):
    problem = make_problem(kind, rows=6, width=16, dtype="float64")
    exact = ConjugateGradients(200, 0.0)
    start = solve(*problem, Magnitude(), exact, pattern=pattern, damping=DAMPING)
    gram = damped(problem.gram, DAMPING)
    _, mask = swept(start.weight, start.mask, np.asarray(problem.weight), gram, *pattern)
    expected = masked_least_squares(problem.weight, gram, mask)
    solution = solve(*problem, Magnitude(), Swaps(1, exact), pattern=pattern, damping=DAMPING)
    assert np.array_equal(solution.mask, mask)
    assert_close(solution.weight, expected, roundings(problem))


def test_rows_stop_when_their_loss_is_still_and_not_before():
    problem = make_problem("power_law")
    counts = [
        solve(*problem, SparseGPT(), ConjugateGradients(200, tolerance)).statistics.refit_steps
        for tolerance in (1e-2, 1e-4, 0.0)
    ]
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[1] < 200
    for seed, damping in itertools.product(range(4), (0.01, 1e-3)):
        problem = make_problem("low_rank", seed)
        default, all_steps = (
            solve(*problem, SparseGPT(), refit, damping=damping).statistics.relative_loss
            for refit in (ConjugateGradients(), ConjugateGradients(21, 0.0))
        )
        assert default <= 1.01 * all_steps


def test_the_refit_waits_for_no_more_than_one_row_of_64():
    rng = np.random.default_rng(0)
    gram = np.zeros((WIDTH, WIDTH))
    easy, hard = slice(0, WIDTH // 2), slice(WIDTH // 2, WIDTH)
    inputs = rng.normal(size=(8 * WIDTH, WIDTH // 2))
    gram[easy, easy] = inputs.T @ inputs  # nearly the identity
    rotation = np.linalg.qr(inputs[: WIDTH // 2])[0]
    gram[hard, hard] = rotation.T @ np.diag(np.logspace(0, 5, WIDTH // 2)) @ rotation

    def steps(slow):
        weight = np.zeros((128, WIDTH))
        weight[slow:, easy] = rng.normal(size=(128 - slow, WIDTH // 2))
        weight[:slow, hard] = rng.normal(size=(slow, WIDTH // 2))
        problem = jnp.asarray(weight), jnp.asarray(gram)
        return solve(*problem, Magnitude(), ConjugateGradients(), damping=0.0).statistics

    assert steps(128).refit_steps == ConjugateGradients().steps
    assert steps(3).refit_steps == ConjugateGradients().steps
    few = steps(2)
    assert 0 < few.refit_steps < ConjugateGradients().steps
    assert not few.refit_exhausted


# Corrected inputs


def test_corrected_inputs_minimise_the_error_against_the_dense_output():
    rng = np.random.default_rng(0)
    weight, dense = rng.normal(size=(6, 12)), rng.normal(size=(12, 200))
    pruned = dense + 0.3 * rng.normal(size=dense.shape)
    gram, cross = pruned @ pruned.T, dense @ pruned.T

    def loss(w, pull):
        held = pull * np.trace(gram) * np.sum((w - weight) ** 2)
        return np.sum((w @ pruned - weight @ dense) ** 2) + held

    for pull in (0.001, 0.1, 10.0):
        given = jnp.asarray(weight), jnp.asarray(gram), jnp.asarray(cross)
        target = np.asarray(correct_inputs(*given, pull))
        for _ in range(20):
            step = 1e-3 * rng.normal(size=weight.shape)
            assert loss(target, pull) < min(loss(target + step, pull), loss(target - step, pull))


def test_inputs_that_did_not_change_need_no_correction():
    weight, gram = make_problem("power_law")
    assert np.array_equal(correct_inputs(weight, gram, gram, 0.1), weight)


def test_a_pull_may_be_traced():
    given = (*make_problem("power_law"), make_problem("low_rank")[1])
    pulls = jnp.array([0.1, 1.0], jnp.float32)
    found = jax.vmap(lambda pull: correct_inputs(*given, pull))(pulls)
    assert found.shape == (2, *given[0].shape)
    assert not np.array_equal(*found)


def test_a_pull_that_is_none_and_a_gram_that_does_not_fit_are_refused():
    weight, gram = jnp.ones((2, 4), jnp.float32), jnp.eye(4, dtype=jnp.float32)
    for pull in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"a pull of {pull} is not positive and finite"):
            correct_inputs(weight, gram, gram, pull)
    with pytest.raises(ValueError, match=r"\(3, 3\) is not of the Gram's shape \(4, 4\)"):
        correct_inputs(weight, gram, jnp.eye(3, dtype=jnp.float32))
    with pytest.raises(ValueError, match=r"weight \(4, 2\) and gram \(4, 4\)"):
        correct_inputs(weight.T, gram, gram)


# Damping


def test_damping_is_raised_until_the_factorization_succeeds_and_reported():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(8, 32)).astype(np.float32)
    gram = jnp.asarray(tokens.T @ tokens) - 1e-3 * jnp.eye(32, dtype=jnp.float32)
    problem = jnp.asarray(rng.normal(size=(8, 32)), jnp.float32), gram
    mean = np.mean(np.diagonal(gram), dtype=np.float64)
    solution = solve(*problem, SparseGPT(), damping=0.0)
    assert solution.status is Status.SPARSE
    assert solution.statistics.damping_raised
    used = solution.statistics.damping / mean
    # A mean of 32 terms.
    assert used == pytest.approx(10 ** np.round(np.log10(used)), rel=32 * eps_of("float32"))
    assert used >= 1e-3 / mean
    assert not solve(*problem, SparseGPT(), damping=0.01).statistics.damping_raised


def test_a_singular_gram_without_damping_is_solved_by_every_method():
    small = ADMM(rho=Exponential(1e-7, 1.0), scaling=1.0)
    pairs = [(solver, None) for solver in (SparseGPT(), ADMM(), ADMM(scaling=1.0), small)]
    pairs += [(Wanda(), Swaps()), (Wanda(), LeastSquares())]
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tokens = rng.normal(size=(12, 16)).astype(np.float32)
        tokens[:, 5] = tokens[:, 4]
        weight = jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)
        problem = weight, jnp.asarray(tokens.T @ tokens)
        for solver, refit in pairs:
            solution = solve(*problem, solver, refit, damping=0.0)
            assert solution.status is Status.SPARSE, (seed, solver, refit)


def test_dead_features_lose_their_weights_whatever_the_scale_of_the_gram():
    problem = make_problem("power_law")
    dead = np.isin(np.arange(64), [0, 6, 17])
    gram = jnp.where(dead[:, None] | dead[None, :], 0, problem.gram)
    for solver in (SparseGPT(), ADMM(), ProximalGradient()):
        for scale in (1e-4, 1.0, 1e4):
            solution = solve(*problem._replace(gram=scale * gram), solver, damping=0.0)
            assert not np.any(np.asarray(solution.mask)[:, dead])


def test_hyperparameters_may_be_numpy_numbers_of_another_precision():
    problem = make_problem("power_law")
    solver = ProximalGradient(Exponential(0.01, np.float64(1.05)))
    expected = solve(*problem, ProximalGradient())
    assert np.array_equal(solve(*problem, solver).mask, expected.mask)
