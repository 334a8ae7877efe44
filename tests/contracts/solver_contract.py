"""What every solver promises, as tests that a class of your own inherits.

    from solver_contract import SolverContract

    class TestMine(SolverContract):
        solver = Mine()

Copy this file beside your tests; it needs pytest, prox24 and nothing else. All problems have one
shape, so that a solver is compiled a few times only. The contract does not test `shares_columns`.
"""

import functools
import itertools
import operator
import pickle
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import prox24

ROWS, WIDTH = 8, 16
PATTERNS = (
    *(prox24.Pattern(kept, 4) for kept in (2, 1, 3)),
    prox24.Pattern(2, 4, unit=2),
    prox24.Unstructured(0.5),
)
NUMBERS = np.random.default_rng(0).normal(size=(ROWS + 4 * WIDTH, WIDTH))
WEIGHT = NUMBERS[:ROWS]
TOKENS = NUMBERS[ROWS:] * 0.8 ** np.arange(WIDTH) + NUMBERS[ROWS:, :1]
GRAM = TOKENS.T @ TOKENS
UNSEEN = np.isin(np.arange(WIDTH), [0, 1, 2, 3, 9])
PROBLEMS = {
    "usual": (WEIGHT, GRAM),
    "zero weight": (np.zeros_like(WEIGHT), GRAM),
    "a row of zeros": (WEIGHT * (np.arange(ROWS) != 3)[:, None], GRAM),
    "dead features": (WEIGHT, GRAM * np.outer(~UNSEEN, ~UNSEEN)),
    "no token": (WEIGHT, np.zeros_like(GRAM)),
    "fewer tokens than features": (WEIGHT, TOKENS[:4].T @ TOKENS[:4]),
    "large numbers": (1e3 * WEIGHT, 1e6 * GRAM),
}
"""Weight and Gram by name."""


class Contract:
    """What solvers and refits promise alike; `methods` are the solver and the refit."""

    methods: ClassVar[tuple[prox24.Solver, prox24.Refit | None]]

    @classmethod
    def patterns(cls):
        """The patterns that are tried: those of `PATTERNS` that the method supports."""
        traits = [method.patterns for method in cls.methods if method is not None]
        return [pattern for pattern in PATTERNS if all(pattern in each for each in traits)]

    @classmethod
    def solve(cls, weight, gram, dtype="float32", **options):
        """The solution by the methods; numbers that are not finite do not raise."""
        options = {"throw": False, "pattern": cls.patterns()[0]} | options
        arrays = jnp.asarray(weight, dtype), jnp.asarray(gram, dtype)
        return prox24.solve(*arrays, *cls.methods, **options)

    def test_masks_have_the_pattern_and_weights_are_finite(self):
        self.assert_solves(self.patterns()[0])

    def test_other_patterns_are_solved_too(self):
        for pattern in self.patterns()[1:]:
            self.assert_solves(pattern)

    def assert_solves(self, pattern):
        for name, problem in PROBLEMS.items():
            solution = self.solve(*problem, pattern=pattern)
            assert_solved(solution, problem, pattern, f"{pattern}, {name}")

    def test_features_that_no_token_has_are_harmless_without_damping(self):
        for name in ("dead features", "no token"):
            solution = self.solve(*PROBLEMS[name], damping=0.0)
            assert_solved(solution, PROBLEMS[name], self.patterns()[0], name)

    def test_a_weight_that_has_the_pattern_loses_nothing(self):
        sparse = np.where(np.arange(WIDTH) % 4 < self.patterns()[0].kept, WEIGHT, 0)
        solution = self.solve(sparse, GRAM)
        assert_solved(solution, (sparse, GRAM), self.patterns()[0], "sparse")
        # Of weights that are off by eps times a condition a loss has the square, below eps.
        assert solution.statistics.relative_loss <= np.finfo(np.float32).eps

    def test_float64_problems_are_solved_in_float64(self):
        with jax.enable_x64(True):
            solution = self.solve(*PROBLEMS["usual"], "float64")
            assert solution.weight.dtype == jnp.float64
            assert_solved(solution, PROBLEMS["usual"], self.patterns()[0], "float64")
            single = self.solve(*PROBLEMS["usual"])
        # A near tie may end the other way: one of ROWS * WIDTH entries.
        losses = [each.statistics.relative_loss for each in (solution, single)]
        np.testing.assert_allclose(losses[1], losses[0], rtol=1 / (ROWS * WIDTH))

    def test_jit_and_vmap_give_what_the_host_gives(self):
        """In float64, where rounding does not change a mask."""
        with jax.enable_x64(True):
            solve = functools.partial(self.solve, dtype="float64")
            weights, grams = (np.stack(parts) for parts in zip(*PROBLEMS.values(), strict=True))
            compiled, mapped = jax.jit(solve), jax.vmap(solve)(weights, grams)
            for number, (name, problem) in enumerate(PROBLEMS.items()):
                expected, part = solve(*problem), operator.itemgetter(number)
                for found in (compiled(*problem), jax.tree.map(part, mapped)):
                    assert int(found.status) == expected.status, name
                    assert np.array_equal(found.mask, expected.mask), name
                    # Half of the digits: conditions and steps take less of the others.
                    error = np.max(np.abs(found.weight - expected.weight))
                    half = np.sqrt(np.finfo(np.float64).eps)
                    assert error <= half * np.max(np.abs(expected.weight)), name

    def test_a_singular_gram_without_damping_is_solved(self):
        """Its elimination meets a zero, without rounding, so that no factorization succeeds."""
        problem = WEIGHT, np.ones_like(GRAM)
        solution = self.solve(*problem, damping=0.0)
        assert_solved(solution, problem, self.patterns()[0], "all features equal")
        definite = any(method.needs_definite for method in self.methods if method is not None)
        said = "give the candidate the damping that damped_inverse returned"
        assert solution.statistics.damping_raised is definite, said
        assert (solution.statistics.damping > 0) is definite

    def test_numbers_that_are_not_finite_are_reported(self):
        places = [(0, (0, 0)), (0, (3, WIDTH - 1)), (1, (5, 5)), (1, ([5, 6], [6, 5]))]
        for number, (part, place) in itertools.product((np.nan, np.inf), places):
            problem = [WEIGHT.copy(), GRAM.copy()]
            problem[part][place] = number
            status = self.solve(*problem).status
            assert status is prox24.Status.NONFINITE, f"{number} at {place}"

    def test_a_recipe_holds_it_also_in_json_and_in_a_pickle(self):
        recipe = prox24.Recipe(*self.methods, targets=None)
        recipe.check_supported()
        for again in (
            prox24.Recipe.from_json(recipe.to_json()),
            pickle.loads(pickle.dumps(recipe)),
        ):
            assert again == recipe
            assert hash(again) == hash(recipe)

    def test_it_is_a_tree_of_its_numbers(self):
        leaves, structure = jax.tree.flatten(self.methods)
        assert jax.tree.unflatten(structure, leaves) == self.methods
        assert all(isinstance(leaf, int | float | np.number | jax.Array) for leaf in leaves)

    def test_the_weights_of_a_function_are_pruned(self):
        def apply(params, batch):
            return jnp.tanh(batch @ params["first"].T) @ params["last"]

        params = {"first": jnp.asarray(WEIGHT, "float32"), "last": jnp.ones((ROWS, 2), "float32")}
        recipe = prox24.Recipe(*self.methods, self.patterns()[0], targets=None, skip="last")
        batches = [jnp.asarray(TOKENS, "float32")]
        pruned = prox24.prune_params(apply, params, batches, recipe).params
        assert prox24.is_sparse(pruned["first"], self.patterns()[0])
        assert np.array_equal(pruned["last"], params["last"])


