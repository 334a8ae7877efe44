"""One entry for every solver and every refit."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, auto_axes
from jax.typing import ArrayLike

from prox24._core.masks import count_violations
from prox24._core.pattern import AnyPattern, PatternLike, Unstructured, as_any_pattern
from prox24._core.placement import explicit_sharding
from prox24._core.precision import working_dtype
from prox24._core.tracing import is_traced
from prox24._solvers.admm import ADMM
from prox24._solvers.damping import damped_gram, inverse_factor
from prox24._solvers.hyperparameters import check_numbers
from prox24._solvers.problem import (
    Candidate,
    LayerProblem,
    Refitted,
    Solution,
    Statistics,
    Status,
    check_arrays,
    has_negative_diagonal,
    is_nonnegative,
    is_symmetric,
    normalize,
    quadratic_loss,
)
from prox24._solvers.protocol import TRAITS, Refit, Solver, implements
from prox24._solvers.proximal import ProximalGradient
from prox24._solvers.refit import ConjugateGradients, GradientSteps, LeastSquares
from prox24._solvers.schedules import Exponential
from prox24._solvers.scores import Magnitude, Wanda
from prox24._solvers.sparsegpt import SparseGPT
from prox24._solvers.swaps import Swaps
from prox24.errors import RecipeError, SolverError

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

Program = tuple[Array, Array, Array, Statistics, Array]
"""Weight, mask, status, statistics and history, as a program returns them."""


def solve(
    weight: ArrayLike,
    gram: ArrayLike,
    solver: Solver = ADMM(),
    refit: Refit | None = ConjugateGradients(),
    *,
    pattern: PatternLike | Unstructured | str = (2, 4),
    damping: float = 0.01,
    axis: int = -1,
    throw: bool = True,
) -> Solution:
    """Prunes one layer: finds a mask and weights, then refits the kept weights.

    It minimises tr((W - W0) G (W - W0)^T), the squared error of a linear layer's output, over all W
    of the pattern. It works under `jax.jit` and `jax.vmap`, for example over the experts of a
    layer. The status is then an integer array, the statistics are arrays, and numerical failures
    raise no error. It has no derivatives: `prox24.prox` and `prox24.proximal_gradient` have.

    Rows of the problem are independent. Iterative solvers find a scale and the stop from all given
    rows, so parts of a weight may get other masks than the whole. If the rows of the weight are
    sharded over a mesh, with automatic or explicit axes, the results are sharded alike. Devices
    then exchange one number at each stop test. If the columns of the weight and of the Gram are
    sharded, the columns of the results are sharded too. Devices then exchange the weight in every
    step. They never exchange the Gram if the solver and the refit share columns
    (docs/accelerators.md).

    Args:
      weight: W0, shape (out, in), floating-point; the layer computes x -> W0 x. For other layouts
        give `axis`.
      gram: G = sum over calibration tokens of x x^T, or its mean, shape (in, in), symmetric and
        positive semidefinite. Solutions do not depend on its scale. The work is done in float64 if
        the Gram is float64, else in float32.
      solver: the method that finds the mask, an object of hyperparameters. Its numbers are traced.
      refit: the method that then updates the kept weights, or None to keep the solver's weights.
      pattern: (N, M) along the axis, `Pattern` with units of several entries, `Unstructured`, or a
        text such as "2:4". The axis must be whole blocks.
      damping: number added to the diagonal of the Gram, relative to the mean of the diagonal. It
        makes a singular Gram definite. If it is too small, solvers and refits that need a definite
        Gram raise it, to at most 1, and the statistics say so
        (`prox24._solvers.damping.inverse_factor`).
      axis: the axis of the weight that the layer sums over: -1 for (out, in), 0 for the kernel
        (in, out) of a Flax layer.
      throw: whether a failure raises an error. Otherwise only the status tells it.

    Returns:
      A `Solution`.

    Raises:
      SolverError: there is no finite solution, or the Gram is not symmetric and positive
        semidefinite. Or the mask of a solver or refit of your own does not have the pattern. The
        message says why. Traced calls and `throw=False` do not raise it.
      ValueError: the shapes do not fit, an array is not floating-point, the weight has no entries,
        or the axis is not whole blocks. Also if damping is negative or infinite. Also if the solver
        or the refit is none or does not support the pattern, or one of prox24's own holds a
        negative number.

    Example:
      >>> weight = jax.random.normal(jax.random.key(0), (8, 16))
      >>> tokens = jax.random.normal(jax.random.key(1), (64, 16))
      >>> gram = jnp.matmul(tokens.T, tokens, precision="highest")
      >>> solution = solve(weight, gram)
      >>> solution.status, int(solution.mask.sum())
      (<Status.SPARSE: 0>, 64)
    """
    weight, gram, pattern = jnp.asarray(weight), jnp.asarray(gram), as_any_pattern(pattern)
    check_arrays(weight, gram, axis)
    check_traits(solver, refit, pattern)
    width = weight.shape[axis]
    if width % pattern.width:
        raise ValueError(
            f"input width {width} is not divisible by {pattern.width}: take another pattern, or "
            "pad weight and Gram with zeros"
        )
    if not is_traced(damping) and not 0 <= damping < math.inf:
        raise ValueError(f"damping {damping} is not a nonnegative number")
    transposed = axis in (0, -2)
    problem = LayerProblem(weight.T if transposed else weight, gram)
    found, mask, status, figures, history = solve_program(
        problem, solver, refit, jnp.asarray(damping, jnp.result_type(float)), pattern
    )
    if transposed:
        found, mask = found.T, mask.T
    # Under jax.jit also with arrays from outside; under jax.vmap the status may be a plain array.
    if any(map(is_traced, (status, *figures))):
        return Solution(found, mask, status, figures, history)
    status, figures = jax.device_get((status, figures))  # all at once
    plain = Statistics(*(value.item() for value in figures))
    solution = Solution(found, mask, Status(int(status)), plain, history)
    if throw and solution.status.failed:
        raise SolverError(explain(solution.status, problem, float(damping)))
    return solution


def explain(status: Status, problem: LayerProblem, damping: float, name: str = "the weight") -> str:
    """A sentence that says why `problem` has no solution with the given damping."""
    if status is Status.INDEFINITE:
        return f"the Gram of {name} is not positive semidefinite"
    if status is Status.ASYMMETRIC:
        return f"the Gram of {name} is not symmetric"
    if status is Status.BROKEN:
        return f"the mask that the solver or the refit made for {name} does not have the pattern"
    for part, entries in zip(("", "the Gram of "), problem, strict=True):
        if not jnp.isfinite(entries).all():
            return f"{part}{name} holds NaN or Inf"
    return (
        f"no finite solution for {name}: its Gram is not positive definite with damping "
        f"{damping:g}, or numbers are too large; use more damping"
    )


def check_traits(solver: Solver, refit: Refit | None, pattern: AnyPattern) -> None:
    """Raises ValueError unless these are a solver and a refit that can make the pattern."""
    for protocol, usual, method, known in (
        (Solver, "ADMM", solver, SOLVERS),
        (Refit, "ConjugateGradients", refit, REFITS),
    ):
        role = protocol.__name__.lower()
        if method is None and protocol is Refit:
            continue
        if isinstance(method, str) or not callable(method):
            raise ValueError(f"the {role} is {method!r}; give an object, such as prox24.{usual}()")
        if isinstance(method, type):
            raise ValueError(f"the {role} is a class; give an object, {method.__name__}()")
        missing = [trait for trait in TRAITS if not hasattr(method, trait)]
        if missing:
            raise ValueError(
                f"the {role} {type(method).__name__} has no trait {missing[0]}: see "
                "docs/adding-a-solver.md"
            )
        if not implements(type(method), protocol):
            raise ValueError(f"{type(method).__name__} is no {role}: its call has other arguments")
        if jax.tree_util.all_leaves([method]):
            raise ValueError(
                f"the {role} {type(method).__name__} is no pytree: decorate its class with "
                "prox24.hyperparameters"
            )
        for place, leaf in jax.tree_util.tree_leaves_with_path(method):
            if callable(leaf):  # a schedule of optax
                raise ValueError(
                    f"{type(method).__name__}{jax.tree_util.keystr(place)} is a function: its "
                    "schedules are numbers, as prox24.Exponential(first, growth)"
                )
        for name, default in vars(type(method)).items():
            value = getattr(method, name)
            if isinstance(default, Exponential) and hasattr(value, "__float__"):
                raise ValueError(
                    f"{type(method).__name__}.{name} is {value}, not a schedule: for a constant "
                    f"write prox24.Exponential({value}, 1.0)"
                )
        check_numbers(method)
        if pattern not in method.patterns:
            others = {type(made).__name__: made for made in (make() for make in known.values())}
            if protocol is Solver:
                others["ADMM(penalty=None)"] = ADMM(penalty=None)
            able = ", ".join(name for name, other in others.items() if pattern in other.patterns)
            raise ValueError(
                f"{type(method).__name__} supports {method.patterns.value}, not {pattern}; "
                f"{able or 'no ' + role} would"
            )


def check_supported(
    solver: Solver, refit: Refit | None, pattern: PatternLike | Unstructured
) -> None:
    """Raises ValueError if `solve` would for the pattern, and computes nothing."""
    width = as_any_pattern(pattern).width
    arrays = (jax.ShapeDtypeStruct((rows, width), jnp.float32) for rows in (1, width))
    jax.eval_shape(functools.partial(solve, solver=solver, refit=refit, pattern=pattern), *arrays)


def check_shares_columns(solver: Solver, refit: Refit | None) -> None:
    """Raises RecipeError if a device needs the whole Gram although devices share its columns.

    Such methods factor the Gram, or take its powers for the size of their steps.
    """
    for method, known in ((solver, SOLVERS), (refit, REFITS)):
        if method is not None and not method.shares_columns:
            able = ", ".join(name for name, make in known.items() if make().shares_columns)
            raise RecipeError(
                f"{type(method).__name__} needs the whole Gram on every device; {able} would share "
                "its columns"
            )


@functools.partial(jax.jit, static_argnames="pattern")
def solve_program(
    given: LayerProblem,
    solver: Solver,
    refit: Refit | None,
    damping: Array,
    pattern: AnyPattern,
) -> Program:
    """The program that `solve` compiles; it treats explicit axes of a mesh like automatic ones."""
    program = functools.partial(_solve, pattern=pattern)
    if placed := explicit_sharding(*given):
        everywhere = NamedSharding(placed.mesh, PartitionSpec())
        program = auto_axes(program, out_sharding=(placed, placed, *[everywhere] * 3))
    return program(given, solver, refit, damping)


def _check_returned(method: Solver | Refit, found: Any, wanted: type) -> None:
    if not isinstance(found, wanted):
        raise ValueError(
            f"{type(method).__name__} returned a {type(found).__name__}, not a prox24."
            f"{wanted.__name__}"
        )


def _solve(
    given: LayerProblem,
    solver: Solver,
    refit: Refit | None,
    damping: Array,
    pattern: AnyPattern,
) -> Program:
    dtype = working_dtype(given.gram.dtype)
    damping = damping.astype(dtype)
    solver, refit = jax.tree.map(
        lambda x: jnp.asarray(x, dtype) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x,
        (solver, refit),
    )
    problem = LayerProblem(given.weight.astype(dtype), given.gram.astype(dtype))
    candidate = solver(problem, pattern, damping)
    _check_returned(solver, candidate, Candidate)
    weight, mask, used = candidate.weight, candidate.mask, candidate.damping
    refit_steps, refit_exhausted = jnp.zeros((), jnp.int32), jnp.zeros(len(weight), bool)
    if refit is not None:
        if refit.needs_definite:
            used = inverse_factor(problem.gram, used).damping
        normalized = normalize(problem.weight, damped_gram(problem.gram, used))
        scale = normalized.scale[None, :]
        refitted = refit(normalized, weight * scale, mask, pattern)
        _check_returned(refit, refitted, Refitted)
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
    figures: dict[str, Any] = {
        "relative_loss": relative(loss),
        "relative_loss_before_refit": relative(
            loss if refit is None else quadratic_loss(before, problem.gram)
        ),
        "steps": candidate.steps,
        "refit_steps": refit_steps,
        "refit_exhausted": jnp.any(refit_exhausted),
        "dense_blocks": candidate.dense_blocks,
        "dead_features": jnp.count_nonzero(jnp.diagonal(problem.gram) == 0),
        "damping": used * jnp.mean(jnp.diagonal(problem.gram)),
        "damping_raised": candidate.damping_raised | (used > damping),
    }
    finite = jnp.all(jnp.isfinite(weight)) & jnp.isfinite(total)
    nonnegative = is_nonnegative(loss, difference, problem.gram, eps)
    nonnegative &= is_nonnegative(total, problem.weight, problem.gram, eps)
    found = [
        (has_negative_diagonal(problem.gram, eps), Status.INDEFINITE),
        (~is_symmetric(problem.gram, eps), Status.ASYMMETRIC),
        (~finite, Status.NONFINITE),
        (~nonnegative, Status.INDEFINITE),
        (count_violations(mask, pattern) > 0, Status.BROKEN),
        (candidate.dense_blocks > 0, Status.MAX_STEPS),
    ]
    status = jnp.asarray(Status.SPARSE, jnp.int32)
    for holds, one in reversed(found):  # The first true one counts.
        status = jnp.where(holds, jnp.asarray(one, jnp.int32), status)
    return weight, mask, status, Statistics(**figures), candidate.history
