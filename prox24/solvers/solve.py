"""One entry for every solver and every refit."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, auto_axes

from prox24.core.pattern import Pattern, PatternLike, Unstructured, as_pattern
from prox24.core.precision import working_dtype
from prox24.solvers.admm import ADMM
from prox24.solvers.damping import damped_gram, damping_amount, inverse_factor
from prox24.solvers.problem import (
    Candidate,
    LayerProblem,
    Solution,
    Statistics,
    Status,
    check_problem,
    has_negative_diagonal,
    is_nonnegative,
    normalize,
    quadratic_loss,
)
from prox24.solvers.proximal import ProximalGradient
from prox24.solvers.refit import ConjugateGradients, GradientSteps, LeastSquares
from prox24.solvers.scores import Magnitude, Wanda
from prox24.solvers.sparsegpt import SparseGPT
from prox24.solvers.swaps import Swaps

Solver = Magnitude | Wanda | SparseGPT | ProximalGradient | ADMM
Refit = ConjugateGradients | GradientSteps | LeastSquares | Swaps

SOLVERS: dict[str, type[Solver]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "prox": ProximalGradient,
    "admm": ADMM,
}
REFITS: dict[str, type[Refit]] = {
    "cg": ConjugateGradients,
    "gradient": GradientSteps,
    "exact": LeastSquares,
    "swaps": Swaps,
}


def solve(
    problem: LayerProblem,
    solver: Solver = ADMM(),
    refit: Refit | None = ConjugateGradients(),
    *,
    pattern: PatternLike | Unstructured = (2, 4),
    damping: float = 0.01,
) -> Solution:
    """Prunes one layer: finds a mask and weights, then refits the kept weights.

    Rows are independent: a weight whose rows are sharded over a mesh, its axes automatic or
    explicit, gives a weight and a mask that are sharded alike, and devices exchange one number
    for each look at the stop test. docs/scaling.md says which solvers need more. If the columns of
    the weight and of the Gram are sharded, so are those of the result: devices then exchange the
    weight in every step, and with the solvers that docs/scaling.md names they never exchange the
    Gram.

    It ends on the host, where it looks at what the program found: call it outside of `jax.jit` and
    `jax.vmap`.

    Args:
      problem: weight (out, in) and gram (in, in), in any floating dtype; the work is done in
        float32, or in float64 when the Gram is float64.
      solver: how the mask is found; an object of hyperparameters, whose numbers are traced.
      refit: how the kept weights are updated afterwards, or None to keep the solver's.
      pattern: (N, M) along the input axis, M a divisor of the input width, or `Unstructured`, which
        magnitude, wanda and sparsegpt support.
      damping: added to the diagonal of the Gram, relative to its mean. It makes a singular Gram
        definite. SparseGPT, ADMM, LeastSquares and Swaps need one; where it is not enough they
        raise it to at most 1, and the statistics say so (`prox24.solvers.damping.inverse_factor`).

    Returns:
      A `Solution`. Check its status: a solver never raises on numerical failure.

    Raises:
      ValueError: the shapes do not fit, the weight has no entries, M does not divide the input
        width, an array is not floating-point, damping is negative or infinite, or the solver or the
        refit does not support the pattern.

    Example:
      >>> weight = jax.random.normal(jax.random.key(0), (8, 16))
      >>> tokens = jax.random.normal(jax.random.key(1), (64, 16))
      >>> gram = jnp.matmul(tokens.T, tokens, precision="highest")
      >>> solution = solve(LayerProblem(weight, gram))
      >>> solution.status, int(solution.mask.sum())
      (<Status.SPARSE: 'sparse'>, 64)
    """
    pattern = check_problem(problem, pattern)
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping {damping} is not a nonnegative number")
    weight, mask, figures = solve_program(
        problem, solver, refit, jnp.asarray(float(damping)), pattern
    )
    figures = jax.device_get(figures)  # all at once
    statistics = Statistics(
        relative_loss=float(figures["relative_loss"]),
        relative_loss_before_refit=float(figures["relative_loss_before_refit"]),
        steps=int(figures["steps"]),
        refit_steps=int(figures["refit_steps"]),
        refit_exhausted=bool(figures["refit_exhausted"]),
        dense_blocks=int(figures["dense_blocks"]),
        dead_features=int(figures["dead_features"]),
        damping=float(figures["damping"]),
        damping_raised=bool(figures["damping_raised"]),
    )
    if figures["negative_diagonal"]:
        status = Status.INDEFINITE
    elif not figures["finite"]:
        status = Status.NONFINITE
    elif not figures["nonnegative"]:
        status = Status.INDEFINITE
    elif statistics.dense_blocks:
        status = Status.MAX_STEPS
    else:
        status = Status.SPARSE
    return Solution(weight, mask, status, statistics)


def lower(
    problem: LayerProblem,
    solver: Solver,
    refit: Refit | None,
    *,
    pattern: PatternLike | Unstructured = (2, 4),
) -> jax.stages.Lowered:
    """The program of `solve`, to be compiled and looked at; arrays may be `ShapeDtypeStruct`."""
    pattern = pattern if isinstance(pattern, Unstructured) else as_pattern(pattern)
    damping = jax.ShapeDtypeStruct((), jnp.asarray(0.0).dtype)
    return solve_program.lower(problem, solver, refit, damping, pattern=pattern)


def check_supported(
    solver: Solver, refit: Refit | None, pattern: PatternLike | Unstructured
) -> None:
    """Raises ValueError where `solve` would for the pattern, and computes nothing.

    Example:
      >>> check_supported(SparseGPT(), None, (3, 4))
    """
    width = 1 if isinstance(pattern, Unstructured) else as_pattern(pattern).group
    problem = jax.eval_shape(lambda: LayerProblem(jnp.zeros((1, width)), jnp.zeros((width, width))))
    lower(problem, solver, refit, pattern=pattern)


def check_shares_columns(solver: Solver, refit: Refit | None) -> None:
    """Raises ValueError unless devices that share the columns of a Gram never need all of it.

    Others factor it, or take its powers for the size of their steps.

    Example:
      >>> check_shares_columns(ADMM(), ConjugateGradients())
    """
    for method, able in (
        (solver, Magnitude | Wanda | ADMM),
        (refit, ConjugateGradients | None),
    ):
        if not isinstance(method, able):
            raise ValueError(
                f"{type(method).__name__} needs the whole Gram on every device: only magnitude, "
                "wanda and admm, with conjugate gradients or no refit, share its columns"
            )


@functools.partial(jax.jit, static_argnames="pattern")
def solve_program(
    given: LayerProblem,
    solver: Solver,
    refit: Refit | None,
    damping: Array,
    pattern: Pattern | Unstructured,
) -> tuple[Array, Array, dict[str, Array]]:
    """What `solve` compiles; to it explicit axes of a mesh are what automatic ones are."""
    program = functools.partial(_solve, pattern=pattern)
    placed = jax.typeof(given.weight).sharding
    if placed.mesh.explicit_axes:
        everywhere = NamedSharding(placed.mesh, PartitionSpec())
        program = auto_axes(program, out_sharding=(placed, placed, everywhere))
    return program(given, solver, refit, damping)


def _solve(
    given: LayerProblem,
    solver: Solver,
    refit: Refit | None,
    damping: Array,
    pattern: Pattern | Unstructured,
) -> tuple[Array, Array, dict[str, Array]]:
    dtype = working_dtype(given.gram.dtype)
    damping = damping.astype(dtype)
    solver, refit = jax.tree.map(
        lambda x: jnp.asarray(x, dtype) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x,
        (solver, refit),
    )
    problem = LayerProblem(given.weight.astype(dtype), given.gram.astype(dtype))
    candidate: Candidate = solver(problem, pattern, damping)
    weight, mask, used = candidate.weight, candidate.mask, candidate.damping
    refit_steps, refit_exhausted = jnp.zeros((), jnp.int32), jnp.zeros(len(weight), bool)
    if refit is not None:
        if isinstance(refit, LeastSquares | Swaps):
            used = inverse_factor(problem.gram, used).damping
        normalized = normalize(problem.weight, damped_gram(problem.gram, used))
        scale = normalized.scale[None, :]
        refitted = refit(normalized, weight * scale, mask, pattern)
        weight, mask, refit_steps, refit_exhausted = refitted
        weight = weight / scale
    weight = jnp.where(mask, weight, 0).astype(given.weight.dtype)

    total = quadratic_loss(problem.weight, problem.gram)

    def relative(loss: Array) -> Array:
        return jnp.where(loss == 0, 0, loss / total)

    difference = weight.astype(dtype) - problem.weight
    loss = quadratic_loss(difference, problem.gram)
    before = candidate.weight - problem.weight
    # A float64 Gram may have been summed in float32.
    eps = max(float(jnp.finfo(summed).eps) for summed in (given.gram.dtype, jnp.float32))
    figures = {
        "relative_loss": relative(loss),
        "relative_loss_before_refit": relative(
            loss if refit is None else quadratic_loss(before, problem.gram)
        ),
        "steps": candidate.steps,
        "refit_steps": refit_steps,
        "refit_exhausted": jnp.any(refit_exhausted),
        "dense_blocks": candidate.dense_blocks,
        "dead_features": jnp.count_nonzero(jnp.diagonal(problem.gram) == 0),
        "damping": damping_amount(problem.gram, used),
        "damping_raised": candidate.damping_raised | (used > damping),
        "negative_diagonal": has_negative_diagonal(problem.gram, eps),
        "finite": jnp.all(jnp.isfinite(weight)) & jnp.isfinite(total),
        "nonnegative": is_nonnegative(loss, difference, problem.gram, eps)
        & is_nonnegative(total, problem.weight, problem.gram, eps),
    }
    return weight, mask, figures
