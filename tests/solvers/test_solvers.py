"""Solvers and refits against NumPy references, and what a solution promises."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import (
    assert_close,
    damped,
    eps_of,
    largest,
    masked_least_squares,
    normalization,
    quadratic_loss,
    solve_roundings,
    sparsegpt,
)
from tiers import rest, slow

import prox24
from prox24._core.masks import is_sparse
from prox24._core.pattern import Pattern, Unstructured
from prox24._core.prox import prox
from prox24._solvers.admm import ADMM
from prox24._solvers.problem import LayerProblem, Status
from prox24._solvers.protocol import Patterns
from prox24._solvers.proximal import ProximalGradient, eigenvalue_bound
from prox24._solvers.refit import ConjugateGradients, GradientSteps, LeastSquares
from prox24._solvers.schedules import Exponential
from prox24._solvers.scores import Magnitude, Wanda
from prox24._solvers.solve import SOLVERS, check_supported, solve, solve_program
from prox24._solvers.sparsegpt import SparseGPT
from prox24._solvers.swaps import Swaps
from prox24.errors import SolverError

ROWS, WIDTH, DAMPING = 32, 64, 0.01
KINDS = ["low_rank", "power_law", "few_tokens"]

# Solvers and refits do not know of one another: each is here once, and two without a refit.
PAIRS = {
    "magnitude, exact": (Magnitude(), LeastSquares()),
    "wanda, swaps": (Wanda(), Swaps()),
    "sparsegpt, gradient": (SparseGPT(), GradientSteps()),
    "prox, none": (ProximalGradient(), None),
    "admm, cg": (ADMM(), ConjugateGradients()),
    "projection, none": (ADMM(penalty=None), None),
    "sparsegpt, none": (SparseGPT(), None),
}
every_pair = pytest.mark.parametrize(("solver", "refit"), PAIRS.values(), ids=PAIRS)
every_solver = pytest.mark.parametrize("solver", [s() for s in SOLVERS.values()], ids=list(SOLVERS))
every_kind = pytest.mark.parametrize("kind", KINDS)


def make_gram(kind, width, rng):
    if kind == "low_rank":
        rank = width // 4
        signal = rng.normal(size=(4 * width, rank)) @ rng.normal(size=(rank, width)) / rank**0.5
        tokens = signal + 0.1 * rng.normal(size=signal.shape)
        return tokens.T @ tokens / len(tokens)
    if kind == "few_tokens":
        tokens = rng.normal(size=(width // 2, width))
        return tokens.T @ tokens
    basis = np.linalg.qr(rng.normal(size=(width, width)))[0]
    return (basis / np.arange(1, width + 1)) @ basis.T


def make_problem(kind, seed=0, rows=ROWS, width=WIDTH, dtype="float32"):
    rng = np.random.default_rng(seed)
    gram = make_gram(kind, width, rng)
    weight = rng.normal(size=(rows, width))
    return LayerProblem(jnp.asarray(weight, dtype), jnp.asarray(gram, dtype))


def damped_loss(solution, problem):
    return quadratic_loss(solution.weight, problem.weight, damped(problem.gram, DAMPING))


def exact_damped_loss(mask, problem):
    gram = damped(problem.gram, DAMPING)
    return quadratic_loss(masked_least_squares(problem.weight, gram, mask), problem.weight, gram)


def roundings(problem):
    """Of the solution of a damped problem."""
    return solve_roundings(damped(problem.gram, DAMPING))


def assert_has_pattern(solution, kept=2, group=4):
    mask = np.asarray(solution.mask)
    assert mask.dtype == bool
    assert np.all(mask.reshape(len(mask), -1, group).sum(axis=-1) == kept)
    assert np.all(np.asarray(solution.weight)[~mask] == 0)
    assert bool(is_sparse(solution.weight, (kept, group)))


# SparseGPT


# More columns than there are, a block that is no multiple of M and leaves a rest, and less than M.
@pytest.mark.parametrize(("block_size", "kept", "group"), [(1000, 2, 4), (30, 4, 8), (1, 1, 4)])
def test_sparsegpt_equals_the_columnwise_reference_in_float64(kept, group, block_size):
    problem = make_problem("low_rank", width=200, rows=16, dtype="float64")
    choose = functools.partial(largest, kept=kept, group=group)
    weight, mask = sparsegpt(*problem, choose, group, DAMPING)
    solution = solve(*problem, SparseGPT(block_size), None, pattern=(kept, group), damping=DAMPING)
    assert solution.status is Status.SPARSE
    assert np.array_equal(solution.mask, mask)
    assert_close(solution.weight, weight, roundings(problem))


def test_sparsegpt_prunes_the_pairs_of_least_loss():
    # By inverses of what is left of the Gram, in place of a factor.
    problem = make_problem("low_rank", rows=16, dtype="float64")
    pattern = Pattern(2, 4, unit=2)
    w, gram = np.array(problem.weight), damped(problem.gram, DAMPING)
    mask = np.zeros(w.shape, bool)
    for start in range(0, w.shape[1], pattern.width):
        losses = []
        for pair in range(start, start + pattern.width, 2):
            inner = np.linalg.inv(np.linalg.inv(gram[pair:, pair:])[:2, :2])
            both = w[:, pair : pair + 2]
            losses.append(np.sum((both @ inner) * both, axis=1))
        block = slice(start, start + pattern.width)
        mask[:, block] = np.repeat(largest(np.stack(losses, axis=1), 2, 4), 2, axis=1)
        for column in range(start, start + pattern.width):
            inverse = np.linalg.inv(gram[column:, column:])[0]
            error = np.where(mask[:, column], 0, w[:, column] / inverse[0])
            w[:, column:] -= np.outer(error, inverse)
    solution = solve(*problem, SparseGPT(), None, pattern=pattern, damping=DAMPING)
    assert np.array_equal(solution.mask, mask)
    assert_close(solution.weight, np.where(mask, w, 0), roundings(problem))


# Scores


def test_magnitude_and_wanda_masks_keep_the_largest_scores():
    problem = make_problem("low_rank")
    weight = np.abs(np.asarray(problem.weight))
    norms = np.sqrt(np.diagonal(np.asarray(problem.gram)))
    for solver, scores in ((Magnitude(), weight), (Wanda(), weight * norms)):
        solution = solve(*problem, solver, None, pattern=(4, 8))
        expected = largest(scores, 4, 8)
        assert np.array_equal(solution.mask, expected)
        assert np.array_equal(solution.weight, np.where(expected, problem.weight, 0))


# Refits


@every_kind
def test_refits_end_near_the_exact_least_squares(kind):
    problem = make_problem(kind)
    before = solve(*problem, Magnitude(), None, damping=DAMPING)
    least = exact_damped_loss(before.mask, problem)
    for refit in (ConjugateGradients(), GradientSteps(), LeastSquares()):
        after = solve(*problem, Magnitude(), refit, damping=DAMPING)
        assert np.array_equal(before.mask, after.mask)
        assert_has_pattern(after)
        assert damped_loss(after, problem) <= 1.01 * least, refit
    problem = make_problem(kind, dtype="float64")
    for refit in (ConjugateGradients(2 * WIDTH, 0.0), LeastSquares()):
        solution = solve(*problem, SparseGPT(), refit, damping=DAMPING)
        exact = masked_least_squares(problem.weight, damped(problem.gram, DAMPING), solution.mask)
        assert_close(solution.weight, exact, roundings(problem))


def test_gradient_steps_with_adam_lower_the_loss():
    problem = make_problem("low_rank")
    before = solve(*problem, Magnitude(), None, damping=DAMPING)
    # optax.adam itself raises an integer count to a power, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        after = solve(*problem, Magnitude(), GradientSteps(optax.adam(1e-3), 100), damping=DAMPING)
    assert damped_loss(after, problem) < 0.95 * damped_loss(before, problem)
    assert np.array_equal(before.mask, after.mask)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("equicorrelated", "float32"), ("rank_one", "float32"), ("rank_one", "float64")],
)
def test_conjugate_gradients_stay_converged_however_long_they_run(kind, dtype):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        factor = rng.normal(size=(16, 1))
        gram = {"equicorrelated": (np.eye(16) + 1) / 2, "rank_one": factor @ factor.T}[kind]
        weight = rng.normal(size=(256, 16))
        problem = LayerProblem(jnp.asarray(weight, dtype), jnp.asarray(gram, dtype))
        refit = ConjugateGradients(2000, tolerance=0.0)
        solution = solve(*problem, Magnitude(), refit, damping=DAMPING)
        least = exact_damped_loss(solution.mask, problem)
        # Weights off by eps times the condition raise a loss by its square times the condition.
        excess = eps_of(dtype) * np.linalg.cond(damped(gram, DAMPING))
        assert damped_loss(solution, problem) <= (1 + excess) * least, f"seed {seed}"


# ProximalGradient


@pytest.mark.parametrize(
    ("kind", "ratio"), [("low_rank", 0.9), ("power_law", 0.96), ("few_tokens", 0.25)]
)
def test_prox_beats_sparsegpt_with_the_same_refit_on_correlated_inputs(kind, ratio):
    for seed in range(4):
        problem = make_problem(kind, seed, width=128)
        ours, theirs = solve(*problem, ProximalGradient()), solve(*problem, SparseGPT())
        assert ours.status is Status.SPARSE
        assert_has_pattern(ours)
        assert ours.statistics.relative_loss <= ratio * theirs.statistics.relative_loss


def proximal_gradients(problem, solver, kept, group):
    """The iteration as it is stated, in float64 NumPy but for the operator: (weight, steps)."""
    gram = damped(problem.gram, DAMPING)
    scale, gram = normalization(problem.weight, gram, np.diagonal(gram))
    origin = np.asarray(problem.weight) * scale
    # The bound of the largest eigenvalue by the 64-norm of the spectrum.
    bound = np.sum(np.linalg.eigvalsh(gram) ** 64) ** (1 / 64)
    w, z, t = origin, origin, 1.0
    lam, steps = solver.penalty.first, 0
    while np.any((w.reshape(ROWS, -1, group) != 0).sum(axis=-1) > kept):
        target = z - (z - origin) @ gram / bound
        previous, w = w, np.asarray(prox(jnp.asarray(target), lam / bound, (kept, group)))
        following = (1 + np.sqrt(1 + 4 * t**2)) / 2
        z = w + solver.momentum * (t - 1) / following * (w - previous)
        t, lam, steps = following, lam * solver.penalty.growth, steps + 1
    return w / scale, steps


@pytest.mark.parametrize(
    ("kind", "solver", "pattern"),
    [
        ("low_rank", ProximalGradient(), (2, 4)),
        ("power_law", ProximalGradient.paper(), (1, 4)),
        slow("few_tokens", ProximalGradient(Exponential(0.05, 1.1), 0.7), (2, 8)),
    ],
)
def test_prox_equals_the_reference_in_float64(kind, solver, pattern):
    problem = make_problem(kind, dtype="float64")
    weight, steps = proximal_gradients(problem, solver, *pattern)
    solution = solve(*problem, solver, None, damping=DAMPING, pattern=pattern)
    assert solution.status is Status.SPARSE
    assert solution.statistics.steps == steps
    assert_has_pattern(solution, *pattern)
    # Each step adds its own.
    assert_close(solution.weight, weight, steps * roundings(problem))


def test_rows_that_are_done_are_left_out_and_end_as_they_are():
    """Many rows, of which few are undecided for long."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(1024, 16))
    easy = np.arange(1024) % 16 > 0
    weight[easy] = np.where(largest(np.abs(weight[easy]), 2, 4), weight[easy], 1e-3)
    gram = make_gram("power_law", 16, rng)
    many = solve(jnp.asarray(weight), jnp.asarray(gram), ProximalGradient(), None)
    assert many.status is Status.SPARSE
    assert_has_pattern(many)
    hard = jnp.asarray(np.tile(weight[~easy], (16, 1)))
    # The strength is relative to the mean magnitude, which the easy rows would make another.
    alone = solve(hard, jnp.asarray(gram), ProximalGradient(), None)
    agreement = np.mean(np.asarray(many.mask)[~easy] == np.asarray(alone.mask)[:64])
    assert agreement >= 0.95


