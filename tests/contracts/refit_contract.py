"""What every refit promises, as tests that a class of your own inherits.

    from refit_contract import RefitContract

    class TestMine(RefitContract):
        refit = Mine()

Copy this file and solver_contract.py beside your tests.
"""

from typing import ClassVar

import numpy as np
from solver_contract import PROBLEMS, WIDTH, Contract, loss_of, loss_rounding

import prox24


class RefitContract(Contract):
    """Inherit, and set `refit` to an object of your class."""

    refit: ClassVar[prox24.Refit]

    def __init_subclass__(cls):
        cls.methods = (prox24.Magnitude(), cls.refit)

    def test_the_damped_loss_is_never_raised(self):
        for name, (weight, gram) in PROBLEMS.items():
            for damping in (0.01, 0.1):
                solution = self.solve(weight, gram, damping=damping)
                damped = gram + solution.statistics.damping * np.eye(WIDTH)
                before = np.where(solve_without(weight, gram), weight, 0)
                losses = [loss_of(each, weight, damped) for each in (before, solution.weight)]
                rounding = loss_rounding(before, weight, damped, np.float32)
                assert losses[1] <= losses[0] + rounding, f"{name}, damping {damping}"


def solve_without(weight, gram):
    """The mask that the refit is given."""
    arrays = (np.asarray(array, "float32") for array in (weight, gram))
    return np.asarray(prox24.solve(*arrays, prox24.Magnitude(), None, pattern="2:4").mask)
