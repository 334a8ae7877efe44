"""One schedule for solvers and for optax."""

import jax.numpy as jnp
import optax
import pytest
from reference import eps_of

from prox24 import Exponential


def test_the_values_are_those_of_optax_and_those_that_solvers_take():
    schedule = Exponential(0.01, 1.05)
    of_optax = optax.exponential_decay(0.01, 1, 1.05)
    value = jnp.float32(schedule.first)
    for count in range(50):
        found = float(schedule(jnp.int32(count)))
        rel = (count + 2) * eps_of("float32")  # a rounding for each product
        assert found == pytest.approx(float(of_optax(count)), rel=rel)
        assert found == pytest.approx(float(value), rel=rel)
        value = schedule.after(value)


def test_a_gradual_one_reaches_its_end_and_none_overflows():
    schedule = Exponential.between(1e-3, 10.0, 101)
    assert float(schedule(100)) == pytest.approx(10.0, rel=200 * eps_of("float32"))
    assert float(schedule(10**6)) == pytest.approx(1e30)
    assert float(Exponential(0.0, 1.05)(5000)) == 0.0  # growth^5000 is infinite