@pytest.mark.parametrize(("max_steps", "refit"), [(0, None), (5, ConjugateGradients())])
def test_prox_that_runs_out_of_steps_says_so_and_is_still_sparse(max_steps, refit):
    solution = solve(*make_problem("low_rank"), ProximalGradient(max_steps=max_steps), refit)
    assert solution.status is Status.MAX_STEPS
    assert solution.statistics.steps == max_steps
    assert 0 < solution.statistics.dense_blocks <= ROWS * WIDTH // 4
    assert_has_pattern(solution)


# Every solver


@every_pair
def test_statistics_are_those_of_the_solution(solver, refit):  # contracts have the loss
    problem = make_problem("power_law")
    figures = solve(*problem, solver, refit, damping=DAMPING).statistics
    mean = np.mean(np.diagonal(problem.gram), dtype=np.float64)
    assert figures.damping == pytest.approx(DAMPING * mean, rel=WIDTH * eps_of("float32"))
    assert figures.refit_steps <= getattr(refit, "steps", 60)
    assert (figures.refit_steps > 0) <= (refit is not None)
    assert figures.dense_blocks == 0
    assert (figures.steps > 0) == isinstance(solver, ProximalGradient | ADMM)


def test_prox_takes_no_steps_on_what_is_not_finite():
    weight, gram = make_problem("power_law")
    solution = solve(weight.at[3, 0].set(np.nan), gram, ProximalGradient(), throw=False)
    assert solution.statistics.steps == 0


