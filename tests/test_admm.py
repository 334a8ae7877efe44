"""ADMM against a NumPy reference with a linear solve in every step; its fixed points."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from reference import damped, largest, normalization, quadratic_loss
from test_solvers import DAMPING, assert_has_pattern, make_problem

from prox24.core.pattern import as_pattern
from prox24.core.prox import prox
from prox24.solvers.admm import ADMM, GradualProjection, Projection, Shrinkage
from prox24.solvers.planar import dense_blocks
from prox24.solvers.problem import Status
from prox24.solvers.proximal import Prox
from prox24.solvers.refit import ConjugateGradients
from prox24.solvers.schedules import Exponential, Progress
from prox24.solvers.solve import solve
from prox24.solvers.sparsegpt import SparseGPT

KINDS = ["low_rank", "power_law", "few_tokens"]


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
        w = start - rho * np.linalg.solve(gram + rho * np.eye(len(gram)), (start - z + u).T).T
        if step + 1 < solver.steps:
            following = solver.rho.first * solver.rho.growth ** ((step + 1) // solver.interval)
            u = u * (rho / following)
    mask = largest(np.abs(w + u), 2, 4)
    return np.where(mask, (w + u) / scale, 0), mask


def project(w, _):
    return np.where(largest(np.abs(w), 2, 4), w, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaling", [0.0, 0.5, 1.0])
def test_projected_admm_equals_the_reference_in_float64(kind, scaling):
    problem = make_problem(kind, dtype="float64")
    rho = Exponential.between(0.5, 1.2, 8)
    solver = ADMM(24, rho, Projection(), scaling, interval=3)
    weight, mask = reference(problem, solver, project)
    solution = solve(problem, solver, None, damping=DAMPING)
    assert np.array_equal(solution.mask, mask)
    np.testing.assert_allclose(solution.weight, weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_default_admm_equals_the_reference_with_the_operator_in_float64(kind):
    problem = make_problem(kind, dtype="float64")
    solver = ADMM()
    growth = solver.sparsify.penalty

    def shrink(w, step):
        return np.asarray(prox(jnp.asarray(w), growth.first * growth.growth**step))

    weight, mask = reference(problem, solver, shrink)
    solution = solve(problem, solver, None, damping=DAMPING)
    assert np.array_equal(solution.mask, mask)
    np.testing.assert_allclose(solution.weight, weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["power_law", "low_rank"])
def test_no_exchange_against_the_gradient_is_left_at_a_fixed_point(kind):
    problem = make_problem(kind, dtype="float64")
    solver = ADMM(4000, Exponential(1.0, 1.0), Projection(), scaling=0.0, interval=4000)
    solution = solve(problem, solver, ConjugateGradients(200, 0.0), damping=DAMPING)
    gram = damped(problem.gram, DAMPING)
    deviation = np.sqrt(np.diagonal(gram))
    slope = np.abs((np.asarray(solution.weight) - np.asarray(problem.weight)) @ gram) / deviation
    weight = np.abs(np.asarray(solution.weight)) * deviation
    mask = np.asarray(solution.mask)
    largest_slope = np.where(mask, 0, slope).reshape(-1, 4).max(axis=1)
    least_weight = np.where(mask, weight, np.inf).reshape(-1, 4).min(axis=1)
    assert np.mean(largest_slope <= least_weight + 1e-6) >= 0.995


@pytest.mark.parametrize("kind", KINDS)
def test_default_loses_less_than_the_rivals_with_a_converged_refit(kind):
    refit = ConjugateGradients(200, 0.0)
    for seed in range(3):
        problem = make_problem(kind, seed, rows=64, width=128)
        ours = solve(problem, ADMM(), ConjugateGradients())
        assert ours.status is Status.SPARSE
        assert_has_pattern(ours)
        for rival in (SparseGPT(), Prox.paper(), ADMM.boza()):
            theirs = solve(problem, rival, refit)
            assert ours.statistics.relative_loss < theirs.statistics.relative_loss


def test_more_steps_lose_less():
    problems = [make_problem("power_law", seed, rows=64, width=128) for seed in range(3)]
    losses = [
        sum(solve(p, ADMM.in_steps(steps)).statistics.relative_loss for p in problems)
        for steps in (4, 8, 24, 96)
    ]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("preset", [ADMM.alps(), ADMM.boza()], ids=["alps", "boza"])
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 4)])
def test_presets_support_any_pattern(preset, pattern):
    problem = make_problem("power_law")
    solution = solve(problem, preset, pattern=pattern)
    assert solution.status is Status.SPARSE
    assert_has_pattern(solution, *pattern)
    assert solution.statistics.steps <= preset.steps
    rival = solve(problem, SparseGPT(), pattern=pattern)
    assert solution.statistics.relative_loss < rival.statistics.relative_loss


def test_alps_ends_when_the_support_is_still():
    steps = solve(make_problem("power_law"), ADMM.alps(), None).statistics.steps
    assert 3 < steps < 300
    assert steps % 3 == 0


@pytest.mark.parametrize("sparsify", [Projection(), Shrinkage()], ids=["projection", "operator"])
def test_an_early_end_gives_what_so_many_steps_give(sparsify):
    problem = make_problem("power_law", dtype="float64", rows=64, width=64)
    early = ADMM(300, Exponential(0.1, 1.3), sparsify, interval=3, tolerance=1e-2)
    ended = solve(problem, early, None)
    steps = ended.statistics.steps
    assert 3 < steps < 300
    whole = solve(problem, dataclasses.replace(early, steps=steps, tolerance=0.0), None)
    assert np.array_equal(ended.mask, whole.mask)
    np.testing.assert_allclose(ended.weight, whole.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 4)])
def test_gradual_projection_keeps_the_largest_of_a_block_and_ever_fewer_others(pattern):
    kept, group = pattern
    weight = np.random.default_rng(0).normal(size=(32, 8 * group))
    blocks = [jnp.asarray(weight[:, i::group]) for i in range(group)]
    outside = weight.size * (group - kept) / group
    for step in range(5):
        progress = Progress(jnp.zeros(()), jnp.asarray(step), jnp.zeros(()))
        sparse = GradualProjection(5.0)(blocks, blocks, as_pattern(pattern), progress)
        joined = np.stack(sparse, axis=-1).reshape(weight.shape)
        remaining = (1 - min((step + 1) / 5, 1)) ** 3
        allowed = weight.size - outside + remaining * outside
        assert abs(np.count_nonzero(joined) - allowed) <= 1
        top = largest(np.abs(weight), kept, group)
        assert np.array_equal(joined[top], weight[top])
    assert not np.any(dense_blocks(sparse, as_pattern(pattern)))
    later = Progress(jnp.zeros(()), jnp.asarray(5), jnp.zeros(()))
    others = [plane[::-1] for plane in blocks]
    same = GradualProjection(5.0)(others, sparse, as_pattern(pattern), later)
    for plane, other, kept in zip(same, others, sparse, strict=True):
        assert np.array_equal(plane, np.where(kept != 0, other, 0))


def test_shrinkage_refuses_patterns_without_an_operator():
    with pytest.raises(ValueError, match="1:M and 2:M"):
        solve(make_problem("power_law"), ADMM(), pattern=(4, 8))


def test_an_early_step_of_shrinkage_keeps_undecided_blocks_dense():
    problem = make_problem("power_law")
    blocks = jnp.split(problem.weight, 4, axis=1)
    progress = Progress(jnp.float32(0.1), jnp.int32(0), jnp.float32(0))
    sparse = Shrinkage()(blocks, blocks, as_pattern((2, 4)), progress)
    assert np.mean(dense_blocks(sparse, as_pattern((2, 4)))) > 0.5


def test_the_loss_that_is_reported_is_that_of_the_projected_weight():
    problem = make_problem("low_rank")
    solution = solve(problem, ADMM(), None)
    total = quadratic_loss(0 * problem.weight, problem.weight, problem.gram)
    loss = quadratic_loss(solution.weight, problem.weight, problem.gram) / total
    assert solution.statistics.relative_loss == pytest.approx(loss, rel=1e-4)
