"""Swaps against trying every mask of every block, least squares, and corrected inputs."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from reference import damped, masked_least_squares, quadratic_loss
from test_solvers import DAMPING, assert_has_pattern, damped_loss, make_problem

from prox24.solvers.admm import ADMM
from prox24.solvers.damping import damped_inverse
from prox24.solvers.problem import LayerProblem, Status, correct_inputs
from prox24.solvers.proximal import ProximalGradient
from prox24.solvers.refit import ConjugateGradients, GradientSteps, LeastSquares
from prox24.solvers.schedules import Exponential
from prox24.solvers.scores import Magnitude, Wanda
from prox24.solvers.solve import REFITS, SOLVERS, solve
from prox24.solvers.sparsegpt import SparseGPT
from prox24.solvers.swaps import Swaps

KINDS = ["low_rank", "power_law", "few_tokens"]


def swept(weight, mask, original, gram, kept, group):
    """One sweep of the best mask of each block, with the other blocks as they are."""
    weight, mask = np.array(weight), np.array(mask)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], group):
            block = slice(start, start + group)
            inner = gram[block, block]
            slope = (weight[row] - original[row]) @ gram[:, block]
            goal = inner @ weight[row, block] - slope
            best = None
            for support in itertools.combinations(range(group), kept):
                chosen = list(support)
                values = np.zeros(group)
                values[chosen] = np.linalg.solve(inner[np.ix_(chosen, chosen)], goal[chosen])
                loss = values @ inner @ values - 2 * values @ goal
                if best is None or loss < best[0] - 1e-12:
                    best = (loss, values, chosen)
            weight[row, block] = best[1]
            mask[row, block] = np.isin(np.arange(group), best[2])
    return weight, mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 4), (2, 8)])
def test_a_sweep_takes_the_best_mask_of_every_block(kind, pattern):
    problem = make_problem(kind, rows=6, width=16, dtype="float64")
    exact = ConjugateGradients(200, 0.0)
    start = solve(problem, Magnitude(), exact, pattern=pattern, damping=DAMPING)
    gram = damped(problem.gram, DAMPING)
    _, mask = swept(start.weight, start.mask, np.asarray(problem.weight), gram, *pattern)
    expected = masked_least_squares(problem.weight, gram, mask)
    solution = solve(problem, Magnitude(), Swaps(1, exact), pattern=pattern, damping=DAMPING)
    assert np.array_equal(solution.mask, mask)
    np.testing.assert_allclose(solution.weight, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", [Magnitude(), Wanda(), SparseGPT()], ids=str)
def test_swaps_never_raise_the_loss_and_help_the_weaker_masks(kind, solver):
    problem = make_problem(kind)
    losses = []
    for sweeps in (0, 1, 2, 4):
        solution = solve(problem, solver, Swaps(sweeps), damping=DAMPING)
        assert_has_pattern(solution)
        losses.append(damped_loss(solution, problem))
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(losses))
    assert losses[-1] < 0.99 * losses[0]


def test_swaps_refuse_a_pattern_with_too_many_masks():
    with pytest.raises(ValueError, match="8:16 has too many"):
        solve(make_problem("power_law"), Magnitude(), Swaps(), pattern=(8, 16))


@pytest.mark.parametrize("kind", KINDS)
def test_least_squares_are_the_exact_minimiser(kind):
    problem = make_problem(kind, dtype="float64")
    solution = solve(problem, Wanda(), LeastSquares(), damping=DAMPING)
    exact = masked_least_squares(problem.weight, damped(problem.gram, DAMPING), solution.mask)
    np.testing.assert_allclose(solution.weight, exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_every_refit_of_a_fixed_mask_ends_near_the_exact_loss(kind):
    problem = make_problem(kind)
    exact = damped_loss(solve(problem, SparseGPT(), LeastSquares(), damping=DAMPING), problem)
    for refit in (ConjugateGradients(), ConjugateGradients(100, 0.0), GradientSteps()):
        loss = damped_loss(solve(problem, SparseGPT(), refit, damping=DAMPING), problem)
        assert exact * (1 - 1e-3) <= loss <= 1.01 * exact


def test_rows_stop_when_their_loss_is_still():
    problem = make_problem("power_law")
    counts = [
        solve(problem, SparseGPT(), ConjugateGradients(200, tolerance)).statistics.refit_steps
        for tolerance in (1e-2, 1e-4, 0.0)
    ]
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[1] < 200


# Corrected inputs


@pytest.mark.parametrize("pull", [0.001, 0.1, 10.0])
def test_corrected_inputs_minimise_the_error_against_the_dense_output(pull):
    rng = np.random.default_rng(0)
    weight, dense = rng.normal(size=(6, 12)), rng.normal(size=(12, 200))
    pruned = dense + 0.3 * rng.normal(size=dense.shape)
    gram, cross = pruned @ pruned.T, dense @ pruned.T
    problem = LayerProblem(jnp.asarray(weight), jnp.asarray(gram))
    target = np.asarray(correct_inputs(problem, jnp.asarray(cross), pull).weight)
    pulled = pull * np.trace(gram)

    def loss(w):
        return np.sum((w @ pruned - weight @ dense) ** 2) + pulled * np.sum((w - weight) ** 2)

    for _ in range(20):
        step = 1e-3 * rng.normal(size=weight.shape)
        assert loss(target) < min(loss(target + step), loss(target - step))


def test_inputs_that_did_not_change_need_no_correction():
    problem = make_problem("power_law")
    corrected = correct_inputs(problem, problem.gram, 0.1)
    np.testing.assert_allclose(corrected.weight, problem.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pull", [0.0, -1.0, float("nan"), float("inf")])
def test_a_pull_that_is_none_is_refused(pull):
    problem = LayerProblem(jnp.ones((2, 4), jnp.float32), jnp.eye(4, dtype=jnp.float32))
    with pytest.raises(ValueError, match=f"a pull of {pull} is not positive and finite"):
        correct_inputs(problem, problem.gram, pull)


def test_a_cross_gram_of_another_width_is_refused():
    problem = LayerProblem(jnp.ones((2, 4), jnp.float32), jnp.eye(4, dtype=jnp.float32))
    with pytest.raises(ValueError, match=r"\(3, 3\) is not of the Gram's shape \(4, 4\)"):
        correct_inputs(problem, jnp.eye(3, dtype=jnp.float32))
    kernel = problem._replace(weight=problem.weight.T)  # (in, out)
    with pytest.raises(ValueError, match=r"weight \(4, 2\) and gram \(4, 4\)"):
        correct_inputs(kernel, problem.gram)


@pytest.mark.parametrize("damping", [float("nan"), 0.0])
def test_damping_that_cannot_help_ends(damping):
    gram = jnp.full((4, 4), jnp.nan, jnp.float32)
    found = damped_inverse(gram, jnp.asarray(damping, jnp.float32))
    assert jnp.isnan(found.matrix).all()
    np.testing.assert_array_equal(found.damping, np.float32(damping))


@pytest.mark.parametrize("refit", [None, *(r() for r in REFITS.values())], ids=str)
@pytest.mark.parametrize("method", SOLVERS)
def test_every_method_comes_closer_to_the_dense_output_with_corrected_inputs(method, refit):
    rng = np.random.default_rng(0)
    weight, dense = rng.normal(size=(16, 32)), rng.normal(size=(32, 400))
    mix = np.eye(32) + 0.2 * rng.normal(size=(32, 32))
    pruned = mix @ dense
    problem = LayerProblem(
        jnp.asarray(weight, "float32"), jnp.asarray(pruned @ pruned.T, "float32")
    )
    corrected = correct_inputs(problem, jnp.asarray(dense @ pruned.T, jnp.float32), 3e-4)

    def error(problem):
        solution = solve(problem, SOLVERS[method](), refit)
        return np.sum((np.asarray(solution.weight) @ pruned - weight @ dense) ** 2)

    assert error(corrected) < 0.8 * error(problem)


# Damping


def test_damping_is_raised_until_the_factorization_succeeds_and_reported():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(8, 32)).astype(np.float32)
    gram = jnp.asarray(tokens.T @ tokens) - 1e-3 * jnp.eye(32, dtype=jnp.float32)
    problem = LayerProblem(jnp.asarray(rng.normal(size=(8, 32)), jnp.float32), gram)
    mean = float(jnp.mean(jnp.diagonal(gram)))
    solution = solve(problem, SparseGPT(), damping=0.0)
    assert solution.status is Status.SPARSE
    assert solution.statistics.damping_raised
    used = solution.statistics.damping / mean
    assert used == pytest.approx(10 ** np.round(np.log10(used)), rel=1e-4)
    assert used >= 1e-3 / mean
    assert not solve(problem, SparseGPT(), damping=0.01).statistics.damping_raised


@pytest.mark.parametrize("seed", range(40))
def test_a_singular_gram_without_damping_is_solved_by_every_method(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(12, 16)).astype(np.float32)
    tokens[:, 5] = tokens[:, 4]
    weight = jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)
    problem = LayerProblem(weight, jnp.asarray(tokens.T @ tokens))
    small = ADMM(rho=Exponential(1e-7, 1.0), scaling=1.0)
    pairs = [(solver, None) for solver in (SparseGPT(), ADMM(), ADMM(scaling=1.0), small)]
    pairs += [(Wanda(), Swaps()), (Wanda(), LeastSquares())]
    for solver, refit in pairs:
        solution = solve(problem, solver, refit, damping=0.0)
        assert solution.status is Status.SPARSE


@pytest.mark.parametrize("damping", [0.01, 1e-3])
def test_default_conjugate_gradients_do_not_stop_short_after_sparsegpt(damping):
    for seed in range(4):
        problem = make_problem("low_rank", seed)
        loss = {
            steps: solve(
                problem, SparseGPT(), ConjugateGradients(steps, tolerance), damping=damping
            ).statistics.relative_loss
            for steps, tolerance in ((20, 1e-4), (21, 0.0))
        }
        assert loss[20] <= 1.01 * loss[21]


def test_dead_features_lose_their_weights_whatever_the_scale_of_the_gram():
    problem = make_problem("power_law")
    dead = np.isin(np.arange(64), [0, 6, 17])
    gram = jnp.where(dead[:, None] | dead[None, :], 0, problem.gram)
    for solver in (SparseGPT(), ADMM(), ProximalGradient()):
        for scale in (1e-4, 1.0, 1e4):
            solution = solve(problem._replace(gram=scale * gram), solver, damping=0.0)
            assert not np.any(np.asarray(solution.mask)[:, dead])


@pytest.mark.parametrize("damping", [-0.5, float("nan")])
def test_damping_that_is_no_number_is_refused(damping):
    with pytest.raises(ValueError, match="damping"):
        solve(make_problem("power_law"), SparseGPT(), damping=damping)


def test_integers_are_refused():
    weight, gram = make_problem("power_law")
    with pytest.raises(ValueError, match="weight is int32"):
        solve(LayerProblem(weight.astype(jnp.int32), gram), SparseGPT())


def test_hyperparameters_may_be_numpy_numbers_of_another_precision():
    problem = make_problem("power_law")
    solver = ProximalGradient(Exponential(0.01, np.float64(1.05)))
    expected = solve(problem, ProximalGradient())
    assert np.array_equal(solve(problem, solver).mask, expected.mask)


def test_quadratic_loss_of_a_correction_is_about_the_target():
    problem = make_problem("power_law")
    target = problem._replace(weight=problem.weight + 1)
    solution = solve(target, SparseGPT())
    total = quadratic_loss(0 * target.weight, target.weight, target.gram)
    loss = quadratic_loss(solution.weight, target.weight, target.gram) / total
    assert solution.statistics.relative_loss == pytest.approx(loss, rel=1e-4)