def test_what_is_no_nonnegative_number_or_no_floating_array_is_refused():
    problem = make_problem("power_law")
    for damping in (-0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match="is not a nonnegative number"):
            solve(*problem, damping=damping)
    with pytest.raises(ValueError, match="weight is int32"):
        solve(*problem._replace(weight=problem.weight.astype(jnp.int32)))
    negative = Exponential(-1.0, 1.0)
    for solver, name in (
        (ADMM(steps=-1), r"ADMM.steps is -1, not a nonnegative whole number"),
        (ADMM(steps=2.5), r"ADMM.steps is 2.5, not a nonnegative whole number"),
        (ADMM(scaling="1"), r"ADMM.scaling is '1', not a nonnegative number"),
        (ADMM(history=-1), r"ADMM.history is -1, not a nonnegative whole number"),
        (ProximalGradient(negative), r"Exponential.first is -1.0, not a nonnegative number"),
    ):
        with pytest.raises(ValueError, match=name):
            solve(*problem, solver)


def no_gram(name):
    """A weight, a matrix that is no Gram, and the other arguments."""
    weight, gram = make_problem("power_law", rows=8, width=16)
    ones = jnp.ones_like(gram)
    return {
        "negative": (weight, -gram),
        "negative entry of the diagonal": (weight, gram.at[5, 5].set(-gram[5, 5])),
        # Without damping a factorization finds out before the loss does.
        "negative loss": (weight, 2 * ones - jnp.eye(16, dtype=gram.dtype), Wanda()),
        "not definite": (weight, 2 * ones - jnp.eye(16, dtype=gram.dtype), SparseGPT(), None),
        "one entry": (weight, gram.at[3, 4].add(gram[3, 3])),
        "upper triangle": (weight, jnp.triu(gram)),
        "nan in the weight": (weight.at[3, 0].set(np.nan), gram),
        "inf in the Gram": (weight, gram.at[5, 5].set(np.inf)),
    }[name]


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("negative", Status.INDEFINITE, "the Gram of the weight is not positive semidefinite"),
        ("negative entry of the diagonal", Status.INDEFINITE, "not positive semidefinite"),
        ("negative loss", Status.INDEFINITE, "not positive semidefinite"),
        ("not definite", Status.NONFINITE, "not positive definite with damping 0, .*more damping"),
        ("one entry", Status.ASYMMETRIC, "the Gram of the weight is not symmetric"),
        ("upper triangle", Status.ASYMMETRIC, "not symmetric"),
        ("nan in the weight", Status.NONFINITE, "^the weight holds NaN or Inf"),
        ("inf in the Gram", Status.NONFINITE, "^the Gram of the weight holds NaN or Inf"),
    ],
)
def test_a_failure_raises_its_sentence_or_is_told_by_the_status(name, status, said):
    given, damping = no_gram(name), 0.0 if name == "not definite" else DAMPING
    solution = solve(*given, damping=damping, throw=False)
    assert solution.status is status
    assert solution.status.failed
    assert str(solution).startswith(f"{status.name.lower()}: relative loss")
    with pytest.raises(SolverError, match=said):
        solve(*given, damping=damping)


