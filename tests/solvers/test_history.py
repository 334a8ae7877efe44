"""The history of losses: each entry is the loss of a solver that stops there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import eps_of

import prox24

WEIGHT = jax.random.normal(jax.random.key(0), (8, 16), jnp.float64)
TOKENS = jax.random.normal(jax.random.key(1), (64, 16), jnp.float64)
GRAM = TOKENS.T @ TOKENS
# Sums of 128 terms in float64, of which W0 G W0^T has the largest.
ROUNDINGS = WEIGHT.size * np.linalg.cond(GRAM) * eps_of("float64")


@pytest.mark.parametrize(
    ("steps", "solver"),
    [
        ("steps", prox24.ADMM()),
        pytest.param("steps", prox24.ADMM(penalty=None), marks=pytest.mark.slow),
        ("max_steps", prox24.ProximalGradient()),
    ],
    ids=str,
)
def test_an_entry_is_the_loss_of_a_solver_that_stops_there(steps, solver):
    def solve(solver):
        return prox24.solve(WEIGHT, GRAM, solver, None, damping=0.0)

    recorded = solve(dataclasses.replace(solver, history=40))
    plain = solve(solver)
    np.testing.assert_array_equal(recorded.mask, plain.mask)
    assert plain.history.shape == (0,)
    taken = min(40, plain.statistics.steps)
    history = np.asarray(recorded.history)
    assert np.all(np.isnan(history[taken:]))
    for count in (1, 4, 5, taken):
        stopped = solve(dataclasses.replace(solver, **{steps: count}))
        expected = stopped.statistics.relative_loss
        assert history[count - 1] == pytest.approx(expected, rel=ROUNDINGS), count


@pytest.mark.parametrize("solver", [prox24.ADMM(history=4), prox24.ProximalGradient(history=4)])
def test_a_weight_of_zeros_has_no_loss(solver):
    solved = prox24.solve(jnp.zeros_like(WEIGHT), GRAM, solver)
    history = solved.history[: solved.statistics.steps]
    assert solved.statistics.relative_loss == 0
    assert np.all(history == 0)


def test_a_history_is_traced():
    solver = prox24.ADMM(history=24)
    both = jax.vmap(lambda weight: prox24.solve(weight, GRAM, solver).history)
    histories = both(jnp.stack([WEIGHT, 2 * WEIGHT]))
    assert histories.shape == (2, 24)
    # Losses are relative, and the solver has no unit.
    np.testing.assert_allclose(histories[0], histories[1], rtol=ROUNDINGS)
