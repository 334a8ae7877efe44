"""Schedules of the penalty and of rho."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_solvers import assert_has_pattern, make_problem

from prox24.solvers.problem import Status
from prox24.solvers.proximal import Prox
from prox24.solvers.schedules import (
    Adaptive,
    Cosine,
    Exponential,
    Linear,
    Progress,
    SupportSteps,
)
from prox24.solvers.solve import solve


def values(schedule, steps, changed=0.0):
    value, found = jnp.float32(schedule.first), []
    for step in range(steps):
        found.append(float(value))
        value = schedule(Progress(value, jnp.int32(step + 1), jnp.float32(changed)))
    return np.array(found)


def test_values_are_those_of_the_formulas():
    k = np.arange(9)
    np.testing.assert_allclose(values(Exponential(0.5, 1.3), 9), 0.5 * 1.3**k, rtol=1e-5)
    np.testing.assert_allclose(values(Linear(0.5, 0.25), 9), 0.5 + 0.25 * k, rtol=1e-6)
    wave = 1 + 3 * (1 - np.cos(np.pi * np.minimum(k / 6, 1))) / 2
    np.testing.assert_allclose(values(Cosine(1.0, 4.0, 6.0), 9), wave, rtol=1e-5)
    between = values(Exponential.between(0.3, 2.0, 9), 9)
    assert between[0] == pytest.approx(0.3)
    assert between[-1] == pytest.approx(2.0, rel=1e-5)


def test_adaptive_growth_is_between_its_bounds_and_halfway_at_the_turnover():
    schedule = Adaptive(1.0, slowest=1.1, fastest=1.5, turnover=0.01)
    assert values(schedule, 2, changed=0.0)[1] == pytest.approx(1.5)
    assert values(schedule, 2, changed=0.01)[1] == pytest.approx(1.3)
    assert values(schedule, 2, changed=1e6)[1] == pytest.approx(1.1)


@pytest.mark.parametrize(("changed", "growth"), [(0, 1), (1e-6, 1.1), (0.006, 1.2), (0.2, 1.3)])
def test_support_steps_follow_their_thresholds(changed, growth):
    assert values(SupportSteps(2.0), 2, changed)[1] == pytest.approx(2 * growth)


@pytest.mark.parametrize(
    "penalty",
    [Exponential(0.01, 1.1), Linear(0.01, 1.0), Cosine(0.01, 500.0, 150.0), Adaptive(0.01)],
    ids=lambda penalty: type(penalty).__name__,
)
def test_prox_ends_sparse_under_every_schedule(penalty):
    solution = solve(make_problem("power_law"), Prox(penalty))
    assert solution.status is Status.SPARSE
    assert_has_pattern(solution)


@pytest.mark.parametrize("rows", [16, 600])
@pytest.mark.parametrize(
    "options", [{"restart": True}, {"per_row": True}, {"momentum": 0.5}], ids=str
)
@pytest.mark.slow
def test_options_of_prox_end_sparse_and_near_the_default(options, rows):
    problem = make_problem("power_law", rows=rows, width=32)
    default, other = solve(problem, Prox()), solve(problem, Prox(**options))
    assert other.status is Status.SPARSE
    assert_has_pattern(other)
    assert other.statistics.relative_loss <= 1.1 * default.statistics.relative_loss


def test_rows_solved_among_many_are_solved_as_well_as_alone():
    problem = make_problem("power_law", rows=600, width=32)
    together = solve(problem, Prox()).statistics.relative_loss
    parts = [problem._replace(weight=part) for part in jnp.split(problem.weight, 4)]
    weights = jnp.concatenate([solve(part, Prox()).weight for part in parts])
    difference = np.asarray(weights - problem.weight, np.float64)
    gram = np.asarray(problem.gram, np.float64)
    original = np.asarray(problem.weight, np.float64)
    apart = np.sum(difference @ gram * difference) / np.sum(original @ gram * original)
    assert together == pytest.approx(apart, rel=0.02)