def test_under_jit_arrays_may_come_from_outside():
    given = make_problem("low_rank")
    found = jax.jit(lambda: solve(*given).weight)()
    np.testing.assert_array_equal(found != 0, solve(*given).mask)
    dampings = jnp.array([0.01, 0.1])
    # The mask of Wanda does not depend on the damping, so it is the same without `vmap`.
    masks = jax.vmap(lambda damping: solve(*given, Wanda(), None, damping=damping).mask)(dampings)
    np.testing.assert_array_equal(masks, [solve(*given, Wanda(), None).mask] * 2)


def test_a_traced_failure_is_told_by_the_status():
    traced = jax.jit(solve)(*no_gram("negative"))
    assert traced.status == Status.INDEFINITE
    assert str(traced).startswith("indefinite: relative loss")
    assert str(traced._replace(status=jnp.zeros(2, int))).startswith("Solution(weight=")


@pytest.mark.parametrize("dtype", ["float32", *rest("bfloat16")])
def test_a_gram_that_was_rounded_is_still_one(dtype):
    for kind, damping in itertools.product(KINDS, (0.0, DAMPING)):
        weight, gram = make_problem(kind)
        # A constant feature of a covariance: zero but for rounding.
        gram = gram.at[7].set(0).at[:, 7].set(0).at[7, 7].set(-1e-7)
        for solver, refit in ((ProximalGradient(), ConjugateGradients()), (Wanda(), None)):
            problem = LayerProblem(weight, gram.astype(dtype))
            solution = solve(*problem, solver, refit, damping=damping)
            assert solution.status is Status.SPARSE, (kind, damping)


