"""Every solver and every refit of prox24 keeps the contract that those of others are held to."""

import pytest
from refit_contract import RefitContract
from solver_contract import Contract, SolverContract

import prox24
from prox24._solvers.solve import REFITS, SOLVERS

pytest.mark.slow(Contract.test_other_patterns_are_solved_too)  # beside the first pattern


class TestMagnitude(SolverContract):
    solver = prox24.Magnitude()


class TestWanda(SolverContract):
    solver = prox24.Wanda()


class TestSparseGPT(SolverContract):
    solver = prox24.SparseGPT()


class TestProximalGradient(SolverContract):
    solver = prox24.ProximalGradient()


class TestADMM(SolverContract):
    solver = prox24.ADMM()


@pytest.mark.slow  # beside ADMM with a penalty
class TestADMMWithoutPenalty(SolverContract):
    solver = prox24.ADMM(penalty=None)


class TestConjugateGradients(RefitContract):
    refit = prox24.ConjugateGradients()


class TestGradientSteps(RefitContract):
    refit = prox24.GradientSteps()


class TestLeastSquares(RefitContract):
    refit = prox24.LeastSquares()


class TestSwaps(RefitContract):
    refit = prox24.Swaps()


def test_none_is_left_out():
    held = {type(method) for each in all_of(SolverContract) for method in each.methods}
    assert held >= {*SOLVERS.values()}
    held = {type(method) for each in all_of(RefitContract) for method in each.methods}
    assert held >= {*REFITS.values()}


def all_of(contract):
    return [each for each in contract.__subclasses__() if each.__module__ == __name__]
