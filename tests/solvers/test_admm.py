"""ADMM against a NumPy reference with a linear solve in every step; its fixed points."""

import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, damped, eps_of, largest, normalization
from test_solvers import DAMPING, KINDS, assert_has_pattern, make_problem, roundings
from tiers import rest

from prox24._core.prox import prox
from prox24._solvers.admm import ADMM
from prox24._solvers.problem import Status
from prox24._solvers.proximal import ProximalGradient
from prox24._solvers.refit import ConjugateGradients
from prox24._solvers.schedules import Exponential
from prox24._solvers.solve import solve
from prox24._solvers.sparsegpt import SparseGPT


def reference(problem, solver, sparsify):
    """The iteration as it is stated, with a linear solve per step, in float64: (weight, mask)."""
    gram = damped(problem.gram, DAMPING)
    curvature = np.diagonal(gram) ** (1 - solver.scaling)
    curvature = curvature * np.diagonal(np.linalg.inv(gram)) ** -solver.scaling
    scale, gram = normalization(problem.weight, gram, curvature)
    start = np.asarray(problem.weight) * scale
    w, u = start, np.zeros_like(start)
    for step in range(solver.steps):
        moves = step // solver.interval
        rho = solver.rho.first * solver.rho.growth**moves
        z = sparsify(w + u, step)
        u = w + u - z
        v = start - rho * np.linalg.solve(gram + rho * np.eye(len(gram)), (start - z + u).T).T
        w = z + solver.relaxation * (v - z)
        if step + 1 < solver.steps:
            following = solver.rho.first * solver.rho.growth ** ((step + 1) // solver.interval)
            u = u * (rho / following)
    mask = largest(np.abs(w + u), 2, 4)
    return np.where(mask, (w + u) / scale, 0), mask


def project(w, _):
    return np.where(largest(np.abs(w), 2, 4), w, 0)


def assert_equals_the_reference(problem, solver, sparsify):
    """Each step adds the roundings of a solution."""
    weight, mask = reference(problem, solver, sparsify)
    solution = solve(*problem, solver, None, damping=DAMPING)
    assert np.array_equal(solution.mask, mask)
    assert_close(solution.weight, weight, solver.steps * roundings(problem))


def test_projected_admm_equals_the_reference_in_float64():
    rho = Exponential.between(0.5, 1.2, 8)
    for kind, scaling in zip(KINDS, (0.0, 0.5, 1.0), strict=True):
        problem = make_problem(kind, dtype="float64")
        assert_equals_the_reference(
            problem, ADMM(24, rho, None, scaling, interval=3, relaxation=1.0), project
        )


@pytest.mark.parametrize("kind", ["low_rank", "few_tokens"])
def test_default_admm_equals_the_reference_with_the_operator_in_float64(kind):
    growth = ADMM().penalty

    def shrink(w, step):
        return np.asarray(prox(jnp.asarray(w), growth.first * growth.growth**step))

    assert_equals_the_reference(make_problem(kind, dtype="float64"), ADMM(), shrink)


def test_no_exchange_against_the_gradient_is_left_at_a_fixed_point():
    problem = make_problem("power_law", dtype="float64")
    solver = ADMM(4000, Exponential(1.0, 1.0), None, scaling=0.0, interval=4000)
    solution = solve(*problem, solver, ConjugateGradients(200, 0.0), damping=DAMPING)
    gram = damped(problem.gram, DAMPING)
    deviation = np.sqrt(np.diagonal(gram))
    slope = np.abs((np.asarray(solution.weight) - np.asarray(problem.weight)) @ gram) / deviation
    weight = np.abs(np.asarray(solution.weight)) * deviation
    mask = np.asarray(solution.mask)
    largest_slope = np.where(mask, 0, slope).reshape(-1, 4).max(axis=1)
    least_weight = np.where(mask, weight, np.inf).reshape(-1, 4).min(axis=1)
    # A slope and a weight that are equal differ by the rounding of the refit.
    rounding = roundings(problem) * eps_of("float64") * np.max(weight)
    assert np.mean(largest_slope <= least_weight + rounding) >= 0.995


@pytest.mark.parametrize("kind", [KINDS[0], *rest(*KINDS[1:])])
def test_default_loses_less_than_the_rivals_with_a_converged_refit(kind):
    refit = ConjugateGradients(200, 0.0)
    for seed in range(3):
        problem = make_problem(kind, seed, width=128)
        ours = solve(*problem, ADMM(), ConjugateGradients())
        assert ours.status is Status.SPARSE
        assert_has_pattern(ours)
        for rival in (SparseGPT(), ProximalGradient.paper()):
            theirs = solve(*problem, rival, refit)
            assert ours.statistics.relative_loss < theirs.statistics.relative_loss


def test_more_steps_lose_less():
    problems = [make_problem("power_law", seed, rows=64, width=128) for seed in range(3)]
    losses = [
        sum(solve(*p, ADMM.in_steps(steps)).statistics.relative_loss for p in problems)
        for steps in (4, 8, 20, 96)
    ]
    assert losses == sorted(losses, reverse=True)
    with pytest.raises(ValueError, match="need 4 steps or more, not 3"):
        ADMM.in_steps(3)


def test_a_projection_serves_any_pattern():
    problem = make_problem("power_law")
    solution = solve(*problem, ADMM(penalty=None), pattern=(4, 8))
    assert solution.status is Status.SPARSE
    assert_has_pattern(solution, 4, 8)
    rival = solve(*problem, SparseGPT(), pattern=(4, 8))
    assert solution.statistics.relative_loss < rival.statistics.relative_loss