class SolverContract(Contract):
    """Inherit, and set `solver` to an object of your class."""

    solver: ClassVar[prox24.Solver]

    def __init_subclass__(cls):
        cls.methods = (cls.solver, None)


def assert_solved(solution, problem, pattern, name):
    """A solution is finite and of the pattern, and its figures are those of its weight."""
    weight, mask = (np.asarray(x) for x in (solution.weight, solution.mask))
    assert solution.status in (prox24.Status.SPARSE, prox24.Status.MAX_STEPS), name
    assert weight.shape == mask.shape == problem[0].shape, name
    assert np.all(np.isfinite(weight)), name
    assert np.all(weight[~mask] == 0), f"{name}: a weight outside the mask is not zero"
    assert not np.any(weight[~problem[0].any(axis=1)]), f"{name}: a row of zeros has other weights"
    if isinstance(pattern, prox24.Unstructured):
        assert np.sum(mask) == pattern.kept(mask.size), name
    else:
        units = mask.reshape(-1, pattern.group, pattern.unit)
        assert np.all(units.all(axis=2).sum(axis=1) == pattern.kept), f"{name}: not {pattern}"
        assert np.all(units.any(axis=2).sum(axis=1) == pattern.kept), f"{name}: not {pattern}"
    assert solution.statistics.dead_features == np.sum(np.diagonal(problem[1]) == 0), name
    original, gram = problem
    total = np.sum((original @ gram) * original) or 1
    loss = loss_of(weight, original, gram) / total
    rounding = loss_rounding(weight, original, gram, weight.dtype) / total
    assert abs(solution.statistics.relative_loss - loss) <= rounding, name


def loss_of(weight, original, gram):
    """tr((W - W0) G (W - W0)^T) in float64."""
    difference = np.asarray(weight, np.float64) - original
    return float(np.sum((difference @ gram) * difference))


def loss_rounding(weight, original, gram, dtype):
    """Of `loss_of`: W and W0 are off by eps, and sums of WIDTH terms by WIDTH eps of each term."""
    size, difference = np.abs(weight) + np.abs(original), np.abs(weight - original)
    terms = (difference @ np.abs(gram)) * (2 * size + WIDTH * difference)
    return float(np.finfo(dtype).eps * np.sum(terms))