def test_a_refit_that_runs_out_of_steps_says_so():
    problem = make_problem("low_rank")
    for refit, exhausted in (
        (None, False),
        (ConjugateGradients(2), True),
        (ConjugateGradients(200, 1e-3), False),
        (Swaps(1, ConjugateGradients(200, 1e-3)), True),
        (Swaps(50, ConjugateGradients(200, 1e-3)), False),
        (LeastSquares(), False),
        (GradientSteps(), False),
    ):
        figures = solve(*problem, Wanda(), refit).statistics
        assert figures.refit_exhausted is exhausted, refit


class Bare:
    """Has traits, but is no tree of numbers."""

    patterns, needs_definite, shares_columns = Patterns.ANY, False, True

    def __call__(self, problem, pattern, damping):
        raise AssertionError


@pytest.mark.parametrize(
    ("solver", "refit", "pattern", "said"),
    [
        (ProximalGradient(), None, (3, 4), "ProximalGradient supports 1:M and 2:M, not 3:4; Mag"),
        (ADMM(), None, Unstructured(0.5), "2:M, not 50%; Magnitude, Wanda, SparseGPT would"),
        (Wanda(), Swaps(), Unstructured(0.5), "any N:M, not 50%; ConjugateGradients, Gr"),
        (Wanda(), Swaps(), (8, 16), "8:16 has too many"),
        (ADMM(), None, (4, 8), r"not 4:8; Magnitude, .*, ADMM\(penalty=None\) would"),
        (
            ADMM(penalty=np.float32(1)),
            None,
            (2, 4),
            r"penalty is 1.0, not a .* prox24.Exponential\(1.0, 1.0\)",
        ),
        (
            ADMM(penalty=optax.constant_schedule(1.0)),
            None,
            (2, 4),
            r"^ADMM.penalty is a function: .* prox24.Exponential\(first, growth\)",
        ),
        ("wanda", None, (2, 4), r"the solver is 'wanda'; give an object, such as prox24.ADMM\(\)"),
        (None, None, (2, 4), "the solver is None; give an object"),
        (Wanda, None, (2, 4), r"the solver is a class; give an object, Wanda\(\)"),
        (Wanda(), abs, (2, 4), "has no trait patterns: see docs/adding-a-solver.md"),
        (Swaps(), None, (2, 4), "Swaps is no solver: its call has other arguments"),
        (Wanda(), ADMM(), (2, 4), "ADMM is no refit: its call has other arguments"),
        (
            Bare(),
            None,
            (2, 4),
            "the solver Bare is no pytree: decorate its class with prox24.hyper",
        ),
    ],
)
def test_what_is_not_supported_is_refused_before_any_work(solver, refit, pattern, said):
    with pytest.raises(ValueError, match=said):
        check_supported(solver, refit, pattern)
    check_supported(ADMM(), Swaps(), (2, 4))


@every_solver
def test_the_scales_of_gram_and_weight_do_not_matter(solver):
    problem = make_problem("low_rank")
    expected = solve(*problem, solver)
    # Powers of two, also of the square root of the Gram's, so that nothing is rounded.
    louder = solve(*problem._replace(gram=2**10 * problem.gram), solver)
    smaller = solve(*problem._replace(weight=2**-7 * problem.weight), solver)
    for found, factor in ((louder, 1), (smaller, 2**7)):
        assert np.array_equal(factor * found.weight, expected.weight)
        assert found.statistics.relative_loss == expected.statistics.relative_loss


@pytest.mark.parametrize(
    ("solver", "gram_dtype"), [(SparseGPT(), jnp.float32), slow(ADMM(), jnp.bfloat16)]
)
def test_bfloat16_weights_come_back_bfloat16(solver, gram_dtype):
    weight, gram = make_problem("power_law")
    rounded = LayerProblem(weight.astype(jnp.bfloat16), gram.astype(gram_dtype))
    solution = solve(*rounded, solver)
    assert solution.weight.dtype == jnp.bfloat16
    assert solution.status is Status.SPARSE
    assert_has_pattern(solution)
    in_float32 = [x.astype(jnp.float32) for x in rounded]
    expected = solve(*in_float32, solver).weight.astype(jnp.bfloat16)
    assert np.array_equal(np.asarray(solution.weight), np.asarray(expected))


@pytest.mark.parametrize(
    ("solvers", "refits"),
    [
        (
            [
                ProximalGradient(),
                ProximalGradient(Exponential(0.02, 1.1), momentum=0, max_steps=50),
            ],
            [ConjugateGradients(), ConjugateGradients(3, 1e-2)],
        ),
        slow([ADMM(), ADMM.in_steps(10)], [GradientSteps(), GradientSteps(steps=10)]),
    ],
    ids=["prox_cg", "admm_gradient"],
)
def test_other_hyperparameter_values_do_not_compile_again(solvers, refits):
    problem = make_problem("power_law", rows=5, width=12)
    solve_program.clear_cache()
    for solver, refit, damping in zip(solvers, refits, [0.01, 1], strict=True):
        solve(*problem, solver, refit, damping=damping)
    assert solve_program._cache_size() == 1


@pytest.mark.parametrize(
    ("weight", "gram", "options", "message"),
    [
        ((8, 16), (12, 12), {}, r"\(8, 16\) and gram \(12, 12\) do not fit: .* axis -1$"),
        ((16, 8), (16, 16), {}, "do not fit: .* the Gram fits the other axis: pass axis=0"),
        ((8, 16), (16, 16), {"axis": 0}, "the Gram fits the other axis: pass axis=-1"),
        ((16,), (16, 16), {}, r"\(16,\) and gram \(16, 16\) are not matrices.*use jax.vmap"),
        ((8, 16), (16, 16), {"axis": 2}, "have no axis 2"),
        ((0, 16), (16, 16), {}, r"\(0, 16\) has no entries"),
        ((8, 18), (18, 18), {}, "width 18 is not divisible by 4: take another pattern, or pad"),
        ((8, 16), (16, 16), {"pattern": (5, 4)}, r"5:4"),
    ],
)
def test_shapes_that_do_not_fit_are_named_in_the_error(weight, gram, options, message):
    arrays = jnp.ones(weight, jnp.float32), jnp.ones(gram, jnp.float32)
    with pytest.raises(ValueError, match=message):
        solve(*arrays, SparseGPT(), **options)


def test_a_kernel_is_the_transpose_of_a_weight():
    weight, gram = make_problem("power_law")
    expected, kernel = solve(weight, gram), solve(weight.T, gram, axis=0)
    assert np.array_equal(kernel.weight, expected.weight.T)
    assert np.array_equal(kernel.mask, expected.mask.T)
    assert kernel.statistics == expected.statistics


# The eigenvalue bound


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_eigenvalue_bound_is_above_and_at_most_the_root_of_the_rank_away(dtype):
    # WIDTH roundings of products, of which the last root leaves one, and as many that are added.
    slack = 2 * WIDTH * eps_of(dtype)
    for scale, rank in itertools.product((1e-8, 1.0, 1e8), (1, 3, WIDTH)):
        tokens = np.random.default_rng(rank).normal(size=(rank, WIDTH))
        gram = (scale * tokens.T @ tokens).astype(dtype)
        top = np.linalg.eigvalsh(gram.astype(np.float64))[-1]
        bound = float(eigenvalue_bound(jnp.asarray(gram)))
        assert top <= bound <= top * rank ** (1 / 64) * (1 + slack), (scale, rank)
    equal = float(eigenvalue_bound(3 * jnp.eye(WIDTH, dtype=dtype)))
    assert equal == pytest.approx(3 * WIDTH ** (1 / 64), rel=slack)
    assert eigenvalue_bound(jnp.zeros((4, 4), dtype)) == 0


def test_structures_of_different_parts_are_different():
    """Or `jax.jit` may run the program of another, which the hashes decide by chance."""
    parts = [Magnitude(), Wanda(), SparseGPT(), ProximalGradient(), ADMM(), ConjugateGradients()]
    parts += [GradientSteps(), LeastSquares(), Swaps(), Exponential(1.0, 2.0)]
    parts += [ADMM(penalty=None)]
    structures = [jax.tree.structure(part) for part in parts]
    for index, structure in enumerate(structures):
        assert structures.index(structure) == index, parts[index]


@prox24.hyperparameters
class HalfOfEachRow:
    """A solver with a defect: rows have the share of zeros, and blocks do not."""

    patterns = prox24.Patterns.GROUPED
    needs_definite = False
    shares_columns = False

    def __call__(self, problem, pattern, damping):
        size = jnp.abs(problem.weight)
        mask = size >= jnp.median(size, axis=1, keepdims=True)
        return prox24.Candidate.of(problem.weight, mask, damping)


@prox24.hyperparameters
class WeightAlone(HalfOfEachRow):
    """A solver that returns no candidate."""

    def __call__(self, problem, pattern, damping):
        return problem.weight


def test_a_mask_that_breaks_the_pattern_is_no_solution():
    weight, gram = jax.random.normal(jax.random.key(0), (8, 16), jnp.float32), jnp.eye(16)
    for refit in (None, ConjugateGradients()):
        with pytest.raises(SolverError, match="made for the weight does not have the pattern"):
            solve(weight, gram, HalfOfEachRow(), refit)
        status = solve(weight, gram, HalfOfEachRow(), refit, throw=False).status
        assert (status, status.failed) == (Status.BROKEN, True)


def test_a_solver_that_returns_no_candidate_is_named():
    with pytest.raises(ValueError, match=r"WeightAlone returned a .*, not a prox24\.Candidate"):
        solve(jnp.ones((4, 8)), jnp.eye(8), WeightAlone(), None)
